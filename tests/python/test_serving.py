"""What a user does with a pruned checkpoint on other tools: torch.export, torch.compile, ONNX Runtime, torchao."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from folders import TEXT, make_folder, tokenizer

import llmprune
from llmprune.evaluation.evaluate import evaluate

IDS = torch.arange(96).reshape(4, 24) % 61

pytestmark = pytest.mark.filterwarnings("ignore")  # of the tools' own code, which is not what is tested here


@pytest.fixture(scope="module", params=["stock", "universal"])
def pruned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A pruned model in each form, as transformers alone loads it: layers of one size, and of many."""
    path = tmp_path_factory.mktemp(request.param)
    folder = make_folder(path)
    model = llmprune.from_pretrained(folder)
    allocation = "uniform" if request.param == "stock" else "global"
    llmprune.prune(
        model,
        tokenizer(),
        ratio=0.2,
        calibration=IDS,
        importance="element1",
        allocation=allocation,
        quiet=True,
    )
    out = path / "pruned"
    llmprune.save_pretrained(model, out, tokenizer())
    config = json.loads((out / "config.json").read_text())
    assert ("auto_map" in config) == (request.param == "universal")
    return tf.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()


@torch.no_grad()
def logits(model: Callable[..., Any], ids: torch.Tensor = IDS) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return result


class Logits(torch.nn.Module):
    """The model as a function of one tensor with one result, which every runtime knows."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return result


def any_batch_and_length() -> tuple[dict[int, Any]]:
    return ({0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("tokens", min=2, max=64)},)


def test_export_keeps_batch_and_length_free(pruned: Any) -> None:
    exported = torch.export.export(
        Logits(pruned).eval(), (IDS,), dynamic_shapes=any_batch_and_length(), strict=False
    )
    for ids in (IDS, IDS[:1, :7]):
        assert torch.allclose(exported.module()(ids), logits(pruned, ids), atol=1e-6)


def test_compile_makes_one_graph(pruned: Any) -> None:
    torch.compiler.reset()
    compiled = torch.compile(pruned, backend="aot_eager", fullgraph=True)
    assert torch.equal(logits(compiled), logits(pruned))


@pytest.mark.slow
def test_inductor_computes_the_same(pruned: Any) -> None:
    torch.compiler.reset()
    compiled = torch.compile(pruned, fullgraph=True)
    assert torch.allclose(logits(compiled), logits(pruned), atol=1e-4)


def test_onnx_runtime_computes_the_same(pruned: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="exporting to ONNX needs onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    program = torch.onnx.export(
        Logits(pruned).eval(),
        (IDS,),
        dynamo=True,
        dynamic_shapes=any_batch_and_length(),
        input_names=["input_ids"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None
    program.save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for ids in (IDS, IDS[:1, :7]):
        (found,) = session.run(["logits"], {"input_ids": ids.numpy()})
        assert torch.allclose(torch.from_numpy(found), logits(pruned, ids), atol=1e-4)


@pytest.mark.parametrize(("bits", "error"), [(8, 0.1), (4, 0.6)])
def test_torchao_quantises_what_was_pruned(pruned: Any, bits: int, error: float) -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    granularity = pytest.importorskip("torchao.quantization.granularity")
    quantised = copy.deepcopy(pruned)
    kind = {8: torch.int8, 4: torch.int4}[bits]
    config = torchao.IntxWeightOnlyConfig(weight_dtype=kind, granularity=granularity.PerAxis(0))
    torchao.quantize_(quantised, config)
    weight = quantised.model.layers[0].mlp.down_proj.weight
    assert type(weight) is not torch.nn.Parameter
    assert {name: p.shape for name, p in quantised.named_parameters()} == {
        name: p.shape for name, p in pruned.named_parameters()
    }
    want = logits(pruned)
    assert 0 < ((logits(quantised) - want).norm() / want.norm()).item() < error
    dense, small = (
        evaluate(model, tokenizer(), ppl={"text": TEXT * 4}, window=32, latency=False, quiet=True)
        for model in (pruned, quantised)
    )
    assert small.perplexity["text"] == pytest.approx(dense.perplexity["text"], rel=error)
    assert small.parameters == dense.parameters
    linear = sum(m.weight.numel() for m in pruned.modules() if isinstance(m, torch.nn.Linear))
    # Four bytes a weight became one; what is more are the scales.
    scales = small.memory["weights"] - (dense.memory["weights"] - 3 * linear)
    assert 0 < scales < linear
