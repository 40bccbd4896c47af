"""Run folders and the report on them: nothing is lost, nothing is fetched, every figure stands where it belongs."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from llmprune.cli import main
from llmprune.errors import InputError
from llmprune.reporting import logbook, pages, published

LAYERS = 3


def pruning() -> dict[str, Any]:
    size = {"parameters": 1_000_000, "bytes": 4_000_000, "macs": 1_100_000}
    rows = [
        {
            "axis": 2 * layer + (kind == "ffn"),
            "kind": kind,
            "layer": f"model.layers.{layer}",
            "size": 8,
            "removed": layer,
            "scores": [0.1 * (i + layer + 1) for i in range(7)],
        }
        for layer in range(LAYERS)
        for kind in ("head", "ffn")
    ]
    return {
        "importance": "element1",
        "before": size,
        "after": {"parameters": 800_000, "bytes": 3_200_000, "macs": 880_000},
        "perplexity": {"before": 5.25, "after": 7.5},
        "generation": {"prompt": "Once <b>", "before": "a | b", "after": "c & d"},
        "stages": [{"name": "score", "seconds": 1.5, "peak": 1}],
        "structure": rows,
    }


def evaluation(directory: str, parameters: int, perplexity: float, tasks: bool) -> dict[str, Any]:
    timing = {"median": 0.01, "quartiles": [0.009, 0.012], "tokens_per_second": 100.0, "repeats": 7}
    accuracy = {task: {"acc,none": 0.5 + 0.01 * i} for i, task in enumerate(published.TASKS)}
    return {
        "directory": directory,
        "parameters": parameters,
        "macs_per_token": 1000,
        "memory": {"weights": 4 * parameters, "kv_cache": 4096},
        "perplexity": {"texts/wikitext2_test.txt": perplexity, "ptb.txt": 2 * perplexity},
        "bits_per_character": {"texts/wikitext2_test.txt": 1.0, "ptb.txt": 1.1},
        "protocol": {"window": 128, "stride": 128},
        "tasks": accuracy if tasks else {},
        "chosen": dict.fromkeys(accuracy, "acc,none") if tasks else {},
        "latency": {"prefill": timing, "decode": timing},
        "generation": [{"prompt": "Hello", "text": "world", "beside": "there"}],
    }


def recovery() -> dict[str, Any]:
    return {
        "method": "lora",
        "trained": 1234,
        "steps": 40,
        "best_step": 20,
        "curve": [{"step": s, "loss": 3.0 - s / 40} for s in (10, 20, 30, 40)]
        + [{"step": s, "validation_loss": 3.1 - s / 80} for s in (20, 40)],
        "validation": {"before": 3.0, "best": 2.5, "last": 2.6},
        "seconds": {"train": 12.0},
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "first"
    data = tmp_path / "text.txt"
    data.write_text("some text")
    logbook.record(
        folder, "prune", pruning(), arguments=["M", "--ratio", "0.2"], seed=3, data=[data, tmp_path / "no"]
    )
    logbook.record(folder, "evaluate", evaluation("dense", 1_000_000, 5.25, True))
    logbook.record(folder, "evaluate", evaluation("small", 800_000, 7.5, False))
    logbook.record(folder, "recover", recovery())
    return folder


def test_an_entry_says_what_was_run_on_what(run: Path) -> None:
    entries = logbook.entries(run)
    assert [entry["command"] for entry in entries] == ["prune", "evaluate", "evaluate", "recover"]
    first = entries[0]
    assert first["arguments"] == ["M", "--ratio", "0.2"]
    assert first["seed"] == 3
    known, missing = first["data"].values()
    assert (
        known == "b94f6f125c79e3a5ffaa826f584c10d52ada669e6762051b826b55776d05aed2"
    )  # sha256 of "some text"
    assert missing is None
    assert first["versions"]["llmprune"]
    assert first["hardware"]["cores"] >= 1
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", first["time"])


def test_a_folder_s_fingerprint_is_that_of_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    first = logbook.fingerprint(tmp_path)
    assert first == logbook.fingerprint(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert logbook.fingerprint(tmp_path) != first


def _append(folder: str, number: int) -> None:
    logbook.record(folder, "evaluate", {"number": number})


def test_entries_of_processes_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    context = get_context("spawn")
    processes = [context.Process(target=_append, args=(str(tmp_path / "run"), n)) for n in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert sorted(e["figures"]["number"] for e in logbook.entries(tmp_path / "run")) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "is no run: it has no run.json"),
        ("{", "cannot be read"),
        ("[]", "is no run that this version"),
        ('{"format": 9, "entries": []}', "is no run that this version"),
        ('{"format": 1, "entries": [{"command": "prune"}]}', "is no run that this version"),
        ('{"format": 1, "entries": []}', "nothing was pruned, recovered or evaluated"),
    ],
)
def test_what_is_no_run_is_refused_in_a_sentence(
    tmp_path: Path, content: str | None, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_broken_run_is_not_appended_to(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        logbook.record(tmp_path, "prune", pruning())
    assert (tmp_path / "run.json").read_text() == "{"


def test_the_tables_hold_the_figures(run: Path, tmp_path: Path) -> None:
    page = pages.report([run], tmp_path / "out")
    text = page.with_suffix(".md").read_text()
    accuracies = " | ".join(f"{50 + i:.2f}" for i in range(7))
    assert f"| **first: dense** | 5.25 | 10.50 | {accuracies} | 53.00 |" in text
    assert "| **first: small** | 7.50 | 15.00 | - | - | - | - | - | - | - | - |" in text
    assert "| element1 (published) | 19.09 | 34.21 | 57.06 |" in text
    assert "1,000,000 → 800,000 | 20.0% |" in text
    assert "5.25 → 7.50" in text
    assert "| first | lora | 1,234 | 20 of 40 | 3.0000 → 2.5000 | 12.0 s |" in text
    assert "a \\| b" in text
    assert "llmprune prune M --ratio 0.2" in text
    for name in re.findall(r"\]\((.+?\.png)\)", text):
        assert (page.parent / name).read_bytes().startswith(b"\x89PNG")


def test_published_rows_average_to_what_was_published() -> None:
    for name, values in published.LLAMA_7B.items():
        assert len(values) == len(published.COLUMNS)
        assert sum(values[2:9]) / 7 == pytest.approx(values[9], abs=0.011), name


def test_one_run_more_changes_the_labels_not_the_figures(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "second"
    shutil.copytree(run, other)
    sections = pages.compose({"first": logbook.entries(run), "second": logbook.entries(other)})
    tables = [p for s in sections if s.title == "Perplexity" for p in s.parts if isinstance(p, pages.Table)]
    assert [row[0] for row in tables[0].rows] == ["first: dense"] * 2 + ["first: small"] * 2 + [
        "second: dense"
    ] * 2 + ["second: small"] * 2


def test_a_model_that_was_evaluated_twice_is_numbered() -> None:
    entry = {"command": "evaluate", "figures": evaluation("small", 1, 2.0, False)}
    sections = pages.compose({"run": [entry, copy.deepcopy(entry)]})
    table = next(s for s in sections if s.title == "Size and speed").parts[0]
    assert isinstance(table, pages.Table)
    assert [row[0] for row in table.rows] == ["run: small (1)", "run: small (2)"]


def test_the_page_is_whole_without_network(run: Path, tmp_path: Path) -> None:
    text = pages.report([run], tmp_path / "out").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", text)
    assert text.count("<img ") == len(list((tmp_path / "out").glob("*.png"))) == 6
    assert "Once &lt;b&gt;" in text
    assert "Once <b>" not in text
    assert text.count('<tr class="published">') == len(published.LLAMA_7B)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no chromium to open the page in")
def test_a_browser_opens_the_page_without_a_complaint(run: Path, tmp_path: Path) -> None:
    page = pages.report([run], tmp_path / "out")
    probe = tmp_path / "probe.html"
    script = (
        "<script>addEventListener('load', () => document.title = [...document.images]"
        ".filter(i => i.complete && i.naturalWidth > 300).length + ' of ' + document.images.length)</script></body>"
    )
    probe.write_text(page.read_text().replace("</body>", script))
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
         f"--user-data-dir={tmp_path / 'profile'}", probe.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "<title>6 of 6</title>" in done.stdout
    assert "CONSOLE" not in done.stderr


def test_a_command_keeps_its_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Path(__file__).resolve().parents[2] / "demo" / "model"
    words = ["prune", str(model), "--ratio", "0.1", "--importance", "l1", "--quiet", "--json"]
    assert main([*words, "--run", str(tmp_path / "run")]) == 0
    printed = json.loads(capsys.readouterr().out)
    (entry,) = logbook.entries(tmp_path / "run")
    assert entry["figures"] == printed
    assert entry["seed"] == 0
    structure = entry["figures"]["structure"]
    assert {row["kind"] for row in structure} == {"head", "ffn"}
    assert sum(row["removed"] for row in structure) == sum(row["removed"] for row in printed["axes"])
    assert len({row["layer"] for row in structure}) == 6


def test_a_run_s_folder_is_checked_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    model = Path(__file__).resolve().parents[2] / "demo" / "model"
    words = ["prune", str(model), "--importance", "l1", "--output", str(tmp_path / "out")]
    assert main([*words, "--run", str(tmp_path / "file")]) == 2
    assert "is a file: give a folder for the run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_task_file_of_one_s_own_fills_the_paper_s_column() -> None:
    figures = evaluation("dense", 1, 5.0, True)
    for name in ("tasks", "chosen"):
        figures[name] = {f"{task}_local": value for task, value in figures[name].items()}
    table = next(
        s for s in pages.compose({"run": [{"command": "evaluate", "figures": figures}]}) if "paper" in s.title
    ).parts[0]
    assert isinstance(table, pages.Table)
    assert list(table.rows[0][3:]) == [f"{50 + i:.2f}" for i in range(7)] + ["53.00"]
