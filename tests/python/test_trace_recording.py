"""Recording: the tape is the same on meta and real tensors, and its equations hold; a model is left as it was."""

from __future__ import annotations

import copy
import json
import operator
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, build
from torch import nn
from torch.nn.modules import module as torch_module

from llmprune.errors import InputError, TraceError
from llmprune.tracing.tape import TENSOR, TENSORS, Tape, arguments
from llmprune.tracing.trace import record

MEANING: dict[str, Callable[..., int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
    "neg": operator.neg,
    "max": max,
    "min": min,
}


def evaluate(tree: Any, attribute: Callable[[str, str], int], shape: Callable[[int, int], int]) -> int:
    """The value of an origin, given (module path, name) -> value and (tensor id, dim) -> size."""
    if isinstance(tree, int):
        return int(tree)
    head, *rest = tree
    if head == "attr":
        return attribute(rest[0], rest[1])
    if head == "shape":
        return shape(*rest)
    values = [evaluate(part, attribute, shape) for part in rest]
    return int(MEANING[head](*values))


def attribute_of(model: nn.Module) -> Any:
    def read(path: str, name: str) -> int:
        value: Any = model.get_submodule(path)
        for part in re.findall(r"[^.\[\]]+|\[\d+\]", name):
            value = value[int(part[1:-1])] if part.startswith("[") else getattr(value, part)
        assert type(value) is int
        return value

    return read


def attributes(tape: Tape) -> set[tuple[str, str]]:
    found = set()
    stack = [equation[2] for equation in tape.equations]
    while stack:
        tree = stack.pop()
        if isinstance(tree, list):
            if tree[0] == "attr":
                found.add((tree[1], tree[2]))
            else:
                stack.extend(tree[1:])
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tape_is_whole_and_the_same_on_meta_and_real_tensors(family: str) -> None:
    model = build(family)
    meta, real = record(model, device_mode="meta"), record(model, device_mode="real")
    assert meta.device_mode == "meta"
    assert real.device_mode == "real"
    assert {**meta.to_json(), "device_mode": ""} == {**real.to_json(), "device_mode": ""}
    assert Tape.from_json(json.loads(json.dumps(meta.to_json()))) == meta

    known = {tid for tid, tensor in enumerate(meta.tensors) if tensor[3] != "value"}
    for name, _, code, outputs, scope in meta.ops:
        used = [
            tid for tag, payload in arguments(code) if tag in (TENSOR, TENSORS) for tid in payload if tid >= 0
        ]
        assert known.issuperset(used), f"{name} uses a tensor before it is made"
        known.update(outputs)
        assert 0 <= scope < len(meta.scopes)
    assert meta.outputs
    assert known.issuperset(meta.outputs)

    names = [name for _, _, _, role, name in meta.tensors if role == "parameter"]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    shapes = {name: sizes for sizes, _, _, role, name in meta.tensors if role == "parameter"}
    assert all(shapes[name] == list(parameter.shape) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_equation_holds(family: str, attention: str) -> None:
    model = build(family)
    tape = record(model, attention=attention)
    read = attribute_of(model)
    for tensor, dim, tree, where in tape.equations:
        size = tape.tensors[tensor][0][dim]
        assert evaluate(tree, read, lambda t, d: tape.tensors[t][0][d]) == size, (tree, where)
    assert len({json.dumps(equation[:3]) for equation in tape.equations}) >= len(tape.equations) // 2


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", {"head_dim", "num_key_value_groups"}),
        ("gpt2", {"split_size", "head_dim", "nf"}),
        ("gpt_neox", {"head_size"}),
        ("phi3", {"head_dim", "config.num_attention_heads", "num_key_value_heads"}),
        ("bloom", {"num_heads", "head_dim"}),
        ("falcon", {"num_heads", "head_dim"}),
        ("bert", {"attention_head_size"}),
        ("t5", {"key_value_proj_dim"}),
        ("vit", {"normalized_shape[0]"}),
        ("mamba", {"ssm_state_size", "time_step_rank"}),
        ("convnext", {"in_channels", "out_channels", "groups"}),
    ],
)
def test_the_attributes_that_size_a_forward_pass_are_found(family: str, expected: set[str]) -> None:
    assert expected <= {name for _, name in attributes(record(build(family)))}


def snapshot(model: nn.Module) -> Any:
    modules = [
        (
            name,
            {
                key: (id(value), type(value), sorted(value) if isinstance(value, set) else repr(value))
                for key, value in module.__dict__.items()
                if not isinstance(value, nn.Module)
            },
        )
        for name, module in model.named_modules()
    ]
    # Not the version counter: a write to a real tensor is undone by another.
    named = (*model.named_parameters(), *model.named_buffers())
    return modules, [(name, id(t), t.requires_grad, t.detach().clone()) for name, t in named]


