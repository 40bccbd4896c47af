"""Scoring leaves the model and the process as they were, whatever happens."""

from __future__ import annotations

import pytest
import torch
from scoring import ids_of, model_of, plain_losses, whole_graph
from torch.nn.modules import module as module_hooks

from llmprune.scoring.score import score


def prepared():
    """A model in a state worth keeping: gradients, frozen parameters, a mix of training flags."""
    model = model_of("llama_tied", torch.float32)
    model.train()
    model.model.layers[1].eval()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 != 0)
        if number % 2:
            parameter.grad = torch.full_like(parameter, number)
    return model


def state(model):
    return {
        "values": [p.detach().clone() for p in model.parameters()],
        "flags": [p.requires_grad for p in model.parameters()],
        "grads": [p.grad for p in model.parameters()],
        "grad values": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "random": torch.get_rng_state(),
        "enabled": torch.is_grad_enabled(),
        "hooks": [
            len(getattr(m, kind))
            for m in model.modules()
            for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        ],
        "tensor hooks": [
            (len(p._backward_hooks or ()), len(getattr(p, "_post_accumulate_grad_hooks", None) or ()))
            for p in model.parameters()
        ],
        "global hooks": [
            len(module_hooks._global_forward_hooks),
            len(module_hooks._global_forward_pre_hooks),
        ],
        "attributes": [sorted(vars(m)) for m in model.modules()],
    }


def assert_same(before, after):
    assert before.keys() == after.keys()
    for key, old in before.items():
        new = after[key]
        if key == "grads":
            assert all(a is b for a, b in zip(old, new, strict=True))
        elif key == "random":
            assert torch.equal(old, new)
        elif isinstance(old, list) and any(isinstance(t, torch.Tensor) for t in old):
            for a, b in zip(old, new, strict=True):
                assert (a is None and b is None) or torch.equal(a, b), key
        else:
            assert old == new, key


@pytest.mark.parametrize("options", [{}, {"checkpointing": True}, {"batch_size": 2, "checkpointing": False}])
@pytest.mark.parametrize("importance", ["vector", "element1", "element2", "l2", "random"])
def test_nothing_is_left_behind(importance, options):
    model = prepared()
    before = state(model)
    score(model, whole_graph(model), ids_of(), importance=importance, **options)
    assert_same(before, state(model))


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode])
def test_callers_without_gradients_are_served(grad_mode):
    model, ids = prepared(), ids_of()
    want = score(model, whole_graph(model), ids, importance="element2")
    before = state(model)
    with grad_mode():
        got = score(model, whole_graph(model), ids, importance="element2")
    assert_same(before, state(model))
    assert all((got[a] == want[a]).all() for a in want)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("options", [{}, {"checkpointing": True}])
def test_failures_leave_nothing_behind(failure, where, options):
    model = prepared()
    before = state(model)

    class Bomb(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise failure("stop")

    calls = []

    def losses(owner, batch):
        calls.append(0)
        result = plain_losses(owner, batch["input_ids"])
        if len(calls) < 2:  # the survey is let through
            return result
        if where == "forward":
            raise failure("stop")
        return Bomb.apply(result)

    with pytest.raises(failure, match="stop"):
        score(model, whole_graph(model), ids_of(), importance="element2", loss=losses, **options)
    assert_same(before, state(model))


def test_an_interrupt_inside_a_block_leaves_nothing_behind():
    model = prepared()
    before = state(model)
    times = []

    def interrupt(module, args):
        times.append(0)
        if len(times) == 2:  # the survey, then the real pass
            raise KeyboardInterrupt

    handle = model.model.layers[1].mlp.register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            score(model, whole_graph(model), ids_of(), importance="element1", checkpointing=True)
    finally:
        handle.remove()
    assert_same(before, state(model))
