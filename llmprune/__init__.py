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

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmprune import errors
    from llmprune.apply import apply
    from llmprune.checkpoint import from_pretrained, save_pretrained
    from llmprune.compact import compact
    from llmprune.doctor import doctor
    from llmprune.evaluate import Evaluation, evaluate
    from llmprune.graph import Axis, Graph, Member
    from llmprune.plan import Plan, plan
    from llmprune.prune import Report, prune
    from llmprune.ranks import Ranks
    from llmprune.recover import Recovery, recover
    from llmprune.request import measure_request
    from llmprune.rules import Registration, register_rule
    from llmprune.score import Scores, score
    from llmprune.search import search
    from llmprune.sensitivity import sensitivity
    from llmprune.stored import open_model
    from llmprune.trace import trace
    from llmprune.verify import Verification, verify

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
    "Axis": "graph",
    "Evaluation": "evaluate",
    "Graph": "graph",
    "Member": "graph",
    "Plan": "plan",
    "Recovery": "recover",
    "Ranks": "ranks",
    "Registration": "rules",
    "Report": "prune",
    "Scores": "score",
    "Verification": "verify",
    "apply": "apply",
    "compact": "compact",
    "doctor": "doctor",
    "evaluate": "evaluate",
    "from_pretrained": "checkpoint",
    "measure_request": "request",
    "open_model": "stored",
    "plan": "plan",
    "prune": "prune",
    "recover": "recover",
    "register_rule": "rules",
    "save_pretrained": "checkpoint",
    "score": "score",
    "search": "search",
    "sensitivity": "sensitivity",
    "trace": "trace",
    "verify": "verify",
}
"""Public name -> the submodule it lives in."""


def _public(name: str, home: str) -> property:
    """A module attribute that is imported when it is first read."""

    def read(package: ModuleType) -> Any:
        return getattr(import_module(f"{package.__name__}.{home}"), name)

    def assign(package: ModuleType, value: object) -> None:
        # The import system announces each submodule to its package. `llmprune.trace` stays the function all the same;
        # the submodule is reached by `from llmprune.trace import ...`.
        if not isinstance(value, ModuleType):
            raise AttributeError(f"{package.__name__}.{name} cannot be replaced")

    return property(read, assign, doc=f"See llmprune/{home}.py.")


class _Package(ModuleType):
    """The package's own type: its public names are properties, so that they win over submodules of the same name."""

    def __getattr__(self, name: str) -> Any:
        if name == "errors":
            return import_module(f"{self.__name__}.errors")
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


for _name, _home in _HOME.items():
    setattr(_Package, _name, _public(_name, _home))

sys.modules[__name__].__class__ = _Package
