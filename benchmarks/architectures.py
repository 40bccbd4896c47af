"""Every architecture transformers ships, tiny and random: what is prunable, is it equal, who loads it again.

    python benchmarks/architectures.py [--only NAME ...] [--sample N] [--jobs N] [--attention sdpa]

Each recipe of ``tiny`` runs in a process of its own with a time limit, so that a crash or a hang is a row with its
reason. Rows are kept in ``build/architectures`` and used again as long as no source of llmprune and no recipe changed
(``--again`` runs all). A whole run writes ``docs/architectures.md`` and ``results/architectures.json``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import random
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from _measure import Claim, save
from _reload import JOBS, TOLERANCE, answer_all
from tiny import TASKS, Recipe, recipes

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "architectures"
PAGE = ROOT / "docs" / "architectures.md"
TIME_LIMIT = 420
"""Seconds for one architecture."""
RELOAD_LIMIT = 240
"""Seconds for loading the folders of one architecture again."""
WANTED = 120
"""Classes to try at least."""

FORKS = multiprocessing.get_context("forkserver")
"""A server that imported the framework once, and never llmprune; it forks for each recipe, and again to load what that
one saved."""
FORKS.set_forkserver_preload(
    ["transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto", "torch._dynamo"]
)


def sources() -> str:
    """Identifies everything rows depend on, but for the recipes."""
    digest = hashlib.sha256()
    files = [*ROOT.glob("llmprune/*.py"), *ROOT.glob("csrc/**/*.[ch]"), ROOT / "benchmarks/tiny/recipe.py",
             *(ROOT / "benchmarks" / name for name in ("_architecture.py", "_reload.py"))]  # fmt: skip
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def examine(
    recipe: Recipe, attention: str, folder: Path, file: Path | None = None, quick: bool = False
) -> dict[str, Any]:
    """The row of one recipe, made in this process; written to ``file`` whenever it grows.

    Its checkpoints are left below ``folder``, to be loaded by a process that never sees llmprune; none with ``quick``.
    """
    import torch
    import transformers
    from _architecture import Examination, one_thread

    transformers.logging.set_verbosity_error()
    row: dict[str, Any] = {
        "name": recipe.name, "class": recipe.model, "task": recipe.task, "attention": attention, "failures": []
    }  # fmt: skip

    def tell() -> None:
        if file is not None:
            file.write_text(json.dumps(row))

    with warnings.catch_warnings(), one_thread(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        Examination(recipe, attention, row, tell, folder).run(quick)
    tell()
    return row


def one(name: str, attention: str, folder: str, file: str, quick: bool) -> None:
    """One recipe, in a process of its own."""
    examine(recipes()[name], attention, Path(folder), Path(file), quick)


def forked(target: Callable[..., None], arguments: tuple[Any, ...], limit: float) -> str:
    """Run a function in a fork of the server; what went wrong, if anything did."""
    process = FORKS.Process(target=target, args=arguments)
    process.start()
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
        return f"no end after {limit:.0f} s"
    return f"the process ended with status {process.exitcode}" if process.exitcode else ""


def reload(row: dict[str, Any], folder: Path) -> None:
    """Load every folder that an examination left, in a process without llmprune, and add to the row what came of it."""
    answers = folder / "answers.json"
    start = time.perf_counter()
    trouble = forked(answer_all, (str(folder / JOBS), str(answers)), RELOAD_LIMIT)
    row["seconds"]["reload"] = round(time.perf_counter() - start, 2)
    row["reload"] = json.loads(answers.read_text(encoding="utf-8")) if answers.exists() else {}
    if trouble:
        row["failures"].append(f"reload: {trouble}")
    row["failures"] += [
        f"reload of {name}: {said}" for name, said in row["reload"].items() if not _small(said)
    ]


def _small(answer: str) -> bool:
    try:
        return float(answer) <= TOLERANCE
    except ValueError:
        return False


def apart(recipe: Recipe, args: argparse.Namespace, known: str) -> dict[str, Any]:
    """The row of one recipe from a process of its own, or from the last run."""
    CACHE.mkdir(parents=True, exist_ok=True)
    attention, limit = args.attention, args.limit
    file = CACHE / f"{recipe.name}.{attention}{'.quick' if args.quick else ''}.json"
    if file.exists() and not args.again:
        row: dict[str, Any] = json.loads(file.read_text())
        if row.get("sources") == known:
            return row
    file.unlink(missing_ok=True)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trouble = forked(one, (recipe.name, attention, folder, str(file), args.quick), limit)
        row = {
            "name": recipe.name,
            "class": recipe.model,
            "task": recipe.task,
            "attention": attention,
            "failures": [],
        }
        if file.exists():
            row = json.loads(file.read_text())
        if trouble:
            row["failures"].append(f"{row.get('stage', 'start')}: {trouble}")
        elif (Path(folder) / JOBS).exists():
            reload(row, Path(folder))
        row.setdefault("seconds", {})["total"] = round(time.perf_counter() - start, 2)
    row["sources"] = known
    file.write_text(json.dumps(row))
    return row


def sampled(found: Sequence[Recipe], count: int) -> list[Recipe]:
    """The same ``count`` recipes each time, every task among them where there are enough."""
    shuffled = random.Random(0).sample(sorted(found, key=lambda recipe: recipe.name), len(found))
    turns: dict[str, int] = Counter()
    order = {}
    for recipe in shuffled:
        order[recipe.name] = turns[recipe.task]
        turns[recipe.task] += 1
    chosen = sorted(shuffled, key=lambda r: (order[r.name], TASKS.index(r.task)))[:count]
    return [recipe for recipe in found if recipe in chosen]


# The page ----------------------------------------------------------------------------------------------------------

ORDER = (
    "head",
    "query",
    "ffn",
    "expert",
    "channel",
    "head_dim",
    "value_dim",
    "rank",
    "state",
    "layer",
    "other",
)


def _axes(row: dict[str, Any]) -> str:
    axes = row.get("axes", {})
    return ", ".join(f"{kind} {axes[kind]}" for kind in ORDER if kind in axes) or "-"


def _equality(row: dict[str, Any]) -> str:
    tally = row.get("equality")
    if tally is None:
        return "-"
    return f"{tally['equal']}/{tally['of']}, {tally['worst']:.0e}"


def _stock(row: dict[str, Any]) -> str:
    if "stock" not in row:
        return "-"
    return ", ".join(kind for kind in ORDER if row["stock"].get(kind) == "yes") or "none"


def page(rows: Sequence[dict[str, Any]]) -> str:
    """docs/architectures.md."""
    import torch
    import transformers

    good = [row for row in rows if not row["failures"]]
    axes = Counter[str]()
    for row in rows:
        axes.update(row.get("axes", {}))
    equal = sum(row["equality"]["equal"] for row in rows if "equality" in row)
    of = sum(row["equality"]["of"] for row in rows if "equality" in row)
    classes = len({row["class"] for row in rows})
    lines = [
        "# Architectures",
        "",
        "<!-- Generated by benchmarks/architectures.py (make architectures); do not edit. -->",
        "",
        f"{classes} model classes of transformers {transformers.__version__} (torch "
        f"{torch.__version__.split('+')[0]}), each tiny, random, in float64, were traced with nobody naming a layer. "
        "Every prunable axis then lost one or two random indices, and the "
        "compacted model was compared with the original in which exactly these slices are zero (where an operation "
        "normalises over them, with the reference that masks them).",
        "",
        f"- {len(good)} of {len(rows)} rows passed everything; {equal} of {of} prunable axes are equal to their "
        "reference.",
        f"- prunable axes by kind: {', '.join(f'{kind} {axes[kind]}' for kind in ORDER if axes[kind])}.",
        "- *equality*: equal axes of all prunable ones, and the largest error relative to the largest output.",
        "- *stock kinds*: which of head, query, ffn, expert and channel, removed alone in equal numbers, save as a "
        "checkpoint the stock class loads; a dash where saving was not tried.",
        "- *universal*: largest relative error of the universal form, reloaded in a process without llmprune.",
        "- a dash: not tried in this run, or the row failed before.",
        "- *seconds*: of the trace, and of all checks together, on one thread of a shared machine.",
        "",
    ]  # fmt: skip
    for task in TASKS:
        here = [row for row in rows if row["task"] == task]
        if not here:
            continue
        head = (
            "architecture",
            "class",
            "ops",
            "prunable axes",
            "equality",
            "stock kinds",
            "universal",
            "seconds",
        )
        lines += [f"## {task}", "", f"| {' | '.join(head)} |", "|---|---|---:|---|---|---|---|---:|"]
        for row in here:
            unknown = sum(row.get("unknown", {}).values())
            ops = f"{row.get('ops', '-')}" + (f" ({unknown} unknown)" if unknown else "")
            seconds = row.get("seconds", {})
            cells = (
                row["name"] + (" (failed)" if row["failures"] else ""), row["class"], ops, _axes(row), _equality(row),
                _stock(row), row.get("reload", {}).get("universal", "-"),
                f"{seconds.get('trace', '-')} / {seconds.get('total', '-')}",
            )  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    lines += ["## Failures", ""]
    for row in rows:
        lines += [f"- **{row['name']}** ({row['class']}): {_plain(reason)}" for reason in row["failures"]]
    if len(good) == len(rows):
        lines.append("None.")
    lines += ["", "## Heads and FFN channels that stay, and why", ""]
    lines += [f"- {row['name']}: {_plain(reason)}" for row in rows for reason in _kept_back(row)] or ["None."]
    lines += ["", "## Notes", ""]
    notes = [(row["name"], note) for row in rows for note in [*row.get("notes", []), *_unknown(row)]]
    lines += [f"- {name}: {_plain(note)}" for name, note in notes] or ["None."]
    return "\n".join(lines) + "\n"


def _kept_back(row: dict[str, Any]) -> list[str]:
    """The first frozen head axis of an architecture without a prunable one; likewise of FFN channels."""
    found = []
    for kind in ("head", "ffn"):
        frozen = [text for text in row.get("frozen", []) if text.startswith(f"{kind}(")]
        if frozen and kind not in row.get("axes", {}):
            found.append(frozen[0])
    return found


def _unknown(row: dict[str, Any]) -> list[str]:
    return [f"no rule for {op} (met {count} times)" for op, count in row.get("unknown", {}).items()]


def _plain(text: str) -> str:
    """A reason as Markdown shows it."""
    return text.replace("<", "\\<").replace("|", "\\|").replace("*", "\\*").replace("_", "\\_")


def line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    unknown = " ".join(row.get("unknown", {}))
    state = "FAIL" if row["failures"] else "ok"
    return (
        f"{state:5s}{row['name']:26s}{row.get('ops', 0):6d} ops  {_equality(row):14s} {_axes(row)} | "
        f"stock {_stock(row)} | {row.get('reload', {}).get('universal', '-')} | "
        f"{row.get('seconds', {}).get('total', 0)} s {unknown}"
        + "".join(f"\n       {reason}" for reason in row["failures"])
    )


def kept(recipe: Recipe, attention: str) -> dict[str, Any] | None:
    """The row of an earlier run, whatever changed since: with checkpoints, or a quick one."""
    for name in (f"{recipe.name}.{attention}.json", f"{recipe.name}.{attention}.quick.json"):
        if (CACHE / name).exists():
            row: dict[str, Any] = json.loads((CACHE / name).read_text())
            return row
    return None


def publish(rows: Sequence[dict[str, Any]]) -> None:
    """Write the page and the results."""
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(rows), encoding="utf-8")
    worst = max((row["equality"]["worst"] for row in rows if "equality" in row), default=0.0)
    claims = [
        Claim("model classes tried", len({row["class"] for row in rows}), WANTED, at_least=True),
        Claim("largest relative difference from the reference, float64", worst, 1e-5),
    ]
    save("architectures", claims, rows=rows)
    print(*claims, sep="\n")


def main() -> int:
    """Run, print, write; exit status 1 when a row failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[], help="these recipes")
    parser.add_argument("--sample", type=int, metavar="N", help="the same N recipes each time")
    parser.add_argument("--jobs", type=int, default=1, help="how many at once")
    parser.add_argument("--attention", default="eager", choices=("eager", "sdpa"))
    parser.add_argument(
        "--quick", action="store_true", help="equality only, no checkpoints; the page is not written"
    )
    parser.add_argument("--again", action="store_true", help="do not use rows of earlier runs")
    parser.add_argument(
        "--page", action="store_true", help="run nothing: write the page of the rows there are"
    )
    parser.add_argument("--limit", type=float, default=TIME_LIMIT, help="seconds for one recipe")
    args = parser.parse_args()
    found = recipes()
    if unknown := [name for name in args.only if name not in found]:
        parser.error(f"no recipe is called {', '.join(unknown)}")
    chosen = [found[name] for name in args.only] or list(found.values())
    if args.sample:
        chosen = sampled(chosen, args.sample)
    if args.page:
        publish([row for recipe in chosen if (row := kept(recipe, args.attention)) is not None])
        return 0
    known, lock = sources(), threading.Lock()

    def work(recipe: Recipe) -> dict[str, Any]:
        row = apart(recipe, args, known)
        with lock:
            print(line(row), flush=True)
        return row

    with ThreadPoolExecutor(args.jobs) as pool:
        rows = list(pool.map(work, chosen))
    good = sum(not row["failures"] for row in rows)
    print(f"{good} of {len(rows)} passed")
    if len(chosen) == len(found) and args.attention == "eager" and not args.quick:
        publish(rows)
    return 0 if good == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
