"""Files that strangers hand over, with anything in them: a typed error of one sentence or a sound result, nothing else.

The plan, the scores, the config, the index, the record and the safetensors header of a real run, spoilt at random.
"""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_models import build, evenly, prune
from compact_plans import llama
from hostile import EXAMPLES, ODD, spoilt, torn
from hypothesis import given
from hypothesis import strategies as st

import llmprune
from llmprune.checkpoints.loading import check_files
from llmprune.errors import LlmpruneError
from llmprune.out_of_core.shards import INDEX, find_tensors
from llmprune.planning.plan import Plan
from llmprune.scoring.scores import Scores

IDS = torch.arange(12).reshape(2, 6) % 61


def typed(call: Callable[[], Any]) -> Any:
    """The result of a call, or the typed error that it raised, whose text is one sentence on one line."""
    result: Any
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = call()
    except LlmpruneError as error:
        result = error
    assert not isinstance(result, LlmpruneError) or len(str(result).splitlines()) == 1, repr(result)
    return result


def made() -> tuple[Any, Plan, Scores]:
    model = llama()
    graph = llmprune.trace(model)
    scores = llmprune.score(model, graph, IDS, importance="element1")
    return model, llmprune.plan(graph, scores, ratio={"ffn": 0.3, "head": 0.34}, protect_first=0), scores


MODEL, PLAN, SCORES = made()


# --- plans and scores ------------------------------------------------------------------------------------------------


def use(plan: Any) -> None:
    """Everything a user does with a plan that was read."""
    if not isinstance(plan, Plan):
        return
    assert isinstance(typed(lambda: str(plan)), str | LlmpruneError)
    model = copy.deepcopy(MODEL)
    before = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    done = typed(lambda: llmprune.compact(model, plan))
    if isinstance(done, LlmpruneError):
        assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == before
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan or plan != plan


@EXAMPLES
@given(spoilt(PLAN.to_json()))
def test_a_spoilt_plan(tmp_path: Path, document: Any) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(document))
    use(typed(lambda: Plan.load(tmp_path / "plan.json")))


@EXAMPLES
@given(torn(json.dumps(PLAN.to_json()).encode()))
def test_a_torn_plan(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "plan.json").write_bytes(data)
    use(typed(lambda: Plan.load(tmp_path / "plan.json")))


def test_a_plan_that_asks_for_more_memory_than_there_is(tmp_path: Path) -> None:
    document = PLAN.to_json()
    name = next(iter(document["kept"]))
    document["kept"][name] = {"0": "0-9999999999999"}
    (tmp_path / "plan.json").write_text(json.dumps(document))
    assert "no run of rising indices" in str(typed(lambda: Plan.load(tmp_path / "plan.json")))


@pytest.mark.parametrize("suffix", [".json", ".npz"])
def test_nesting_without_end(tmp_path: Path, suffix: str) -> None:
    deep = tmp_path / f"deep{suffix}"
    deep.write_text("[" * 200_000)
    assert isinstance(typed(lambda: Plan.load(deep)), LlmpruneError)
    assert isinstance(typed(lambda: Scores.load(deep)), LlmpruneError)


@EXAMPLES
@given(spoilt(json.loads(SCORES.to_json())))
def test_spoilt_scores(tmp_path: Path, document: Any) -> None:
    (tmp_path / "scores.json").write_text(json.dumps(document))
    found = typed(lambda: Scores.load(tmp_path / "scores.json"))
    if isinstance(found, Scores):
        graph = llmprune.trace(MODEL)
        typed(lambda: llmprune.plan(graph, found, ratio=0.2))


@EXAMPLES
@given(st.data())
def test_torn_scores(tmp_path: Path, data: st.DataObject) -> None:
    SCORES.save(tmp_path / "whole.npz")
    (tmp_path / "scores.npz").write_bytes(data.draw(torn((tmp_path / "whole.npz").read_bytes())))
    found = typed(lambda: Scores.load(tmp_path / "scores.npz"))
    assert isinstance(found, Scores | LlmpruneError)


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock checkpoint in several shards."""
    folder = tmp_path_factory.mktemp("stock") / "model"
    build("llama_gqa").save_pretrained(folder, max_shard_size=12_000)
    return folder


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned one in the universal form, with its record."""
    folder = tmp_path_factory.mktemp("pruned") / "model"
    llmprune.save_pretrained(prune(build("llama_gqa"), evenly), folder, form="universal")
    return folder


def read(folder: Path) -> None:
    """Every way in: loaded, opened, its files compared with its record."""
    for way in (llmprune.from_pretrained, llmprune.open_model):
        model = typed(lambda way=way: way(folder))
        assert isinstance(model, torch.nn.Module | LlmpruneError)
    typed(lambda: check_files(folder))


def spoil(source: Path, target: Path, name: str, data: st.DataObject) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    document = json.loads((source / name).read_text())
    (target / name).write_text(json.dumps(data.draw(spoilt(document))))
    return target


@EXAMPLES
@given(st.data())
def test_a_spoilt_config(stock: Path, tmp_path: Path, data: st.DataObject) -> None:
    read(spoil(stock, tmp_path / "model", "config.json", data))


@EXAMPLES
@given(st.data())
def test_a_spoilt_index(stock: Path, tmp_path: Path, data: st.DataObject) -> None:
    read(spoil(stock, tmp_path / "model", INDEX, data))


@EXAMPLES
@given(st.data())
def test_a_spoilt_universal_config(pruned: Path, tmp_path: Path, data: st.DataObject) -> None:
    read(spoil(pruned, tmp_path / "model", "config.json", data))


@EXAMPLES
@given(st.data())
def test_a_spoilt_record(pruned: Path, tmp_path: Path, data: st.DataObject) -> None:
    read(spoil(pruned, tmp_path / "model", "llmprune.json", data))


@EXAMPLES
@given(st.data())
def test_a_torn_file_of_weights(pruned: Path, tmp_path: Path, data: st.DataObject) -> None:
    whole = (pruned / "model.safetensors").read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    (tmp_path / "model.safetensors").write_bytes(data.draw(torn(whole[:length])) + whole[length:])
    found = typed(lambda: find_tensors(tmp_path))
    assert isinstance(found, LlmpruneError) or all(
        stored.offset + stored.bytes <= len(whole) + 9 for stored in found.values()
    )


@EXAMPLES
@given(st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), ODD), st.sampled_from([0, 1]))
def test_a_header_with_anything_in_it(tmp_path: Path, entry: dict[str, Any], more: int) -> None:
    whole = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"a": {**whole, **entry}, **({"b": whole} if more else {})}).encode()
    data = len(header).to_bytes(8, "little") + header + np.zeros(2, np.float32).tobytes()
    (tmp_path / "model.safetensors").write_bytes(data)
    assert isinstance(typed(lambda: find_tensors(tmp_path)), LlmpruneError | dict)
