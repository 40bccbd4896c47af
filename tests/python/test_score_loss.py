"""The losses of samples, and the one that never forms whole logits."""

from __future__ import annotations

import pytest
import torch
from scoring import VOCABULARY, gradients, ids_of, model_of, oracle, whole_graph, worst
from torch.nn import functional as F

from llmprune.scoring import loss
from llmprune.scoring.loss import fused_loss, label_losses, next_token_losses
from llmprune.scoring.score import score


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_next_token_losses_are_the_models_own():
    model, ids = model_of("llama_gqa"), ids_of()
    with torch.no_grad():
        own = torch.stack([model(row[None], labels=row[None]).loss for row in ids])
        got = next_token_losses(model(ids).logits, ids)
    assert torch.equal(got, own)


def test_label_losses_leave_out_what_is_not_predicted():
    logits, labels = random(3, 4, 7), torch.tensor([[1, -100, 2, 3], [-100, -100, 5, -100], [-100] * 4])
    want = [F.cross_entropy(row, one) for row, one in zip(logits[:2], labels, strict=False)]
    torch.testing.assert_close(label_losses(logits, labels), torch.stack([*want, torch.zeros(())]))


class Recorder:
    """Puts together what the fused loss says of the weight."""

    def __init__(self, weight):
        self.gradient, self.outputs, self.dx = torch.zeros_like(weight), [], None

    def rows(self, start, stop, x, dy, y):
        self.gradient[start:stop] = dy.t() @ x
        self.outputs.append(y)

    def inputs(self, x, dx):
        self.dx = dx


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [5, 61, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_fused_loss_is_the_plain_one(monkeypatch, dtype, rows, with_bias, keep):
    monkeypatch.setattr(loss, "SLICE_BYTES", 1)
    monkeypatch.setattr(loss, "SLICE_ROWS", rows)
    ids = ids_of(4, 9)
    hidden = (3 * random(4, 9, 12, dtype=dtype)).requires_grad_()
    weight = random(VOCABULARY, 12, seed=1, dtype=dtype).requires_grad_()
    bias = random(VOCABULARY, seed=2, dtype=dtype) if with_bias else None
    seed = torch.tensor([1.0, 0.0, 2.0, -1.0])
    want = next_token_losses(F.linear(hidden, weight, bias), ids)
    grads = torch.autograd.grad((want * seed).sum(), [hidden, weight])
    use = Recorder(weight.detach())
    got = fused_loss(hidden, weight.detach(), bias, ids, use, torch.zeros((), requires_grad=True), keep)
    (dx,) = torch.autograd.grad((got * seed).sum(), [hidden])
    close = {"rtol": 3e-2, "atol": 3e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(got, want, **close)
    torch.testing.assert_close(dx, grads[0], **close)
    torch.testing.assert_close(use.gradient, grads[1], **close)
    torch.testing.assert_close(use.dx.view(4, 8, 12), dx[:, :-1], **close)
    torch.testing.assert_close(
        torch.cat(use.outputs, 1), F.linear(hidden[:, :-1].reshape(-1, 12), weight, bias), **close
    )


def test_extreme_logits_do_not_overflow():
    ids = ids_of(2, 5)
    hidden, weight = torch.full((2, 5, 4), 300.0), random(VOCABULARY, 4, seed=1)
    got = fused_loss(hidden, weight, None, ids, None, torch.zeros((), requires_grad=True), False)
    torch.testing.assert_close(got, next_token_losses(F.linear(hidden, weight), ids), rtol=1e-5, atol=1e-4)


def test_a_users_loss_defines_the_gradient():
    model, ids = model_of("llama_gqa"), ids_of()

    def last_token_only(owner, batch):
        ids = batch["input_ids"] if isinstance(batch, dict) else batch
        return F.cross_entropy(owner(ids).logits[:, -2].float(), ids[:, -1], reduction="none")

    graph = whole_graph(model)
    want = oracle(model, graph, gradients(model, ids, last_token_only), "element2", "sum")
    assert worst(score(model, graph, ids, importance="element2", loss=last_token_only), want) < 1e-6


def test_causal_labels_are_shifted_and_may_be_padded():
    model, ids = model_of("llama_gqa"), ids_of()
    graph = whole_graph(model)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    for importance in ("element1", "element2"):
        want = score(model, graph, ids, importance=importance)
        assert worst(score(model, graph, inputs, importance=importance), want) < 1e-6


def test_models_that_are_no_language_models_are_scored_by_their_labels():
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=28,
        image_size=8,
        patch_size=4,
    )
    config.num_labels = 5
    model = transformers.ViTForImageClassification(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    inputs = {"pixel_values": random(4, 3, 8, 8, dtype=torch.float64), "labels": torch.tensor([0, 3, 1, 4])}
    graph = whole_graph(model)

    def losses(owner, row):
        return F.cross_entropy(
            owner(pixel_values=row).logits.float(), inputs["labels"][[match(row)]]
        ).reshape(1)

    def match(row):
        return next(i for i, image in enumerate(inputs["pixel_values"]) if torch.equal(image, row[0]))

    grads = gradients(model, inputs["pixel_values"], losses)
    for importance in ("vector", "element1", "element2"):
        want = oracle(model, graph, grads, importance, "sum")
        assert worst(score(model, graph, inputs, importance=importance), want) < 1e-6
