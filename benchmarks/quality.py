"""What the importances are worth: perplexity of pruned models.

20 % of the FFN channels and 25 % of the key-value groups are removed in every layer, for every importance and
aggregation, with three seeds for random; for element1 (sum) with least-squares repair in both
orders; and for obs, fluctuation and activation, read off the repair's calibration, without repair and with it.

    python benchmarks/quality.py [MODEL_DIR ...] [--data DIR] [--best]

With ``--best`` only the modes of ``prune`` are run again, at as many parameters, and put into the tables there are: how
it chooses without options, in rounds, and by measured sensitivity; on the same text and a later one, with the CPU time
of the whole beside that of pruning by element1 alone, and of scoring, choosing and repair beside that of element1's
scores.

Protocol: calibration on 10 x 64 tokens of the training text's head, repair on 64 x 128 of its end; judged on the
first 100,000 characters of the validation text in windows of 128 tokens without overlap, the first token of a window
not scored; texts are encoded as the tokenizer does by default.
Without arguments it runs on the demo model with the demo's texts; with ``--data`` (or LLMPRUNE_DATA) on every model
folder below DIR/models with the TinyStories texts of DIR/text. Writes results/quality.json and prints the table.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _measure import RESULTS, Claim, cpu_seconds, save
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmprune
from llmprune.evaluation.perplexity import perplexity
from llmprune.repair.repair import ORDERS, repair
from llmprune.scoring.calibration import load_calibration

RATIO = {"ffn": 0.2, "head": 0.25}
IMPORTANCES = ("l1", "l2", "vector", "element1", "element2")
ACTIVATIONS = ("activation", "fluctuation", "obs")
AGGREGATIONS = ("sum", "max", "product", "last")
SEEDS = (0, 1, 2)
REFERENCE = {"stories260K": 8.84, "babyllama936K": 3.188, "story656K": 83.172}
"""element1 with one-shot repair of an independent implementation, by this protocol."""
MODES: dict[str, dict[str, Any]] = {
    "auto": {},
    "rounds": {"rounds": 4, "schedule": "cubic"},
    "sensitivity": {"allocation": "sensitivity"},
}
SAMPLES, LENGTH, SPACING = 10, 64, 192
REPAIR_SAMPLES, REPAIR_LENGTH = 64, 128
DEMO = Path(__file__).resolve().parent.parent / "demo"


@dataclass(frozen=True)
class Case:
    """A model with its calibration and evaluation texts."""

    model: Path
    calibration: str
    evaluation: str
    later: str


def cases(models: list[str], data: Path | None) -> Iterator[Case]:
    """The models to judge."""
    if data is None:
        calibration, evaluation = (DEMO / "calibration.txt").read_text(), (DEMO / "eval.txt").read_text()
        for folder in models or [str(DEMO / "model")]:
            yield Case(Path(folder), calibration, evaluation[:100_000], evaluation[-100_000:])
        return
    calibration = (data / "text/tinystories_train_head.txt").read_text()[:200_000]
    text = (data / "text/tinystories_valid_a.txt").read_text()
    evaluation, later = text[:100_000], text[150_000:250_000]
    for folder in models or sorted(str(path) for path in (data / "models").iterdir() if path.is_dir()):
        yield Case(Path(folder), calibration, evaluation, later)


def judge(case: Case) -> dict[str, Any]:
    """Perplexities of the dense model and of every pruned one."""
    tokenizer = AutoTokenizer.from_pretrained(case.model)
    dense = AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32).eval()
    train = torch.tensor(tokenizer(case.calibration, verbose=False)["input_ids"])
    valid = torch.tensor(tokenizer(case.evaluation, verbose=False)["input_ids"])
    ids = torch.stack([train[i * SPACING : i * SPACING + LENGTH] for i in range(SAMPLES)])
    window = train[-REPAIR_SAMPLES * REPAIR_LENGTH :]
    repair_ids = load_calibration(
        window[: len(window) // REPAIR_LENGTH * REPAIR_LENGTH].view(-1, REPAIR_LENGTH)
    )
    graph = llmprune.trace(dense)

    def pruned(
        importance: str, aggregation: str = "sum", seed: int = 0, order: str | None = None
    ) -> tuple[float, int]:
        model = copy.deepcopy(dense)
        data = repair_ids if importance in ACTIVATIONS else ids
        scores = llmprune.score(
            model, graph, data, importance=importance, aggregation=aggregation, seed=seed, quiet=True
        )
        plan = llmprune.plan(
            graph, scores, ratio=RATIO, allocation="uniform", protect_first=0, protect_last=0, seed=seed
        )
        weights = None if order is None else repair(model, plan, repair_ids, order=order).weights
        llmprune.compact(model, plan, weights)
        return perplexity(model, tokenizer, valid), sum(p.numel() for p in model.parameters())

    table: dict[str, Any] = {
        "parameters": {"dense": sum(p.numel() for p in dense.parameters())},
        "dense": perplexity(dense, tokenizer, valid),
    }
    for importance in IMPORTANCES:
        results = {aggregation: pruned(importance, aggregation) for aggregation in AGGREGATIONS}
        table[importance] = {aggregation: value for aggregation, (value, _) in results.items()}
        table["parameters"]["pruned"] = results["sum"][1]
    seeds = [pruned("random", seed=seed)[0] for seed in SEEDS]
    table["random"] = {"median": statistics.median(seeds), "seeds": seeds}
    for importance in ACTIVATIONS:
        repaired = pruned(importance, order="sequential")[0]
        table[importance] = {"alone": pruned(importance)[0], "repaired": repaired}
    table["repair"] = {order: pruned("element1", order=order)[0] for order in ORDERS}
    return table


def modes_of(case: Case, target: int | None) -> dict[str, Any]:
    """Perplexities and times of the modes of ``prune`` at ``target`` parameters (None: 20 % fewer)."""
    tokenizer = AutoTokenizer.from_pretrained(case.model)
    dense = AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32).eval()
    train, valid, later = (
        torch.tensor(tokenizer(text, verbose=False)["input_ids"])
        for text in (case.calibration, case.evaluation, case.later)
    )
    ids = torch.stack([train[i * SPACING : i * SPACING + LENGTH] for i in range(SAMPLES)])
    window = train[-REPAIR_SAMPLES * REPAIR_LENGTH :]
    long = window[: len(window) // REPAIR_LENGTH * REPAIR_LENGTH].view(-1, REPAIR_LENGTH)
    graph = llmprune.trace(dense)
    whole = sum(p.numel() for p in dense.parameters())
    ratio = 0.2 if target is None else 1 - target / whole

    def seconds_of(work: Callable[[], object]) -> float:
        return min(cpu_seconds(work) for _ in range(3))

    def pruning(data: torch.Tensor, **options: Any) -> float:
        return seconds_of(
            lambda: llmprune.prune(copy.deepcopy(dense), tokenizer, ratio, data, quiet=True, **options)
        )

    scoring = seconds_of(
        lambda: llmprune.score(dense, graph, ids, importance="element1", quiet=True, kinds=("head", "ffn"))
    )
    found: dict[str, Any] = {
        "dense": {
            "perplexity": perplexity(dense, tokenizer, valid),
            "later": perplexity(dense, tokenizer, later),
        },
        "element1 scores, CPU seconds": scoring,
        "prune by element1, CPU seconds": pruning(ids, importance="element1", repair="none"),
    }
    runs = {**{name: (long, options) for name, options in MODES.items()}, "16 samples": (long[:16], {})}
    for name, (data, options) in runs.items():
        model = copy.deepcopy(dense)
        report = llmprune.prune(model, tokenizer, ratio, data, quiet=True, verify=False, **options)
        found[name] = {
            "parameters": report.after.parameters,
            "perplexity": perplexity(model, tokenizer, valid),
            "later": perplexity(model, tokenizer, later),
            "seconds": {stage.name: round(stage.seconds, 3) for stage in report.stages},
        }
        if name == "16 samples":  # as many as prune takes of a text by itself
            found[name]["CPU seconds"] = pruning(data)

            def stages(data: torch.Tensor = data) -> None:
                scores = llmprune.score(
                    dense, graph, data, importance="obs", quiet=True, kinds=("head", "ffn")
                )
                repair(dense, llmprune.plan(graph, scores, ratio), load_calibration(data))

            found[name]["over element1 scores"] = seconds_of(stages) / scoring
    return found


def show(name: str, table: dict[str, Any]) -> None:
    """Print one model's table."""
    before, after = table["parameters"]["dense"], table["parameters"]["pruned"]
    print(f"\n{name}: {before:,} parameters, {after:,} after; perplexity {table['dense']:.2f} dense")
    print(f"{'':10s}" + "".join(f"{aggregation:>10s}" for aggregation in AGGREGATIONS))
    for importance in IMPORTANCES:
        values = table[importance]
        print(f"{importance:10s}" + "".join(f"{values[aggregation]:10.2f}" for aggregation in AGGREGATIONS))
    repaired = ", ".join(f"{value:.2f} {order}" for order, value in table["repair"].items())
    print(f"element1 with least-squares repair: {repaired}")
    for importance in ACTIVATIONS:
        print(
            f"{importance:12s}{table[importance]['alone']:8.2f}{table[importance]['repaired']:8.2f} repaired"
        )
    seeds = ", ".join(f"{value:.2f}" for value in table["random"]["seeds"])
    print(f"{'random':10s}{table['random']['median']:10.2f}   (seeds {seeds})")


