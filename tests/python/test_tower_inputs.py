"""Inputs of models in several parts: the tower says how many tokens it makes; what a transformation wraps is seen."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import llmprune
from llmprune.tracing.inputs import example_inputs
from llmprune.tracing.towers import token_count

TEXT = {
    "vocab_size": 101, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "num_key_value_heads": 3,
    "intermediate_size": 20, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 18, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip


def llava_next() -> nn.Module:
    config = transformers.LlavaNextConfig(
        text_config=transformers.LlamaConfig(**TEXT), vision_config=transformers.CLIPVisionConfig(**VISION),
        image_token_index=99, image_grid_pinpoints=[[16, 32]], vision_feature_layer=-1,
    )  # fmt: skip
    return transformers.LlavaNextForConditionalGeneration(config).double().eval()


def gemma3() -> nn.Module:
    config = transformers.Gemma3Config(
        text_config={**TEXT, "query_pre_attn_scalar": 8, "sliding_window": 4},
        vision_config={**VISION, "vision_use_head": False}, image_token_index=99, boi_token_index=98,
        eoi_token_index=97, mm_tokens_per_image=4,
    )  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration(config).double().eval()


def tokens_of(model: nn.Module, inputs: dict[str, Any]) -> int:
    return int((inputs["input_ids"][0] == 99).sum())


@pytest.mark.parametrize(
    ("build", "tokens"), [(llava_next, 16 + 4 * (8 + 1)), (gemma3, 4)], ids=["views-of-a-grid", "pooled"]
)
def test_a_placeholder_for_each_feature(build: Any, tokens: int) -> None:
    torch.manual_seed(0)
    model = build()
    inputs = example_inputs(model)
    assert tokens_of(model, inputs) == tokens
    with torch.no_grad():
        model(**inputs)
    assert token_count(model, "get_image_features", inputs, 2) == tokens


def test_masks_made_by_vmap_are_recorded() -> None:
    """Gemma 3 makes its mask of images under vmap, whose tensors have no storage of their own."""
    torch.manual_seed(0)
    graph = llmprune.trace(gemma3())
    assert {"head", "ffn"} <= {axis.kind for axis in graph.axes if axis.prunable}
    assert graph.tape.device_mode == "meta"


def test_a_model_without_such_a_method_does_not_say() -> None:
    assert token_count(nn.Linear(3, 4), "get_image_features", {"x": torch.randn(2, 3)}, 2) is None


class Lookup(nn.Module):
    """Rows of a second table overwrite those of ids past the first one's end: here there are none."""

    config = SimpleNamespace(use_cache=False)

    def __init__(self) -> None:
        super().__init__()
        self.table, self.more, self.up = nn.Embedding(11, 12), nn.Embedding(3, 12), nn.Linear(12, 14)
        self.down = nn.Linear(14, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (batch, T)."""
        where = torch.where(ids >= 11)
        rows = self.table(ids.clamp(max=10))
        rows[where] = self.more(ids[where] - 11)
        return self.down(torch.relu(self.up(rows)))


def test_what_an_empty_selection_would_meet_is_frozen() -> None:
    model = Lookup()
    graph = llmprune.trace(model, {"ids": torch.tensor([[1, 2, 3], [4, 5, 6]])})
    prunable = {axis.size for axis in graph.axes if axis.prunable}
    assert prunable == {14}
    reasons = [reason for axis in graph.axes if axis.size == 12 for reason in axis.reasons]
    assert any("left an operation on it empty (aten::embedding in more)" in reason for reason in reasons)
