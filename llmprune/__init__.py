"""Structured pruning for any PyTorch model: trace, score, plan, compact, verify, save.

    graph  = llmprune.trace(model)
    scores = llmprune.score(model, graph, calibration)
    plan   = llmprune.plan(graph, scores, ratio=0.2)
    llmprune.compact(model, plan)
    llmprune.save_pretrained(model, "smaller")

or all of it with ``llmprune.prune(model, ...)``. Nothing is imported before it is used: ``import llmprune`` loads
neither torch nor transformers and never touches a GPU.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmprune import errors
    from llmprune.checkpoints.checkpoint import from_pretrained, save_pretrained
    from llmprune.compaction.compact import compact
    from llmprune.compaction.verify import Verification, verify
    from llmprune.evaluation.evaluate import Evaluation, evaluate
    from llmprune.machine.doctor import doctor
    from llmprune.out_of_core.apply import apply
    from llmprune.out_of_core.scattered import gather
    from llmprune.out_of_core.stored import open_model
    from llmprune.pipeline.prune import Report, prune
    from llmprune.planning.plan import Plan, plan
    from llmprune.planning.request import measure_request
    from llmprune.planning.search import search
    from llmprune.planning.sensitivity import sensitivity
    from llmprune.recovery.recover import Recovery, recover
    from llmprune.scoring.ranks import Ranks
    from llmprune.scoring.score import score
    from llmprune.scoring.scores import Scores
    from llmprune.tracing.graph import Axis, Graph, Member
    from llmprune.tracing.rules import Registration, register_rule
    from llmprune.tracing.trace import trace

__version__ = "0.1.0"

__all__ = [
    "Axis",
    "Evaluation",
    "Graph",
    "Member",
    "Plan",
    "Ranks",
    "Recovery",
    "Registration",
    "Report",
    "Scores",
    "Verification",
    "__version__",
    "apply",
    "compact",
    "doctor",
    "errors",
    "evaluate",
    "from_pretrained",
    "gather",
    "measure_request",
    "open_model",
    "plan",
    "prune",
    "recover",
    "register_rule",
    "save_pretrained",
    "score",
    "search",
    "sensitivity",
    "trace",
    "verify",
]

_HOME = {
    "Axis": "tracing.graph",
    "Evaluation": "evaluation.evaluate",
    "Graph": "tracing.graph",
    "Member": "tracing.graph",
    "Plan": "planning.plan",
    "Recovery": "recovery.recover",
    "Ranks": "scoring.ranks",
    "Registration": "tracing.rules",
    "Report": "pipeline.prune",
    "Scores": "scoring.scores",
    "Verification": "compaction.verify",
    "apply": "out_of_core.apply",
    "compact": "compaction.compact",
    "doctor": "machine.doctor",
    "evaluate": "evaluation.evaluate",
    "gather": "out_of_core.scattered",
    "from_pretrained": "checkpoints.checkpoint",
    "measure_request": "planning.request",
    "open_model": "out_of_core.stored",
    "plan": "planning.plan",
    "prune": "pipeline.prune",
    "recover": "recovery.recover",
    "register_rule": "tracing.rules",
    "save_pretrained": "checkpoints.checkpoint",
    "score": "scoring.score",
    "search": "planning.search",
    "sensitivity": "planning.sensitivity",
    "trace": "tracing.trace",
    "verify": "compaction.verify",
}
"""Public name -> the module it lives in, below this package."""


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("llmprune.errors")
    if name in _HOME:
        return getattr(import_module(f"llmprune.{_HOME[name]}"), name)
    raise AttributeError(f"module 'llmprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
