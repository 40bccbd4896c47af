"""Tables for people: what a pruning did, and what axes a model has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmprune.planning.apart import cut_alike

if TYPE_CHECKING:
    from llmprune.evaluation.evaluate import Evaluation
    from llmprune.pipeline.prune import Report
    from llmprune.recovery.recover import Recovery


def table(rows: Sequence[Sequence[str]], indent: str = "") -> str:
    """Rows as aligned columns: the first to the left, the others to the right; the first row is the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        lines.append((indent + "  ".join(cells)).rstrip())
    lines.insert(1, indent + "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(lines)


def quantity(value: float) -> str:
    """A count with a decimal prefix: 1.35 M."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.2f} {unit}"
    return f"{value:.0f}"


def memory(value: float) -> str:
    """Bytes with a binary prefix: 3.1 MiB."""
    for power, suffix in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if value >= 1024**power:
            return f"{value / 1024**power:.1f} {suffix}"
    return f"{value:.0f} B"


def _change(before: float, after: float) -> str:
    return f"{after / before - 1:+.1%}" if before else ""


def _ways(report: Report) -> str:
    """How the groups were scored and the budget shared out."""
    from llmprune.scoring.importance import lookup

    ways = [report.aggregation] if lookup(report.importance).sort == "weights" else []
    if report.plan.options.get("allocation") and not isinstance(report.ratio, dict):
        ways.append(f"{report.plan.options['allocation']} allocation")
    return f"{report.importance} ({', '.join(ways)})" if ways else report.importance


def render(report: Report) -> str:
    """The closing table of a pruning."""
    before, after = report.before, report.after
    rows = [
        ["", "before", "after", "change"],
        [
            "parameters",
            f"{before.parameters:,}",
            f"{after.parameters:,}",
            _change(before.parameters, after.parameters),
        ],
        ["MACs per token", quantity(before.macs), quantity(after.macs), _change(before.macs, after.macs)],
        ["size", memory(before.bytes), memory(after.bytes), _change(before.bytes, after.bytes)],
    ]
    if report.target is not None and report.target["kind"] == "memory" and report.target["context"]:
        whole, left = report.target["before"], report.target["reached"]
        rows.append(["size with cache", memory(whole), memory(left), _change(whole, left)])
    rows += _latency_rows(report)
    if report.perplexity is not None:
        dense, pruned = report.perplexity
        rows.append(["perplexity", f"{dense:.2f}", f"{pruned:.2f}", _change(dense, pruned)])
    kinds: dict[str, list[int]] = {}
    for summary in report.plan.axes.values():
        counts = kinds.setdefault(summary["kind"], [0, 0, 0])
        for i, value in enumerate((1, summary["size"], summary["removed"])):
            counts[i] += value
    groups = [["groups", "axes", "of", "removed", "share"]]
    groups += [
        [kind, str(n), str(size), str(gone), f"{gone / size:.1%}"] for kind, (n, size, gone) in kinds.items()
    ]
    stages = [["stage", "seconds", "peak memory"]]
    stages += [[stage.name, f"{stage.seconds:.2f}", memory(stage.peak)] for stage in report.stages]
    parts = [
        f"{report.model} pruned by {_ways(report)}: {report.removed:.2%} of its parameters "
        f"removed, {_asked(report)} asked",
        table(rows),
        table(groups),
        table(stages),
    ]
    if report.generation is not None:
        prompt, first, last = report.generation
        parts.append(f"before: {prompt}{first}\nafter:  {prompt}{last}")
    verified = "not verified" if report.verification is None else f"verified: {report.verification}"
    closing = [
        *report.notes,
        *unknown(report.unknown_operations),
        *([] if report.repair is None else [str(report.repair)]),
        *(
            [f"more text: {report.repair.warning}"]
            if report.repair is not None and report.repair.warning
            else []
        ),
        *_latency_notes(report),
        verified,
    ]
    if report.output is not None:
        closing.append(f"checkpoint: {report.output} ({report.form} form)")
        if report.reason:
            closing.append(f"not in stock form: {report.reason}")
    parts.append("\n".join(closing))
    return "\n\n".join(parts)


def unknown(operations: Mapping[str, int]) -> list[str]:
    """What to say of operations without a rule: nothing, or one line."""
    if not operations:
        return []
    names = ", ".join(f"{name} ({count})" if count > 1 else name for name, count in operations.items())
    total = sum(operations.values())
    return [
        f"{total} operation{'s' if total > 1 else ''} without a rule froze what they touch: {names}; "
        "llmprune.register_rule gives them one"
    ]


def _latency_rows(report: Report) -> list[list[str]]:
    """Measured times, by the wall's clock."""
    if report.latency is None:
        return []
    before, after = report.latency
    pairs = [(f"prompt of {before.context}", before.prefill, after.prefill)]
    if before.decode is not None and after.decode is not None:
        pairs.append(("step", before.decode, after.decode))
    return [[name, str(old), str(new), _change(old.median, new.median)] for name, old, new in pairs]


def _latency_notes(report: Report) -> list[str]:
    """The prediction beside what was measured, and whether the machine was quiet enough for it."""
    if report.latency is None or report.target is None:
        return []
    before, after = report.latency
    foreseen = report.target["reached"] / report.target["before"]
    steps = f" and {before.new_tokens} steps" if before.decode is not None else ""
    lines = [
        f"latency of {before.batch} x {before.context} tokens{steps}: foreseen {foreseen:.3f}x, measured "
        f"{after.seconds / before.seconds:.3f}x (processor time {before.seconds * 1e3:.4g} ms -> "
        f"{after.seconds * 1e3:.4g} ms)"
    ]
    if before.noisy or after.noisy:
        spread = max(one.spread for r in (before, after) for one in (r.prefill, r.decode) if one is not None)
        lines.append(
            f"warning: the machine is noisy (times spread over {spread:.0%} of their median): trust these times "
            "only after another measurement on a quiet one"
        )
    return lines


def _asked(report: Report) -> str:
    if report.target is not None:
        return f"{report.target['kind']} {report.target['asked']}"
    if isinstance(report.ratio, dict):
        return ", ".join(f"{share:.0%} of {kind}" for kind, share in report.ratio.items())
    return f"{report.ratio:.2%}"


def axes_summary(graph: Any) -> list[dict[str, Any]]:
    """Per kind of prunable axis: how many, their sizes, how many are marked, and the share of parameters they reach."""
    total = graph.numel({})
    out: dict[str, dict[str, Any]] = {}
    for axis in graph.axes:
        if not axis.prunable:
            continue
        entry = out.setdefault(
            axis.kind, {"kind": axis.kind, "axes": 0, "groups": 0, "sizes": [], "marked": 0, "parameters": 0}
        )
        entry["axes"] += 1
        entry["groups"] += axis.size
        entry["marked"] += bool(axis.marks)
        entry["sizes"] = sorted({*entry["sizes"], axis.size})
        if axis.size > 1:
            entry["parameters"] += (total - graph.numel({axis.id: 1})) * axis.size
    for kind in dict.fromkeys(stack.kind for stack in graph.stacks):
        stacks = [stack for stack in graph.stacks if stack.prunable and stack.kind == kind]
        if not stacks:
            continue
        free = {s.id: [i for i in range(s.size) if i not in s.pinned] for s in stacks}
        out[kind] = {
            "kind": kind,
            "axes": len(stacks),
            "groups": sum(map(len, free.values())),
            "sizes": sorted({stack.size for stack in stacks}),
            "marked": 0,
            "parameters": total
            - graph.numel({}, [drop for stack in stacks for drop in stack.drops(free[stack.id])]),
        }
    return list(out.values())


def render_axes(graph: Any, frozen: bool) -> str:
    """The table of ``llmprune trace``."""
    total = graph.numel({})
    rows = [["kind", "axes", "groups", "sizes", "marked", "parameters"]]
    for entry in axes_summary(graph):
        sizes = entry["sizes"]
        span = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]}-{sizes[-1]}"
        share = f"{entry['parameters'] / total:.1%}"
        rows.append(
            [entry["kind"], str(entry["axes"]), str(entry["groups"]), span, str(entry["marked"]), share]
        )
    fixed = [axis for axis in graph.axes if not axis.prunable]
    pinned = [stack for stack in graph.stacks if stack.pinned]
    lines = [
        table(rows),
        f"{total:,} parameters; frozen axes: {len(fixed)}{'' if frozen else ' (--frozen lists them)'}",
    ]
    if frozen:
        for axis in fixed:
            place = f" in {axis.members[0].parameter}" if axis.members else ""
            lines.append(f"  axis {axis.id}, size {axis.size}{place}: {'; '.join(axis.reasons)}")
        lines += [f"  {reason}" for reason in cut_alike(graph).values()]
        lines += [
            f"  {stack.kind} of {stack.module} (axis {stack.id}): {'; '.join(stack.reasons)}"
            for stack in pinned
        ]
    lines += [f"note: {note}" for note in (*unknown(graph.unknown_operations), *graph.tape.notes)]
    return "\n".join(lines)


