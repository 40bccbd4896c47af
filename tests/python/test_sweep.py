"""Sweeps: the manifest, going on after an end of any kind, the figures, and what is drawn of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import make_folder

import llmprune
from llmprune.cli import main
from llmprune.compaction.compact import compacted_copy
from llmprune.errors import InputError, PlanError
from llmprune.experiments import sweep as module
from llmprune.experiments.baselines import (
    cut_independently,
    cut_matrices,
    independent_positions,
    weight_scores,
    with_sparse_kernels,
    zero_elements,
    zero_independently,
)
from llmprune.experiments.experiments import DEFAULTS, EXPERIMENTS, FORMS, Facts, grid, settled
from llmprune.experiments.sweep import Bench, Inputs, Sweep
from llmprune.reporting.plots import draw, shown
from llmprune.scoring.calibration import load_calibration

WINDOWS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("sweep"), layers=3)


@pytest.fixture(scope="module")
def inputs(folder: Path) -> Inputs:
    texts = {"backwards": folder.parent / "eval.txt"}
    return Inputs(folder, folder.parent / "calibration.txt", folder.parent / "eval.txt", texts, WINDOWS)


@pytest.fixture(scope="module")
def bench(inputs: Inputs) -> Bench:
    return Bench(inputs)


def words(folder: Path, output: Path, *more: object) -> list[str]:
    base = [
        "sweep", folder, "--calibration", folder.parent / "calibration.txt", "--eval", folder.parent / "eval.txt",
        "--windows", WINDOWS, "--output", output, "--protect-first", 0, "--protect-last", 0, "--samples", 4, "--quiet",
    ]  # fmt: skip
    return [str(word) for word in (*base, *more)]


GRID = ("--grid", "importance=l2,element1", "--grid", "ratio=0.1,0.2", "--grid", "kinds=ffn,head+ffn")


def results(output: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((output / "results.json").read_text())["rows"]
    return rows


def test_a_grid_is_run_written_and_drawn(folder: Path, tmp_path: Path, capsys: Any, bench: Bench) -> None:
    output = tmp_path / "out"
    assert main(words(folder, output, *GRID)) == 0
    rows = results(output)
    assert len(rows) == 8
    assert {path.name for path in output.iterdir()} >= {
        "manifest.json", "jobs", "results.json", "table.md", "plot.png", "plot.svg"
    }  # fmt: skip
    row = next(
        r for r in rows if (r["importance"], r["ratio"], r["kinds"]) == ("element1", 0.2, ["head", "ffn"])
    )
    model = copy.deepcopy(bench.model)
    samples = load_calibration(str(folder.parent / "calibration.txt"), bench.tokenizer, samples=4)
    whole = {"protect_first": 0, "protect_last": 0, "repair": "none"}
    report = llmprune.prune(model, bench.tokenizer, 0.2, samples, "element1", **whole)
    assert row["parameters"] == report.after.parameters
    assert row["removed"] == pytest.approx(report.removed)
    assert row["perplexity"] == pytest.approx(bench.perplexity(model), rel=1e-6)
    table = (output / "table.md").read_text()
    assert table.count("\n| l2 |") == 4
    assert "| importance | ratio | kinds | removed | parameters | perplexity |" in table
    assert table in capsys.readouterr().out
    assert (output / "plot.png").read_bytes().startswith(b"\x89PNG")
    svg = (output / "plot.svg").read_text()
    for label in ("l2, ffn", "element1, head + ffn", "unpruned", "perplexity"):
        assert label in svg


def test_what_is_done_is_not_done_again(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    output = tmp_path / "out"
    done: list[dict[str, Any]] = []
    run = Bench.run

    def counting(self: Bench, job: dict[str, Any]) -> dict[str, Any]:
        if len(done) == limit:
            raise KeyboardInterrupt
        done.append(job)
        return run(self, job)

    monkeypatch.setattr(Bench, "run", counting)
    limit = 3
    assert main(words(folder, output, *GRID)) == 130  # interrupted in the fourth job
    assert len(list((output / "jobs").iterdir())) == 3
    assert not (output / "results.json").exists()
    limit = 99
    assert main(words(folder, output, *GRID)) == 0
    assert len(done) == 8
    before = results(output)
    first, second = sorted((output / "jobs").iterdir())[:2]
    first.unlink()
    second.write_text(second.read_text()[:40])  # as no crash leaves it, but a full disk elsewhere might
    assert main(words(folder, output, *GRID)) == 0
    assert len(done) == 10
    strip = [{k: v for k, v in row.items() if k != "seconds"} for row in results(output)]
    assert strip == [{k: v for k, v in row.items() if k != "seconds"} for row in before]
    assert main(words(folder, output, *GRID)) == 0
    assert len(done) == 10


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--grid", "ratio=0.1"), "holds another sweep (grid)"),
        (("--experiment", "groups"), "holds another sweep (grid)"),
        ((*GRID, "--text", "a=b=c"), "calibration file b=c does not exist"),
        ((*GRID, "--text", "nonsense"), "--text takes NAME=FILE"),
        (("--experiment", "weather"), "unknown experiment 'weather'"),
        ((), "either --experiment or --grid"),
        ((*GRID, "--experiment", "groups"), "either --experiment or --grid"),
        (("--grid", "colour=red"), "'colour=red' is no axis of a grid"),
        (("--grid", "ratio=few"), "ratio is a number"),
        (("--grid", "form=round"), "unknown form 'round'"),
        (("--grid", "ratio=0.1", "--grid", "ratio=0.2"), "names ratio twice"),
        ((*GRID, "--windows", "0"), "--windows must be at least 1"),
    ],
)
def test_what_is_wrong_is_said(
    folder: Path, tmp_path: Path, more: tuple[str, ...], message: str, capsys: Any
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "manifest.json").write_text(json.dumps({"experiment": "grid"}))
    assert main(words(folder, output, *more)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_a_foreign_folder_is_left_alone(folder: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "precious").write_text("x")
    assert main(words(folder, tmp_path, *GRID)) == 2
    assert "holds no sweep" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_are_lists_of_whole_jobs(name: str, bench: Bench) -> None:
    experiment = EXPERIMENTS[name]
    facts = Facts({"protect_first": 0, "protect_last": 0}, bench.layers, ["backwards"])
    jobs = [settled(job, facts) for job in experiment.make(facts)]
    assert all(set(job) == set(DEFAULTS) for job in jobs)
    assert len({json.dumps(job, sort_keys=True) for job in jobs}) == len(jobs) > 3
    assert all(job["form"] in FORMS for job in jobs)
    results = {"removed", "perplexity", "latency"}
    assert {experiment.x, *experiment.series} <= {*DEFAULTS, *results}
    assert bench.layers == [f"model.layers.{i}" for i in range(3)]


@pytest.mark.parametrize("name", ["groups", "layers"])
def test_an_experiment_from_end_to_end(name: str, folder: Path, tmp_path: Path) -> None:
    assert main(words(folder, tmp_path / name, "--experiment", name, "--ratio", "ffn=0.3,head=0.4")) == 0
    rows = results(tmp_path / name)
    assert not any("infeasible" in row for row in rows)
    if name == "groups":
        cost = {(row["form"], row["importance"]): row for row in rows}
        sizes = {
            cost[form, "element1"]["parameters"] for form in ("groups", "independent", "independent zeros")
        }
        assert len(sizes) == 1
    else:
        assert [row["scope"] for row in rows[::2]] == [f"model.layers.{i}" for i in range(3)]


def test_what_cannot_be_done_is_a_result(bench: Bench) -> None:
    facts = Facts({"importance": "l2", "protect_first": 0, "protect_last": 0})
    assert "cannot be reached" in bench.run(settled({"ratio": 0.99}, facts))["infeasible"]
    assert (
        "repair goes with groups"
        in bench.run(settled({"form": "zeros", "repair": "ls"}, facts))["infeasible"]
    )


def test_figures_of_every_form(bench: Bench) -> None:
    facts = Facts({"importance": "l1", "ratio": 0.1, "protect_first": 0, "protect_last": 0})
    rows = {form: bench.run(settled({"form": form}, facts)) for form in FORMS}
    assert rows["dense"]["perplexity"] == bench.dense
    assert rows["dense"]["removed"] == 0
    for form in FORMS[1:]:
        assert rows[form]["parameters"] == rows["groups"]["parameters"]
        assert rows[form]["removed"] == pytest.approx(0.1, abs=0.02)
    for form in ("zeros", "2:4"):
        sparse = rows[f"{form} on sparse kernels"]
        assert sparse["perplexity"] == pytest.approx(rows[form]["perplexity"], rel=1e-4)
    timed = bench.run(settled({"timed": True}, facts))
    assert timed["latency"] == timed["request"]["seconds"] > 0


def plan_of(bench: Bench, importance: str = "l1") -> Any:
    scores = llmprune.score(bench.model, bench.graph, None, importance=importance)
    options = {"protect_first": 0, "protect_last": 0}
    return llmprune.plan(bench.graph, scores, ratio={"head": 0.4, "ffn": 0.3}, **options)


def test_members_that_agree_lose_what_the_group_loses(bench: Bench) -> None:
    """With elements that matter only outside of the plan's slices every member's choice is the plan's."""
    plan = plan_of(bench)
    elements = {
        name: torch.ones(shape, dtype=torch.float64) for name, shape in bench.graph.parameters.items()
    }
    for axis, gone in plan.removed.items():
        for member in bench.graph.axes[axis].members:
            elements[member.parameter].index_fill_(
                member.dim, torch.from_numpy(member.positions[gone].reshape(-1)), 0
            )
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        group = compacted_copy(bench.model, plan)(ids).logits
        assert torch.equal(cut_independently(bench.model, bench.graph, plan, elements)(ids).logits, group)
        zeroed = zero_independently(bench.model, bench.graph, plan, elements)(ids).logits
    assert torch.allclose(zeroed, group, atol=1e-5)


