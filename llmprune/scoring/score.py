"""Scoring: how much each coupled group matters, by one of the registered importances.

``score`` gives every prunable axis of a graph one number per index, from a handful of calibration samples and with
nothing the size of the model's gradients held (:mod:`llmprune.scoring.streaming`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from llmprune.arguments import is_whole
from llmprune.compaction.verify import experts_computed_by
from llmprune.errors import CalibrationError, InputError, PlanError
from llmprune.out_of_core.block_stream import block_streamed_sums
from llmprune.out_of_core.scattered import within_reach
from llmprune.out_of_core.stored import Streaming, opened, source_of, streaming_of
from llmprune.planning.choice import check_kinds
from llmprune.planning.layer_choice import DEPTHS
from llmprune.scoring.activation_scores import activation_scores
from llmprune.scoring.calibration import Batch
from llmprune.scoring.importance import Importance, lookup
from llmprune.scoring.layer_scores import check_finite, contributions, influences, magnitudes, obstacles
from llmprune.scoring.loss import SampleLosses, UserLoss, loss_of
from llmprune.scoring.ranks import Ranks
from llmprune.scoring.reduction import Reducer, Sums
from llmprune.scoring.sampling import calibration_for
from llmprune.scoring.scores import Scores
from llmprune.scoring.streaming import streamed_sums, undisturbed
from llmprune.tracing.layers import LayerAxis
from llmprune.tracing.wrapped import check_present, on_uncompiled

if TYPE_CHECKING:
    from llmprune.planning.apart import Around
    from llmprune.tracing.graph import Axis, Graph
    from llmprune.tracing.sublayers import PartAxis

Aggregate = Callable[[np.ndarray], np.ndarray]
AGGREGATIONS: dict[str, Aggregate] = {
    "sum": lambda members: members.sum(0),
    "max": lambda members: members.max(0),
    "product": lambda members: members.prod(0),
    "last": lambda members: members[-1],
}
"""Name -> members' scores (members in execution order, axis size) to the group's, (axis size,)."""


def check_scoring(
    importance: str, aggregation: str, calibration: Any, kinds: Sequence[str] | None = None
) -> Importance:
    """The importance's rule; refuse what :func:`score` refuses of these arguments before anybody traces a model.

    Raises:
        InputError: an unknown importance or aggregation, no calibration data for an importance that needs them, or
            kinds that the importance has no scores for.
    """
    rule = lookup(importance)
    if rule.sort == "layers" and kinds is not None and not set(kinds) <= set(DEPTHS):
        raise InputError(
            f"importance {importance!r} scores whole layers, attention or feed-forwards, and nothing smaller: "
            "prune kinds=('layer',) by it (--kinds layer), or choose another importance"
        )
    if rule.sort == "inputs" and kinds is not None and set(kinds) & set(DEPTHS):
        raise InputError(
            f"importance {importance!r} has no scores for whole layers, attention or feed-forwards: choose "
            f"block_influence or a gradient's importance, or leave out {', '.join(sorted(set(kinds) & set(DEPTHS)))}"
        )
    if not isinstance(aggregation, str) or aggregation not in AGGREGATIONS:
        raise InputError(f"unknown aggregation {aggregation!r}: the known ones are {', '.join(AGGREGATIONS)}")
    if rule.calibrated and calibration is None:
        raise InputError(
            f"importance {importance!r} needs calibration data: token ids, texts or a path (--calibration FILE)"
        )
    return rule


@on_uncompiled
def score(
    model: nn.Module | str | Path,
    graph: Graph | None = None,
    calibration: Any = None,
    importance: str = "element1",
    aggregation: str = "sum",
    *,
    seed: int = 0,
    tokenizer: Any = None,
    samples: int | None = None,
    length: int | None = None,
    batch_size: int | None = None,
    checkpointing: bool | None = None,
    pin_boundaries: bool = False,
    loss: UserLoss | None = None,
    quiet: bool | None = None,
    kinds: Sequence[str] | None = None,
    stream: bool | None = None,
    memory_budget: int | str | None = None,
    state: str | Path | None = None,
    device: str | torch.device | None = None,
    ranks: Ranks | None = None,
) -> Scores:
    """Score every coupled group of every prunable axis, and whole layers where they are asked for.

    With ``L_j`` the mean next-token loss of sample j and ``g_j`` its gradient, ``g`` is the mean of ``g_j`` over the
    samples and ``s`` the mean of ``g_j ** 2``. A structure is one index of one dimension of one parameter; its
    importance is one of :mod:`llmprune.scoring.importance` (Ma et al., LLM-Pruner, NeurIPS 2023). A member's score at
    an axis index is the sum over its positions, and the group's aggregates its members'. Members on buffers carry no
    score. Of layers see :mod:`llmprune.scoring.layer_scores`.

    The model is the same afterwards, also when this raises: no gradients, hooks or changed flags.

    Args:
        model: The traced model, with its weights, on the CPU or on CUDA devices; gradients stay where they are, and
            only scores leave a device. Or its folder, or what :func:`llmprune.open_model` makes of that: then weights
            may stay in their files, and are read block by block (:mod:`llmprune.out_of_core.block_stream`).
        graph: Its graph; None: :func:`llmprune.trace` makes it.
        calibration: Token ids (samples x length), texts with ``tokenizer``, a path to .txt or .jsonl, or a mapping of
            tensors; see :func:`llmprune.scoring.calibration.load_calibration`. Not needed for l1, l2 and random.
        importance: vector, element1, element2, obs, fluctuation, activation, l1, l2, random, one registered, or
            block_influence (of layers and their parts only).
        aggregation: sum, max, product, or last (the last member in execution order).
        seed: For ``random``; the same seed gives the same scores.
        tokenizer: For texts.
        samples: How many samples to take from texts; None for 10, or 32 (or as many as there are) for importances that
            are read off activations.
        length: Their length in tokens; None for 64, or 128 for those.
        batch_size: How many samples run at a time; None for as many as fit in memory. It changes the scores by
            rounding only.
        checkpointing: Keep only the inputs of the model's repeated blocks and run each block again in the backward
            pass: a third more time, a fraction of the memory; None for only when memory would not suffice, or on a
            CUDA device when more than a tenth of the weights' memory would be taken.
        pin_boundaries: With checkpointing, keep the blocks' inputs in pinned host memory instead of the device's.
        loss: ``loss(model, batch) -> losses``, one per sample, for models that are no causal language models.
        quiet: Show no progress bar; None shows one on a terminal only.
        kinds: Kinds that are to be pruned: ``layer``, ``attention`` and ``feedforward`` have whole layers or these
            parts of them scored too, and alone nothing else; importances read off activations score these kinds only.
            None: every kind but ``layer`` (only ``layer`` for block_influence).
        stream: Of a folder, whether its weights stay there; None: where memory would not suffice.
        memory_budget: With streaming, most memory that the process may have: bytes, or text like ``4GB``. It keeps
            below that, or refuses before it begins. None: what the machine has free.
        state: With streaming, a folder in which each block's results are kept until the scores are there: after a
            crash, the same call goes on from them.
        device: With streaming, where the blocks run: ``cpu``, ``cuda``, ``cuda:1``; None for the CPU.
        ranks: The processes of torch.distributed to share the samples with; each holds the model and is given the same
            arguments, and each gets the scores that one process alone would get of all samples.

    Raises:
        RankError: the processes' models, data or versions differ, or one of them failed or has gone.
        InputError: an unknown importance or aggregation, the graph of another model, weights that are not finite, not
            floating point or not loaded, a loss that does not apply.
        CalibrationError: calibration data that cannot be used, or a sample whose loss is not finite.
        DeviceError: weights on a CUDA device that llmprune cannot use, or that has too little free memory.
    """
    rule = check_scoring(importance, aggregation, calibration, kinds)
    if not isinstance(model, nn.Module):
        model = opened(model, stream, memory_budget, state)
        if source_of(model) is None:
            stream = memory_budget = device = None  # it fits
    reached: nn.Module = within_reach(model)
    model = reached
    streaming = streaming_of(model, stream, memory_budget, state, device)
    if graph is None:
        from llmprune.tracing.trace import trace

        graph = trace(model)
    if kinds is None:
        kinds = ("layer",) if rule.sort == "layers" else ()
    else:
        check_kinds(kinds)
    stacks = [stack for stack in graph.stacks if stack.prunable and stack.kind in kinds] if kinds else []
    axes = [] if kinds and set(kinds) <= set(DEPTHS) else [axis for axis in graph.axes if axis.prunable]
    check_present(model)
    parameters = _scored_parameters(model, graph, axes)
    if ranks is not None and (rule.sort == "inputs" or streaming is not None or (stacks and rule.calibrated)):
        what = "whole layers" if stacks else "weights left on the disk" if streaming else importance
        raise InputError(f"{what} cannot be scored by several processes together: run one alone")
    if batch_size is not None and not is_whole(batch_size, 1):
        raise InputError(f"batch_size is {batch_size!r}: at least one sample must run at a time")
    if streaming is not None and stacks:
        raise InputError(
            f"{importance} scores of whole layers or their parts are taken of models in memory alone: load the model, "
            "or choose other kinds"
        )
    if streaming is not None and rule.sort == "inputs" and streaming.device.type != "cpu":
        raise InputError(f"{importance} scores of streamed models are taken on the CPU: leave device out")
    outer = {axis.id: around for axis in axes if (around := _around(graph, axis)) is not None}
    stacks_apart = {
        member.parameter
        for axis, around in outer.items()
        if around.stacked
        for member in graph.axes[axis].members
    }
    batch = None
    comparable = False
    if rule.sort == "draw":
        tables = {
            axis: rule.function(np.random.default_rng((seed, axis, 1)), (around.size, graph.axes[axis].size))
            for axis, around in outer.items()
        }
        values = {
            number: rule.function(np.random.default_rng((seed, number)), (size,))
            for number, size in [(a.id, a.size) for a in axes] + [(s.id, s.size) for s in stacks]
        }
    elif rule.sort == "inputs":
        axes = [axis for axis in axes if not kinds or axis.kind in kinds]
        _check_weights(parameters, streaming is not None)
        batch = calibration_for(importance, model, calibration, tokenizer, samples, length)
        with _damage_named(model, parameters):
            values, tables, comparable = _of_activations(
                model, graph, axes, outer, batch, rule, loss, batch_size, quiet, streaming
            )
            axes = [axis for axis in axes if axis.id in values]
            _check_finite(axes, values, importance)
    else:
        weights = parameters if not stacks else dict(model.named_parameters())
        _check_weights(weights, streaming is not None)
        with _damage_named(model, weights):
            with tqdm(
                total=len(parameters), desc=f"scoring ({importance})", unit="tensor", disable=quiet
            ) as bar:
                sums: Sums = {}
                if not rule.calibrated:
                    sums = _weights_only(model, parameters, rule, partial(_tick, bar), stacks_apart)
                else:
                    batch = calibration_for(importance, model, calibration, tokenizer, samples, length)
                if ranks is not None:
                    ranks.agree_on_scoring(
                        *(model, graph.fingerprint, importance, aggregation, seed, kinds),
                        None if batch is None else batch.hash,
                    )
                if axes and batch is not None:
                    tick = partial(_tick, bar)
                    sums = _streamed(
                        *(model, batch, loss, parameters, rule, tick, batch_size, checkpointing),
                        *(pin_boundaries, stacks_apart, streaming, ranks),
                    )
            structures = {
                name: [rule.finish(array if array.ndim == 1 else array.sum(0)) for array in arrays]
                for name, arrays in sums.items()
            }
            apart = {name: [rule.finish(array) for array in sums[name]] for name in stacks_apart}
            values = _grouped(axes, structures, aggregation)
            tables = {
                axis: _nested(graph, graph.axes[axis], around, structures, apart, aggregation)
                for axis, around in outer.items()
            }
            _check_finite(axes, values, importance)
            if stacks:
                values |= _of_layers(model, stacks, rule, batch, loss, batch_size, quiet)
    return Scores(
        values,
        importance=importance,
        aggregation=aggregation,
        seed=seed,
        calibration_hash=None if batch is None else batch.hash,
        fingerprint=graph.fingerprint,
        kinds={axis.id: axis.kind for axis in axes} | {stack.id: stack.kind for stack in stacks},
        nested=tables,
        comparable=comparable,
        pinned=obstacles(model, [stack for stack in stacks if isinstance(stack, LayerAxis)])
        if stacks
        else {},
    )


def _of_activations(
    model: nn.Module,
    graph: Graph,
    axes: Sequence[Axis],
    outer: Mapping[int, Around],
    batch: Batch,
    rule: Importance,
    loss: UserLoss | None,
    batch_size: int | None,
    quiet: bool | None,
    streaming: Streaming | None,
) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray], bool]:
    """Scores read off activations, and whether they are in units of the loss; the model is as it was afterwards."""
    with (
        undisturbed(model),
        experts_computed_by("eager", model),
        _ids_in_range(),
        tqdm(total=batch.samples, desc=f"scoring ({rule.name})", unit="sample", disable=quiet) as bar,
    ):
        losses_of = None
        if rule.gram:
            losses_of = loss_of(model, loss, batch) if streaming is None else SampleLosses(model, loss, batch)
        values, nested = activation_scores(
            model, graph, axes, outer, batch, rule, losses_of, batch_size, bar.update, streaming
        )
        return values, nested, losses_of is not None


def _of_layers(
    model: nn.Module,
    stacks: Sequence[LayerAxis | PartAxis],
    rule: Importance,
    batch: Batch | None,
    loss: UserLoss | None,
    batch_size: int | None,
    quiet: bool | None,
) -> dict[int, np.ndarray]:
    """Scores of whole layers, with the model as it was afterwards."""
    if batch is None:
        return magnitudes(model, stacks, rule)
    desc = f"scoring layers ({rule.name})"
    with (
        undisturbed(model),
        _ids_in_range(),
        tqdm(total=batch.samples, desc=desc, unit="sample", disable=quiet) as bar,
    ):
        if rule.sort == "layers":
            values = influences(model, stacks, batch, rule, bar.update)
        else:
            losses_of = SampleLosses(model, loss, batch)
            values = contributions(model, stacks, batch, losses_of, rule, batch_size, bar.update)
    check_finite(stacks, values, rule.name)
    return values


@contextmanager
def _ids_in_range() -> Iterator[None]:
    """Say what an index out of range inside the model usually is (ids in a mapping are the model's own business)."""
    try:
        yield
    except IndexError as error:
        raise CalibrationError(
            f"the model does not run on the calibration samples ({error}): are token ids outside its vocabulary?"
        ) from error


def _check_finite(axes: Sequence[Axis], values: Mapping[int, np.ndarray], importance: str) -> None:
    """Raise CalibrationError where gradients or their products with weights left the range of their dtype."""
    for axis in axes:
        if not np.isfinite(values[axis.id]).all():
            place = f" of {axis.places[0][0]}" if axis.places else ""
            raise CalibrationError(
                f"the {importance} scores of axis {axis.id} ({axis.kind}{place}) are not finite, although weights and "
                "losses are: gradients overflow; look for extreme weights or use a wider dtype"
            )


def _tick(bar: tqdm[Any], name: str) -> None:
    bar.set_postfix_str(name, refresh=False)
    bar.update()


def _scored_parameters(model: nn.Module, graph: Graph, axes: Sequence[Axis]) -> dict[str, nn.Parameter]:
    """The parameters in which a prunable axis occurs, checked against the graph."""
    own = dict(model.named_parameters())
    for name, shape in graph.parameters.items():
        if name not in own or tuple(own[name].shape) != tuple(shape):
            found = f"has shape {tuple(own[name].shape)} there" if name in own else "is missing there"
            raise InputError(
                f"the graph is not of this {type(model).__name__}: parameter {name} of shape {tuple(shape)} {found}; "
                "trace the model you score"
            )
    wanted = dict.fromkeys(
        m.parameter for axis in axes for m in axis.members if m.parameter in graph.parameters
    )
    return {name: own[name] for name in wanted}


def _check_weights(parameters: Mapping[str, nn.Parameter], stored: bool = False) -> None:
    for name, parameter in parameters.items():
        if parameter.is_meta and not stored:
            raise InputError(
                f"parameter {name} is on the meta device: load the model's weights before scoring, or open the "
                "checkpoint with llmprune.open_model to have them read block by block"
            )
        if not parameter.is_floating_point():
            raise InputError(
                f"parameter {name} is {str(parameter.dtype).removeprefix('torch.')}, not floating point: packed "
                "quantised weights cannot be scored; load the model in float32 or bfloat16"
            )


@contextmanager
def _damage_named(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Where the block fails because weights are not finite, name the tensor; looking first would cost a pass."""
    try:
        yield
    except CalibrationError:
        source = source_of(model)
        for name, parameter in parameters.items():
            parts = [parameter.detach()] if source is None else source.parts(name, parameter.dtype)
            for values in parts:
                if not bool(torch.isfinite(values).all()):
                    what = "NaN" if bool(torch.isnan(values).any()) else "infinite"
                    raise InputError(
                        f"parameter {name} holds {what} values: the checkpoint is damaged or was overflowed"
                    ) from None
        raise


def _weights_only(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    rule: Importance,
    progress: Callable[[str], None],
    stacks: Collection[str],
) -> Sums:
    """Order 0: one parameter after the other, those that are not in memory slice by slice."""
    source = source_of(model)
    sums: Sums = {}
    for name, parameter in parameters.items():
        value = source.value(name, parameter.dtype) if source is not None and parameter.is_meta else parameter
        reducer = Reducer(rule, {name: value}, 1, {}, progress, stacks=stacks)
        reducer.whole(name, None)
        sums |= reducer.sums
    return sums


def _streamed(
    model: nn.Module,
    batch: Batch,
    loss: UserLoss | None,
    parameters: Mapping[str, nn.Parameter],
    rule: Importance,
    progress: Callable[[str], None],
    batch_size: int | None,
    checkpointing: bool | None,
    pin_boundaries: bool,
    stacks: Collection[str],
    streaming: Streaming | None,
    ranks: Ranks | None,
) -> Sums:
    """First and second order, with the model as it was afterwards."""
    total = batch.samples
    if ranks is not None:
        batch = ranks.own(batch)
    losses_of = SampleLosses(model, loss, batch)
    if streaming is not None:
        with _ids_in_range():
            return block_streamed_sums(
                *(model, batch, losses_of, list(parameters), rule, streaming),
                progress=progress,
                batch_size=batch_size,
                stacks=stacks,
            )
    with undisturbed(model), _ids_in_range():
        return streamed_sums(
            *(model, batch, losses_of, parameters, rule),
            progress=progress,
            batch_size=batch_size,
            checkpointing=checkpointing,
            pin_boundaries=pin_boundaries,
            stacks=stacks,
            ranks=ranks,
            total=total,
        )


Structures = Mapping[str, Sequence[np.ndarray]]
"""Parameter -> per dimension the importance of each of its positions."""


def _grouped(axes: Sequence[Axis], structures: Structures, aggregation: str) -> dict[int, np.ndarray]:
    """Members' structures to axes' scores."""
    scores = {}
    for axis in axes:
        rows = [
            structures[member.parameter][member.dim][np.asarray(member.positions)]
            .reshape(axis.size, -1)
            .sum(1)
            for member in axis.members
            if member.parameter in structures
        ]
        scores[axis.id] = AGGREGATIONS[aggregation](np.stack(rows)) if rows else np.zeros(axis.size)
    return scores


def _around(graph: Graph, axis: Axis) -> Around | None:
    """What an axis is chosen apart for each index of: key-value heads of query heads, experts of what is in them."""
    try:
        around = graph.around(axis.id)
    except PlanError:  # it is scored and pruned alike everywhere
        return None
    return around if around.stacked or axis.kind == "query" else None


def _nested(
    graph: Graph, axis: Axis, around: Around, structures: Structures, apart: Structures, aggregation: str
) -> np.ndarray:
    """Scores of an axis apart for each index of what lies around it: (size around it, axis size)."""
    tables = []
    for member in axis.members:
        if member.parameter not in structures:
            continue
        if around.stacked:
            rows = apart[member.parameter][member.dim][:, member.positions]
            tables.append(rows.reshape(around.size, axis.size, -1).sum(2))
            continue
        structure = structures[member.parameter][member.dim]
        owner = np.zeros(len(structure), dtype=np.int64)
        for other in graph.axes[around.axes[0]].members:
            if (other.parameter, other.dim) == (member.parameter, member.dim):
                owner[other.positions] = np.arange(around.size)[:, None]
        table = np.zeros((around.size, axis.size))
        np.add.at(
            table, (owner[member.positions], np.arange(axis.size)[:, None]), structure[member.positions]
        )
        tables.append(table)
    return AGGREGATIONS[aggregation](np.stack(tables)) if tables else np.zeros((around.size, axis.size))
