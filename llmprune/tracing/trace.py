"""Trace a model: one recorded forward pass, and from it the graph of what can be pruned together."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from llmprune.compaction.norms import find_norms
from llmprune.errors import InputError, TraceError
from llmprune.planning.footprint import footprint_of
from llmprune.tracing.blocks import Excerpt, find_excerpt
from llmprune.tracing.borrow import no_collection
from llmprune.tracing.graph import Graph
from llmprune.tracing.inputs import example_inputs
from llmprune.tracing.recording import Recording, Setup
from llmprune.tracing.tape import Tape, leaves
from llmprune.tracing.trial import Trial, freeze_as_in, freeze_failures, unclosable
from llmprune.tracing.wrapped import check_unpacked, on_uncompiled

log = logging.getLogger(__name__)

OTHER_FORM = {"sdpa": "eager", "eager": "sdpa"}
"""The form of attention to look at besides a model's own: the two read different attributes of the same modules."""


@on_uncompiled
def trace(model: nn.Module, inputs: Any = None, *, cache: bool = False) -> Graph:
    """Find out which slices of which tensors of ``model`` live and die together.

    Runs the forward pass once, on the meta device where that will do, and changes nothing about the model.

    Args:
        model: any module whose forward pass is made of torch operations; on any device, meta included. Compiled parts
            run eagerly, hooks that are not torch's own are left out.
        inputs: keyword arguments for ``model.forward`` (tensors of any device); None: made from the model's config.
        cache: whether to look at what the model keeps while generating as well (:mod:`llmprune.planning.footprint`),
            which a target of memory with a context needs; three more recordings.

    Raises:
        TraceError: the model cannot be traced; says at which operation, module and line.
        InputError: the inputs do not fit, or none could be made; or the weights are packed.
    """
    from llmprune.out_of_core.scattered import is_in_pieces, within_reach

    if is_in_pieces(model):
        model = within_reach(model)
    keywords = bind_inputs(model, inputs)
    with no_collection():
        tape = _record(model, keywords, "auto", None)
        excerpt = find_excerpt(model, tape)
        tape.second = record_second_form(model, keywords, tape, excerpt)
        tape.norms = find_norms(model, tape)
        graph = Graph.from_tape(tape, model)
        _try_cuts(model, keywords, graph, excerpt)
        graph.footprint = footprint_of(model, cache)
    return graph


def _try_cuts(model: nn.Module, inputs: dict[str, Any], graph: Graph, excerpt: Excerpt) -> None:
    """Freeze the axes without an index of which the model does not run."""
    setup = Setup(meta=graph.tape.device_mode == "meta")
    forms = [None] if graph.tape.second is None else [None, graph.tape.second.attention]
    part = graph
    if excerpt.kept:
        tape = record_excerpt(model, inputs, setup, excerpt)
        if tape is not None and tape.replicas:
            second = graph.tape.second
            tape.second = None if second is None else replace(second, replicas=[])
            part = Graph.from_tape(tape, model)
    trial = Trial(model, inputs, setup, forms, excerpt if part is not graph else Excerpt())
    failures = trial.failures(part)
    if part is not graph:
        while failures:  # what goes only along with an axis that is frozen now cannot go either
            freeze_failures(graph, part, failures)
            freeze_as_in(part, graph)
            failures = unclosable(part)
    else:
        for axis, reason in failures.items():
            graph.freeze(axis, reason)


@on_uncompiled
def record(
    model: nn.Module, inputs: Any = None, *, device_mode: str = "auto", attention: str | None = None
) -> Tape:
    """Run ``model`` forward once and write down every operation.

    Args:
        model: any module; neither its weights nor its state change.
        inputs: keyword arguments of ``model.forward`` (or a tensor, or a tuple of positional ones); None: made from the
            model's config.
        device_mode: ``meta``, ``real``, or ``auto``: meta, and where that fails the model's own device.
        attention: attention form to record under (``eager``, ``sdpa``); None: the model's own.

    Raises:
        TraceError: the model could not be run; says at which operation, module and line.
        InputError: ``inputs`` do not fit ``model.forward``.
    """
    return _record(model, bind_inputs(model, inputs), device_mode, attention)


def _record(model: nn.Module, inputs: dict[str, Any], device_mode: str, attention: str | None) -> Tape:
    setup = Setup(meta=device_mode != "real", attention=attention)
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    if not setup.meta and on_meta:
        raise TraceError("a model on the meta device cannot run with real values: load its weights first")
    try:
        return Recording(model, inputs, setup).run()
    except TraceError as error:
        if device_mode != "auto" or on_meta:
            raise
        reason = str(error.__cause__ or error)
    try:
        tape = Recording(model, inputs, replace(setup, meta=False)).run()
    except TraceError as error:
        if reason in str(error):
            raise
        raise TraceError(f"{error}; on the meta device it had failed with: {reason}") from error
    tape.notes.append(f"recorded on real tensors because the meta device did not do: {reason}")
    return tape


def bind_inputs(model: nn.Module, inputs: Any) -> dict[str, Any]:
    """Inputs as keyword arguments of ``model.forward``; made from its config if None.

    Raises:
        InputError: the model is none, or they do not fit; names the arguments that do not and those there are.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            f"the model is a {type(model).__name__}: give a torch.nn.Module (from_pretrained makes one)"
        )
    check_unpacked(model)
    signature = inspect.signature(model.forward)
    names = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    if inputs is None:
        return example_inputs(model)
    if isinstance(inputs, torch.Tensor):
        inputs = (inputs,)
    try:
        if isinstance(inputs, Mapping):
            signature.bind(**inputs)
            return dict(inputs)
        return dict(signature.bind(*inputs).arguments)
    except TypeError as error:
        raise InputError(
            f"inputs do not fit {type(model).__name__}.forward ({error}); its arguments are {', '.join(names)}"
        ) from error


def record_second_form(model: nn.Module, inputs: dict[str, Any], tape: Tape, excerpt: Excerpt) -> Tape | None:
    """The model under its other form of attention, in part, if that form reads attributes the first does not.

    Args:
        model: the model.
        inputs: keyword arguments of its forward.
        tape: the recording under its own form.
        excerpt: the blocks that stand for all.

    Returns:
        The second tape with ``replicas`` set, or None (no other form, or nothing new in it).
    """
    other = OTHER_FORM.get(tape.attention)
    if other is None:
        return None
    setup = Setup(meta=tape.device_mode == "meta", attention=other)
    second = record_excerpt(model, inputs, setup, excerpt)
    if second is None or _attributes(second) <= _attributes(tape):
        return None
    return second


def record_excerpt(model: nn.Module, inputs: dict[str, Any], setup: Setup, excerpt: Excerpt) -> Tape | None:
    """Record with only some blocks, or with all where the model does not run without; None where it does not run."""
    attempts = ([excerpt] if excerpt.kept else []) + [Excerpt()]
    for attempt in attempts:
        try:
            tape = Recording(model, inputs, replace(setup, blocks=attempt.kept)).run()
        except TraceError as error:
            log.debug("a second look at the model did not work: %s", error)
            continue
        tape.replicas = [list(pair) for pair in attempt.replicas]
        return tape
    return None


def _attributes(tape: Tape) -> set[tuple[str, str]]:
    """The module attributes that sized something."""
    return {
        (leaf[1], leaf[2]) for equation in tape.equations for leaf in leaves(equation[2]) if leaf[0] == "attr"
    }