def render_evaluation(result: Evaluation) -> str:
    """The tables of ``llmprune evaluate``."""
    rows = [["what", "figure"], ["parameters", f"{result.parameters:,}"]]
    if result.macs is not None:
        rows.append(["MACs per token", quantity(result.macs)])
    rows.append(["weights", memory(result.memory["weights"])])
    if result.latency is not None:
        rows.append(["KV cache per token", memory(result.memory["kv_cache_per_token"])])
        rows.append(["peak memory", memory(result.memory["peak"])])
        prefill, decode = result.latency["prefill"], result.latency["decode"]
        rows.append([f"prefill of {result.latency['prompt']} tokens", _timing(prefill)])
        if decode is not None:
            rows.append(["decode of a token", _timing(decode)])
    parts = [f"{result.model}", table(rows)]
    if result.texts:
        scores = [["text", "perplexity", "bits/character", "tokens", "window", "stride"]]
        scores += [
            [
                name,
                f"{score['perplexity']:.4g}",
                f"{score['bits_per_character']:.4g}",
                f"{score['tokens']:,}",
                str(score["window"]),
                str(score["stride"]),
            ]
            for name, score in result.texts.items()
        ]
        parts.append(table(scores))
    if result.tasks:
        figures = [["task", "metric", "value", "error", "averaged"]]
        for task, metrics in result.tasks.items():
            figures += [
                [
                    task,
                    metric,
                    f"{value:.4f}",
                    f"{metrics.get(metric + '_stderr', float('nan')):.4f}",
                    "*" if result.chosen.get(task) == metric else "",
                ]
                for metric, value in metrics.items()
                if isinstance(value, float) and not metric.endswith("_stderr")
            ]
        if result.average is not None:
            figures.append(["average", "", f"{result.average:.4f}", "", "*"])
        parts.append(table(figures))
    for sample in result.generation:
        lines = [f"prompt: {sample['prompt']}", f"text:   {sample['text']}"]
        if "beside" in sample:
            lines.append(f"beside: {sample['beside']}")
        parts.append("\n".join(lines))
    if result.notes:
        parts.append("\n".join(result.notes))
    return "\n\n".join(parts)