class Failing(nn.Module):
    """Changes everything it can, then fails."""

    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.error = error
        self.sizes = [3, 4]
        self.memory = torch.zeros(3)
        self.inner = nn.Linear(3, 4)
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.rand(3)
        self.seen += 1
        self.memory[0] = 5.0
        self.inner.weight.mul_(2)
        self.sizes.append(9)
        self.extra = 3
        self.inner.register_forward_hook(lambda *_: None)
        raise self.error("no more")


@pytest.mark.parametrize("mode", ["meta", "real", "auto"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_on_a_model_that_fails(mode: str, error: type[BaseException]) -> None:
    model = Failing(error).train()
    before = snapshot(model)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index]
    with pytest.raises(TraceError if error is ValueError else error):
        record(model, {"x": torch.ones(2, 3)}, device_mode=mode)
    assert str(snapshot(model)) == str(before)
    assert model.sizes == [3, 4]
    assert torch.equal(model.memory, torch.zeros(3))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert (states[2] == np.random.get_state()[1]).all()  # type: ignore[index]
    assert not torch_module._global_forward_hooks
    assert not torch_module._global_forward_pre_hooks


@pytest.mark.parametrize("family", ["llama", "rwkv", "mixtral", "clip"])
@pytest.mark.parametrize("mode", ["meta", "real"])
def test_nothing_is_left_on_a_model_that_runs(family: str, mode: str) -> None:
    model = build(family).train()
    config = copy.deepcopy(model.config)
    before, state = snapshot(model), torch.get_rng_state()
    record(model, device_mode=mode)
    assert str(snapshot(model)) == str(before)
    assert model.config.to_dict() == config.to_dict()
    assert model.training
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "t5"])
def test_a_model_without_weights_gives_the_same_tape(family: str) -> None:
    assert record(build(family, device="meta")).to_json() == record(build(family)).to_json()


def test_other_types_and_requires_grad_do_not_change_what_a_tape_says() -> None:
    tape = record(build("llama"))
    half = record(build("llama").bfloat16())
    plain, converted = ([op[0] for op in t.ops if op[0] != "aten::_to_copy"] for t in (tape, half))
    assert plain == converted


def test_views_share_a_storage_and_in_place_operations_return_their_tensor() -> None:
    class Writes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * 2
            y[:, :2].add_(1)
            a, b = y.split(2, dim=1)
            return torch.cat((a, b))

    tape = record(Writes(), (torch.ones(3, 4),))
    ops = {name: (code, outputs) for name, _, code, outputs, _ in tape.ops}
    code, outputs = ops["aten::add_"]
    assert outputs == [code[1]]
    storages = [tape.tensors[t][2] for t in (*ops["aten::mul"][1], *ops["aten::split"][1], *outputs)]
    assert len(set(storages)) == 1
    assert tape.tensors[ops["aten::cat"][1][0]][2] not in storages


def test_values_of_small_integers_are_known_on_meta() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(11, 6)

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            x = self.table(ids)
            if mask.all() or bool((ids == 3).any()):
                x = x + 1
            lengths = mask.sum(-1).tolist()
            rows = torch.nonzero(mask)
            picked = x[mask.bool()]
            assert picked.shape[0] == rows.shape[0] == sum(lengths)
            x = x.masked_select(mask[..., None].bool()).view(-1, 6)
            return picked + x + torch.tensor(lengths).max().item() + mask.numpy().sum()

    inputs = {"ids": torch.tensor([[1, 2, 4], [5, 6, 7]]), "mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    meta, real = record(Asks(), inputs, device_mode="meta"), record(Asks(), inputs, device_mode="real")
    assert meta.tensors[meta.outputs[0]][0] == [5, 6]
    assert real.tensors[real.outputs[0]][0] == [5, 6]


class AsksWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner(x)
        return y[:, : 1 + int(y.sum() < 1e9)]


def test_what_needs_computed_values_is_recorded_on_real_tensors_and_says_so() -> None:
    tape = record(AsksWeights(), (torch.ones(2, 3),))
    assert tape.device_mode == "real"
    assert "real tensors" in tape.notes[0]
    assert tape.tensors[tape.outputs[0]][0] == [2, 2]
    with pytest.raises(TraceError, match=r"aten::_local_scalar_dense, in module 'the root', test_trace"):
        record(AsksWeights().to("meta"), (torch.ones(2, 3),))


def test_errors_say_what_to_do() -> None:
    with pytest.raises(InputError, match="give inputs="):
        record(nn.Linear(2, 3))
    with pytest.raises(InputError, match="its arguments are input"):
        record(nn.Linear(2, 3), {"x": torch.ones(2)})
    with pytest.raises(TraceError, match="cannot be traced"):
        record(nn.Linear(2, 3), torch.ones(5))