def test_members_on_their_own_lose_what_they_need_least(bench: Bench) -> None:
    plan = plan_of(bench)
    elements = weight_scores(bench.model, "l1", None)
    lost = independent_positions(bench.graph, plan, elements)
    axis, gone = next((a, g) for a, g in plan.removed.items() if bench.graph.axes[a].kind == "ffn")
    for member in bench.graph.axes[axis].members:
        values = bench.model.get_parameter(member.parameter).detach().double().abs()
        sums = values.movedim(member.dim, 0).flatten(1).sum(1).numpy()
        least = np.sort(np.argsort(sums, kind="stable")[: len(gone)])
        assert lost[member.parameter][member.dim].tolist() == least.tolist()
    layers = llmprune.plan(bench.graph, removed={bench.graph.layers[0].id: [1]})
    with pytest.raises(PlanError, match="whole layers have no members"):
        independent_positions(bench.graph, layers, elements)


def test_zeros_are_the_least_elements(bench: Bench) -> None:
    names = cut_matrices(bench.graph, plan_of(bench))
    assert names == sorted(names)
    assert all(name.endswith("proj.weight") for name in names)
    elements = weight_scores(bench.model, "l2", None)
    total = sum(elements[name].numel() for name in names)
    twin = zero_elements(bench.model, names, elements, total // 5)
    zeros = {name: (twin.get_parameter(name) == 0) for name in names}
    assert abs(sum(int(mask.sum()) for mask in zeros.values()) - total // 5) <= len(names)
    for name, mask in zeros.items():
        assert elements[name][mask].max() <= elements[name][~mask].min()
    by_row = zero_elements(bench.model, names, elements, total // 5, by_row=True)
    counts = (by_row.get_parameter(names[0]) == 0).sum(1)
    assert counts.min() == counts.max() > 0
    half = zero_elements(bench.model, names, elements, total // 4, "2:4")
    found = 0
    for name in names:
        matrix = half.get_parameter(name)
        mask = (matrix[:, : matrix.shape[1] // 4 * 4] == 0).reshape(len(matrix), -1, 4)
        found += int(mask.sum())
        assert set(mask.sum(-1).unique().tolist()) <= {0, 1, 2}
        whole = mask.sum(-1) == 2
        kept = elements[name][:, : matrix.shape[1] // 4 * 4].reshape(len(matrix), -1, 4)
        assert (
            kept.masked_fill(~mask, -1).amax(-1)[whole] <= kept.masked_fill(mask, 9e9).amin(-1)[whole]
        ).all()
    assert found == total // 4
    with pytest.raises(PlanError, match="zeros do not fit"):
        zero_elements(bench.model, names, elements, total // 2 + len(names) * 99, "2:4")
    sparse = with_sparse_kernels(twin, names)
    assert len([m for m in sparse.modules() if type(m).__name__ == "SparseLinear"]) == len(names)


def test_elements_by_gradient_and_by_input(bench: Bench) -> None:
    ids = torch.randint(0, 50, (3, 12), generator=torch.Generator().manual_seed(1))
    batch = load_calibration(ids)
    model = copy.deepcopy(bench.model).double().requires_grad_(True)
    loss = model(ids, labels=ids).loss
    torch.autograd.backward(loss)
    scores = weight_scores(copy.deepcopy(bench.model).double(), "element1", batch)
    name = "model.layers.1.mlp.up_proj.weight"
    parameter = model.get_parameter(name)
    assert parameter.grad is not None
    # Norms round to float32, of three samples at once and of one not always alike.
    torch.testing.assert_close(
        scores[name], (parameter.grad * parameter).abs().detach(), rtol=1e-5, atol=1e-8
    )
    seen: list[torch.Tensor] = []
    layer = model.get_submodule("model.layers.1.mlp.up_proj")
    handle = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    model(ids)
    handle.remove()
    norm = seen[0].reshape(-1, seen[0].shape[-1]).norm(dim=0)
    wanda = weight_scores(copy.deepcopy(bench.model).double(), "activation", batch)
    assert torch.allclose(wanda[name], parameter.detach().abs() * norm, rtol=1e-9)
    draws = [weight_scores(bench.model, "random", None, seed)[name] for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    with pytest.raises(PlanError, match="without calibration"):
        weight_scores(bench.model, "vector", None)


def test_parquet_holds_the_same_rows(folder: Path, inputs: Inputs, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    sweep = Sweep(
        grid(["form=dense,groups", "ratio=0.1,0.99"]), inputs, tmp_path / "out", {"importance": "l2"}
    )
    sweep.prepare()
    sweep.run()
    rows = sweep.rows()
    table = parquet.read_table(tmp_path / "out" / "results.parquet").to_pydict()
    assert table["job"] == [row["job"] for row in rows]
    assert table["perplexity"] == [row.get("perplexity") for row in rows]
    assert [json.loads(kinds) for kinds in table["kinds"]] == [row["kinds"] for row in rows]
    assert "Not possible" in sweep.table()


def test_ray_runs_the_same_jobs(inputs: Inputs, tmp_path: Path, monkeypatch: Any) -> None:
    experiment = grid(["importance=l2,l1"])
    settings = {"protect_first": 0, "protect_last": 0}
    here = Sweep(experiment, inputs, tmp_path / "here", settings)
    here.prepare()
    with monkeypatch.context() as patch:
        patch.setattr(module, "find_spec", lambda name: None)
        with pytest.raises(InputError, match=r"pip install llmprune\[ray\]"):
            here.run(ray=True)
    pytest.importorskip("ray", reason="Ray is not installed")
    here.run()
    there = Sweep(experiment, inputs, tmp_path / "there", settings)
    there.prepare()
    there.run(ray=True)
    strip = [[{**row, "seconds": 0} for row in sweep.rows()] for sweep in (here, there)]
    assert strip[0] == strip[1]


def test_a_plot_of_seeds_shows_their_median(bench: Bench) -> None:
    rows = [
        {**DEFAULTS, "importance": "random", "seed": seed, "perplexity": value, "dense perplexity": 2.0}
        for seed, value in enumerate((9.0, 4.0, 5.0))
    ]
    from llmprune.reporting.plots import _grouped

    assert _grouped(EXPERIMENTS["importance"], rows, "perplexity") == {"groups": [("random", 5.0)]}
    assert draw(EXPERIMENTS["importance"], rows, "m") == draw(EXPERIMENTS["importance"], rows, "m")
    assert shown("perplexity", 123456.0) == "1.23e+05"
    assert shown("scope", "model.layers.3") == "3"
    assert shown("ratio", {"ffn": 0.25}) == "25% of ffn"