def claims_of(name: str, modes: dict[str, Any]) -> list[Claim]:
    """What the modes of ``prune`` must hold."""
    for mode in (*MODES, "16 samples"):
        print(
            f"{name:16s}{mode:14s}{modes[mode]['perplexity']:8.2f}{modes[mode]['later']:8.2f} on a later text"
        )
    claims = [
        Claim(
            f"{name}: prune's own choice over prune by element1 alone, CPU time",
            modes["16 samples"]["CPU seconds"] / modes["prune by element1, CPU seconds"],
            5.0,
        )
    ]
    if name in REFERENCE:
        claims.append(
            Claim(
                f"{name}: prune's own choice over the reference",
                modes["auto"]["perplexity"] / REFERENCE[name],
                0.9,
            )
        )
    return claims


def _best(args: argparse.Namespace, name_of: str) -> int:
    """The modes of ``prune`` alone, put into the tables there are."""
    path = RESULTS / f"{name_of}.json"
    old = json.loads(path.read_text()) if path.is_file() else {"tables": {}, "claims": []}
    claims = []
    for case in cases(args.model, None if args.data is None else Path(args.data)):
        name = "demo" if case.model == DEMO / "model" else case.model.name
        table = old["tables"].setdefault(name, {})
        table["best"] = modes_of(case, table.get("parameters", {}).get("pruned"))
        claims += claims_of(name, table["best"])
    texts = {claim.text for claim in claims}
    kept = [
        Claim(c["text"], c["figure"], c["bound"], c["at_least"])
        for c in old["claims"]
        if c["text"] not in texts
    ]
    save(name_of, [*kept, *claims], ratio=RATIO, tables=old["tables"])
    for claim in claims:
        print(claim)
    return 0 if all(claim.holds for claim in claims) else 1


