"""What pruning saves on a small machine: one thread, by llama.cpp and by ONNX Runtime.

A LLaMA of random weights loses a sixth of its blocks' parameters in three ways that cost exactly as much: half of the
heads, a quarter of the feed-forward channels, or two of twelve blocks. Beside them: the dense model, and the dense and
the channel-pruned model quantised to eight bits (``q8_0`` of llama.cpp, dynamic int8 of ONNX Runtime). Taken are the
processor time of a prompt of 128 tokens and of one more token, each the median of a process of its own, and the memory
that loading and running adds to it. llama.cpp keeps keys and values, so that its token follows the prompt; the ONNX
graph has no cache, and its token stands alone. Figures are ratios to the dense model of the same round, the median of
rounds: llama.cpp in float16, ONNX Runtime in float32.

usage: python benchmarks/edge.py [--width 768] [--layers 12] [--rounds 3] [--runtimes llama.cpp onnxruntime]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from _measure import Claim, in_own_process, peak_over, save

PROMPT, REPEATS = 128, 7
VOCABULARY = 1024
DEMO = Path(__file__).resolve().parent.parent / "demo" / "model"
WAYS: dict[str, dict[str, float]] = {
    "dense": {},
    "half of the heads": {"head": 1 / 2},
    "a quarter of the channels": {"ffn": 1 / 4},
    "a sixth of the blocks": {"layer": 1 / 6},
}
CUT = "a quarter of the channels"
INT8 = ("dense", CUT)


def write_models(place: Path, width: int, layers: int) -> dict[str, int]:
    """The dense model and what is left of it in each way, as checkpoint folders; parameters of each."""
    import transformers as tf

    import llmprune

    config = tf.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=2 * PROMPT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    dense = tf.LlamaForCausalLM(config).eval()
    tokenizer = tf.AutoTokenizer.from_pretrained(DEMO)
    dense.save_pretrained(place / "dense")
    tokenizer.save_pretrained(place / "dense")
    ids = torch.randint(0, VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(0))
    found = {}
    for way, ratio in WAYS.items():
        model = llmprune.from_pretrained(place / "dense")
        if ratio:
            llmprune.prune(
                model,
                tokenizer,
                ratio=ratio,
                calibration=ids,
                importance="element1",
                allocation="uniform",
                protect_first=0,
                protect_last=0,
                repair="none",
                quiet=True,
            )
            llmprune.save_pretrained(model, place / way, tokenizer)
        found[way] = sum(p.numel() for p in model.model.layers.parameters())
    return found


class Logits(torch.nn.Module):
    """The model as a function of one tensor with one result."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits of (batch, tokens) ids."""
        result: torch.Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return result


def write_gguf(place: Path) -> dict[str, Path]:
    """Each model in float16, and two in eight bits."""
    from llmprune.export.gguf import export_gguf

    files = {way: place / f"{number}.gguf" for number, way in enumerate(WAYS)}
    for way, file in files.items():
        export_gguf(place / way, file, "f16")
    for number, way in enumerate(INT8):
        files[f"{way}, 8 bits"] = place / f"{number}-q8.gguf"
        export_gguf(place / way, files[f"{way}, 8 bits"], "q8_0")
    return files


def write_onnx(place: Path) -> dict[str, Path]:
    """Each model in float32, and two in eight bits."""
    import transformers as tf
    from onnxruntime.quantization import QuantType, quantize_dynamic

    files = {way: place / f"{number}.onnx" for number, way in enumerate(WAYS)}
    free = {0: torch.export.Dim("batch", min=1, max=8), 1: torch.export.Dim("tokens", min=2, max=2 * PROMPT)}
    for way, file in files.items():
        model = tf.AutoModelForCausalLM.from_pretrained(place / way).eval()
        program = torch.onnx.export(
            Logits(model).eval(),
            (torch.ones(2, 8, dtype=torch.int64),),
            dynamo=True,
            dynamic_shapes=(free,),
            input_names=["input_ids"],
            output_names=["logits"],
            verbose=False,
        )
        assert program is not None
        program.save(file)
    for number, way in enumerate(INT8):
        files[f"{way}, 8 bits"] = place / f"{number}-int8.onnx"
        quantize_dynamic(files[way], files[f"{way}, 8 bits"], weight_type=QuantType.QInt8)
    return files