def _timing(timing: Mapping[str, Any]) -> str:
    low, high = timing["quartiles"]
    return (
        f"{timing['median'] * 1e3:.3g} ms ({low * 1e3:.3g} to {high * 1e3:.3g}), "
        f"{timing['tokens_per_second']:,.0f} tokens/s"
    )


def render_recovery(result: Recovery) -> str:
    """The table of ``llmprune recover``."""
    rows = [["step", "loss", "validation loss", "validation perplexity"]]
    for entry in result.curve:
        if "validation_loss" in entry:
            value = entry["validation_loss"]
            loss = next((e["loss"] for e in result.curve if e["step"] == entry["step"] and "loss" in e), None)
            perplexity = f"{math.exp(value):.4g}" if value < 700 else "inf"
            mark = " *" if entry["step"] == result.best_step else ""
            rows.append(
                [f"{entry['step']}{mark}", "" if loss is None else f"{loss:.4f}", f"{value:.4f}", perplexity]
            )
    data = result.data
    parts = [
        f"{result.method}: {result.trained:,} parameters in {len(result.targets) or 'all'} modules, {result.steps} "
        f"steps of {result.settings['batch_size']} out of {data['train']:,} examples "
        f"({data['validation']:,} for validation)"
    ]
    if len(rows) > 1:
        parts.append(table(rows))
    closing = [f"state of step {result.best_step} was taken", *result.notes]
    if result.output is not None:
        closing.append(f"checkpoint: {result.output} ({result.form} form)")
    parts.append("\n".join(closing))
    return "\n\n".join(parts)
