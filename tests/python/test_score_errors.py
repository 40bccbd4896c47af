"""Bad input to scoring: one typed exception, one sentence that says what and where."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from scoring import VOCABULARY, ids_of, model_of, whole_graph

from llmprune.errors import CalibrationError, InputError, LlmpruneError
from llmprune.scoring.score import score


@pytest.fixture
def llama():
    model = model_of("llama_gqa", torch.float32)
    return model, whole_graph(model)


def refused(kind, match, *args, **kwargs):
    with pytest.raises(kind, match=match) as info:
        score(*args, **kwargs)
    assert isinstance(info.value, LlmpruneError)
    assert "\n" not in str(info.value)


def words(text):
    return {"input_ids": [1 + len(word) for word in text.split()]}


def test_unknown_names_list_the_known_ones(llama):
    refused(InputError, "'taylor'.*vector, element1, element2, l1, l2, random", *llama, ids_of(), "taylor")
    refused(InputError, "'mean'.*sum, max, product, last", *llama, ids_of(), "element1", "mean")


def test_weights_that_are_not_finite_are_named(llama):
    model, graph = llama
    for value, word in ((float("nan"), "NaN"), (float("inf"), "infinite")):
        for importance in ("l2", "element1"):
            weight = model.model.layers[1].mlp.up_proj.weight
            kept = weight.detach().clone()
            with torch.no_grad():
                weight[3, 4] = value
            refused(
                InputError,
                rf"layers\.1\.mlp\.up_proj\.weight holds {word}",
                model,
                graph,
                ids_of(),
                importance,
            )
            with torch.no_grad():
                weight.copy_(kept)


def test_a_loss_that_is_not_finite_names_the_sample():
    model = model_of("phi", torch.float32)
    graph = whole_graph(model)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = 3e38  # finite, but a layer norm's sum of it is not
    ids = ids_of()
    ids[ids == 7] = 8
    ids[3, 2] = 7
    with torch.no_grad():
        assert not torch.isfinite(model(ids[3:4]).logits).all()
    for importance in ("element1", "element2"):
        refused(CalibrationError, "sample 3 is nan", model, graph, ids, importance)
        refused(
            CalibrationError,
            "sample 3 is nan",
            model,
            graph,
            ids,
            importance,
            batch_size=2,
            checkpointing=False,
        )


def test_too_little_text_says_how_much(llama, tmp_path):
    refused(CalibrationError, "has 3 tokens, 640 are needed", *llama, ["only three words"], tokenizer=words)
    refused(CalibrationError, "has 0 tokens, 640 are needed", *llama, [], tokenizer=words)
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    refused(CalibrationError, "has 0 tokens, 640 are needed", *llama, empty, tokenizer=words)
    refused(CalibrationError, "0 samples of 12 tokens", *llama, ids_of()[:0])
    refused(CalibrationError, "5 samples of 1 tokens", *llama, ids_of()[:, :1])


def test_ids_out_of_range_are_named(llama):
    ids = ids_of()
    ids[2, 5] = VOCABULARY
    refused(
        CalibrationError, f"token id {VOCABULARY} in calibration sample 2 .* {VOCABULARY} tokens", *llama, ids
    )
    ids[2, 5] = -1
    refused(CalibrationError, "token id -1 in calibration sample 2", *llama, ids)


def test_calibration_of_the_wrong_kind(llama):
    refused(InputError, "torch.float32: an integer tensor", *llama, ids_of().float())
    refused(InputError, "torch.bool: an integer tensor", *llama, ids_of() > 3)
    refused(InputError, r"shape \(12,\)", *llama, ids_of()[0])
    refused(InputError, "is a int", *llama, 17)
    refused(InputError, "is a bytes", *llama, b"text")
    refused(InputError, "need a tokenizer", *llama, ["text"])
    refused(InputError, "hold a list", *llama, [[1, 2]], tokenizer=words)
    refused(InputError, "needs calibration data", *llama)
    refused(InputError, "batch_size is 0", *llama, ids_of(), batch_size=0)


def test_calibration_files(llama, tmp_path):
    refused(CalibrationError, "missing.txt' does not exist", *llama, str(tmp_path / "missing.txt"))
    refused(CalibrationError, "does not exist", *llama, tmp_path)
    other = tmp_path / "text.csv"
    other.write_text("a")
    refused(InputError, "neither in .txt nor in .jsonl", *llama, other)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "fine"}\n\n{"content": "no"}\n')
    refused(CalibrationError, 'line 3 of .* under "text"', *llama, rows, tokenizer=words)
    rows.write_text("{broken\n")
    refused(CalibrationError, "line 1 of .* is not JSON", *llama, rows, tokenizer=words)
    rows.write_text(json.dumps({"text": 3}))
    refused(CalibrationError, 'line 1 of .* under "text"', *llama, rows, tokenizer=words)
    raw = tmp_path / "raw.txt"
    raw.write_bytes(b"\xff\xfe\xfa")
    refused(CalibrationError, "is not UTF-8", *llama, raw, tokenizer=words)


def test_the_graph_of_another_model(llama):
    graph = whole_graph(model_of("gpt2"))
    refused(
        InputError,
        "graph is not of this LlamaForCausalLM.*transformer.wte.weight.*missing",
        llama[0],
        graph,
        ids_of(),
    )
    config = llama[0].config
    config.intermediate_size = 32
    wider = transformers.LlamaForCausalLM(config)
    refused(
        InputError,
        r"mlp.gate_proj.weight of shape \(28, 16\) has shape \(32, 16\)",
        wider,
        llama[1],
        ids_of(),
    )


def test_packed_and_unloaded_weights(llama):
    model, graph = llama
    mlp = model.model.layers[0].mlp
    mlp.up_proj.weight = torch.nn.Parameter(torch.zeros((28, 16), dtype=torch.uint8), requires_grad=False)
    refused(InputError, "up_proj.weight is uint8, not floating point", model, graph, ids_of(), "l1")
    refused(InputError, "is on the meta device", model.to("meta"), graph, ids_of(), "l1")


def test_samples_longer_than_the_positions():
    model = model_of("gpt2", torch.float32)
    refused(
        CalibrationError, r"\(2, 80\).*longer than its positions", model, whole_graph(model), ids_of(2, 80)
    )


def test_models_without_next_token_predictions():
    small = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 28, "hidden_size": 16}
    bert = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=VOCABULARY, **small)).eval()
    with torch.no_grad():
        for parameter in bert.parameters():
            parameter.normal_(0, 0.5)
    refused(InputError, "BertForMaskedLM is not causal", bert, whole_graph(bert), ids_of())
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=4, d_ff=28, num_layers=2, num_heads=4)
    )
    refused(InputError, "T5ForConditionalGeneration is an encoder-decoder", t5, whole_graph(t5), ids_of())
    vit = transformers.ViTForImageClassification(transformers.ViTConfig(image_size=8, patch_size=4, **small))
    inputs = {"pixel_values": torch.zeros(3, 3, 8, 8)}
    refused(InputError, "without labels need loss=", vit, whole_graph(vit), inputs)
    refused(InputError, "scalar", vit, whole_graph(vit), {"pixel_values": 3})
    refused(
        CalibrationError, "disagree", vit, whole_graph(vit), {**inputs, "labels": np.zeros(2, dtype=np.int64)}
    )


def test_a_users_loss_of_the_wrong_shape(llama):
    refused(
        InputError,
        r"loss= returned \(\): one loss per sample, shape \(2,\)",
        *llama,
        ids_of(),
        loss=lambda model, batch: model(batch["input_ids"]).logits.mean(),
    )