def main() -> int:
    """Run, print, write the result; exit status 1 when a claim fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="*")
    parser.add_argument("--data", type=Path, default=os.environ.get("LLMPRUNE_DATA"))
    parser.add_argument(
        "--best", action="store_true", help="only the modes of prune, into the tables there are"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    claims: list[Claim] = []
    tables: dict[str, Any] = {}
    name_of = "quality" if args.data is None else "quality_tinystories"
    if args.best:
        return _best(args, name_of)
    for case in cases(args.model, None if args.data is None else Path(args.data)):
        start = time.perf_counter()
        name = "demo" if case.model == DEMO / "model" else case.model.name
        tables[name] = table = judge(case)
        table["seconds"] = round(time.perf_counter() - start, 1)
        table["best"] = modes_of(case, table["parameters"]["pruned"])
        claims += claims_of(name, table["best"])
        show(name, table)
        claims.append(
            Claim(f"{name}: element1 over random", table["element1"]["sum"] / table["random"]["median"], 1.0)
        )
        claims.append(Claim(f"{name}: element1 over l2", table["element1"]["sum"] / table["l2"]["sum"], 1.0))
        best = table["obs"]["repaired"] / table["repair"]["one-shot"]
        claims.append(Claim(f"{name}: obs repaired over element1 repaired one-shot", best, 1.0))
        claims.append(
            Claim(
                f"{name}: element1 repaired over element1",
                table["repair"]["sequential"] / table["element1"]["sum"],
                1.0,
            )
        )
    path = save(name_of, claims, ratio=RATIO, tables=tables)
    print(f"\n{path}")
    for claim in claims:
        print(claim)
    return 0 if all(claim.holds for claim in claims) else 1


if __name__ == "__main__":
    sys.exit(main())