def _llama(path: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    import llama_cpp

    model = llama_cpp.Llama(
        path, n_ctx=2 * PROMPT, n_batch=PROMPT, n_threads=1, n_threads_batch=1, verbose=False
    )
    ids = [2 + i % (VOCABULARY - 2) for i in range(PROMPT)]

    def prompt() -> None:
        model.reset()
        model.eval(ids)

    def token() -> None:
        model.eval(ids[:1])

    return prompt, token


def _onnx(path: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    ids = np.arange(PROMPT, dtype=np.int64)[None] % VOCABULARY

    def prompt() -> None:
        session.run(["logits"], {"input_ids": ids})

    def token() -> None:
        session.run(["logits"], {"input_ids": ids[:, :1]})

    return prompt, token


RUNTIMES = {"llama.cpp": ("llama_cpp", write_gguf, _llama), "onnxruntime": ("onnxruntime", write_onnx, _onnx)}
"""Name -> its module, what writes the models for it, and what loads one."""


def measure(runtime: str, path: str) -> dict[str, float]:
    """Milliseconds of processor time of a prompt and of a token, and bytes of memory that it all took."""
    module, _, load = RUNTIMES[runtime]
    steps: list[Callable[[], Any]] = []
    seconds: list[list[float]] = [[], []]

    def work() -> None:
        steps.extend(load(path))
        for _ in range(REPEATS):
            for step, taken in zip(steps, seconds, strict=True):
                begun = time.process_time()
                step()
                taken.append(time.process_time() - begun)

    import_module(module)  # the libraries are not what is measured
    memory = peak_over(work)
    prompt, token = (1000 * statistics.median(taken[1:]) for taken in seconds)
    return {"prompt ms": prompt, "token ms": token, "memory": memory, "file": _stored(Path(path))}


def _stored(path: Path) -> int:
    """Bytes of a model's file, and of the weights beside it where it has some."""
    return sum(file.stat().st_size for file in path.parent.glob(path.name + "*"))


def compare(runtime: str, files: dict[str, Path], rounds: int) -> dict[str, dict[str, float]]:
    """Each model's figures, and how many times the dense model's they are."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in files}
    for _ in range(rounds):
        for name, path in files.items():
            runs[name].append(in_own_process(__file__, "--measure", runtime, str(path)))
    found: dict[str, dict[str, float]] = {}
    for name, rows in runs.items():
        found[name] = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        pairs = list(zip(rows, runs["dense"], strict=True))
        for key in rows[0]:
            found[name][f"{key} of dense"] = statistics.median(row[key] / base[key] for row, base in pairs)
        shown = ", ".join(f"{key} {value:.4g}" for key, value in found[name].items())
        print(f"{runtime}, {name}: {shown}", flush=True)
    return found


def main() -> int:
    """Measure, print, save; exit status 1 when a claim fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    there = [name for name, (module, *_) in RUNTIMES.items() if find_spec(module)]
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=there)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return 0
    for name in RUNTIMES.keys() - there:
        print(f"{name} is left out: {RUNTIMES[name][0]} is not installed")
    warnings.simplefilter("ignore")  # of the exporters' own code
    claims, results = [], {}
    with tempfile.TemporaryDirectory() as place:
        parameters = write_models(Path(place), options.width, options.layers)
        sizes = [size for way, size in parameters.items() if way != "dense"]
        claims.append(
            Claim("the largest pruned model over the smallest, in parameters", max(sizes) / min(sizes), 1.001)
        )
        for runtime in options.runtimes:
            rows = results[runtime] = compare(runtime, RUNTIMES[runtime][1](Path(place)), options.rounds)
            claims += [
                Claim(f"{runtime}, {name}: {key}, of the dense model's", row[f"{key} of dense"], 0.95)
                for name, row in rows.items()
                if name != "dense"
                for key in ("prompt ms", "memory")
            ]
            eight, whole = rows[f"{CUT}, 8 bits"], rows["dense, 8 bits"]
            claims.append(
                Claim(
                    f"{runtime}, 8 bits: memory, pruned over dense", eight["memory"] / whole["memory"], 0.95
                )
            )
    how = {"width": options.width, "layers": options.layers, "prompt": PROMPT, "rounds": options.rounds}
    save("edge", claims, how=how, parameters=parameters, runtimes=results)
    print("\n".join(map(str, claims)))
    return 0 if all(claim.holds for claim in claims) else 1


if __name__ == "__main__":
    sys.exit(main())
