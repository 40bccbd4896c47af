"""Example inputs fit the model they are made for."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, build
from torch import nn

from llmprune.errors import InputError
from llmprune.tracing.inputs import example_inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_runs_on_them_and_they_are_the_same_each_time(family: str) -> None:
    model, state = build(family), torch.get_rng_state()
    inputs, again = example_inputs(model), example_inputs(model)
    assert inputs.keys() == again.keys()
    assert all(torch.equal(inputs[name], again[name]) for name in inputs)
    assert torch.equal(state, torch.get_rng_state())
    with torch.no_grad():
        model(**inputs)


def test_token_ids_are_ordinary_ones_and_sequences_fit() -> None:
    model = build("llama", vocab_size=9, max_position_embeddings=8)
    ids = example_inputs(model, batch=5, length=40)["input_ids"]
    assert ids.shape == (5, 6)
    assert set(ids.unique().tolist()) <= set(range(3, 9))
    assert (example_inputs(build("llama"), length=11)["attention_mask"].shape) == (2, 11)


def test_a_special_token_outside_the_vocabulary_is_left_out() -> None:
    text = {**FAMILIES["clip"][2]["text_config"], "eos_token_id": 49407}
    ids = example_inputs(build("clip", text_config=text))["input_ids"]
    assert ids.max() < 101
    assert (example_inputs(build("clip"))["input_ids"][:, -1] == 2).all()


def test_floating_inputs_have_the_models_type() -> None:
    assert example_inputs(build("vit").bfloat16())["pixel_values"].dtype is torch.bfloat16


def test_what_no_rule_fits_asks_for_inputs() -> None:
    class Settings:
        vocab_size = None

    class Odd(nn.Module):
        config = Settings()

        def forward(self, signal: torch.Tensor) -> torch.Tensor:
            return signal

    with pytest.raises(InputError, match="give inputs="):
        example_inputs(Odd())
    with pytest.raises(InputError, match="has no config"):
        example_inputs(nn.Linear(2, 3))
