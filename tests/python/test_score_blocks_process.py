"""Scoring block by block as a process: its peak memory, and what follows a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scoring import ids_of, model_of, worst

import llmprune
from llmprune.machine.budget import parse_bytes
from llmprune.out_of_core.boundaries import Journal
from llmprune.scoring.score import score


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model_of("llama_gqa").save_pretrained(folder)
    return folder


_PEAK = """
import json, sys
import torch
torch.set_num_threads(1)
import llmprune
from llmprune.scoring.score import score
ids = torch.randint(0, 4000, (8, 64), generator=torch.Generator().manual_seed(1))
try:
    score(sys.argv[1], None, ids, importance=sys.argv[3], stream=True, memory_budget=int(sys.argv[2]), quiet=True)
    done = True
except llmprune.errors.InputError as error:
    done = str(error)
peak = next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmHWM"))
print(json.dumps([done, peak]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc: peak memory cannot be read")
@pytest.mark.slow
@pytest.mark.parametrize("importance", ["element1", "element2"])
def test_the_process_stays_below_its_budget(tmp_path, importance):
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=4000, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "m")

    def run(budget: int):
        done = subprocess.run(
            [sys.executable, "-c", _PEAK, str(tmp_path / "m"), str(budget), importance],
            capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    refused, idle = run(1 << 20)
    least = parse_bytes(refused.split("raise it to ")[1].split(",")[0])
    assert least < idle + 300e6
    for budget in (int(least * 1.01), int(least * 1.1)):
        done, peak = run(budget)
        assert done is True
        assert peak <= budget


# After a kill

_KILLED = """
import os, signal, sys
import torch
from llmprune.out_of_core import boundaries
from llmprune.scoring.score import score
after = int(sys.argv[2])
count = 0
original = boundaries.Journal.put

def put(self, *args):
    global count
    original(self, *args)
    count += 1
    if count == after:
        os.kill(os.getpid(), signal.SIGKILL)

boundaries.Journal.put = put
ids = torch.tensor(eval(sys.argv[4]))
scores = score(sys.argv[1], None, ids, importance=sys.argv[6], stream=True, state=sys.argv[3], quiet=True,
               kinds=eval(sys.argv[7]))
scores.save(sys.argv[5])
print(count)
"""


# Of two blocks forward and backward are put down; of a pass that reads activations forward, but for the last.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("importance", "after", "left"),
    [("element2", 1, 3), ("element2", 2, 2), ("element2", 3, 1), ("fluctuation", 1, 0), ("obs", 1, 0)],
)
def test_a_killed_process_is_followed_by_one_that_goes_on(place, tmp_path, importance, after, left):
    folder, kinds = (
        place,
        None if importance == "element2" else ("head", "ffn"),
    )  # axes that lie inside a block
    want = score(folder, None, ids_of(), importance=importance, kinds=kinds)
    state, out = tmp_path / "state", tmp_path / "scores.npz"

    def run(kill_after: int):
        words = [
            str(folder),
            str(kill_after),
            str(state),
            repr(ids_of().tolist()),
            str(out),
            importance,
            repr(kinds),
        ]
        return subprocess.run(
            [sys.executable, "-c", _KILLED, *words], capture_output=True, text=True, check=False
        )

    killed = run(after)
    assert killed.returncode == -9, killed.stderr[-2000:]
    assert state.is_dir()
    assert not out.exists()
    done = run(-1)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) == left  # none is done twice
    assert worst(llmprune.Scores.load(out), want) < 1e-6
    assert not state.exists()


def test_a_state_of_other_samples_is_not_taken_over(monkeypatch, place, tmp_path):
    folder = place
    state = tmp_path / "state"
    monkeypatch.setattr(Journal, "remove", lambda self: None)
    score(folder, None, ids_of(), importance="element2", stream=True, state=state)
    assert len(list(state.iterdir())) == 7  # a signature; of two blocks forward, backward and sums
    other = ids_of().flip(1)
    want = score(folder, None, other, importance="element2")
    got = score(folder, None, other, importance="element2", stream=True, state=state)
    assert worst(got, want) < 1e-6
