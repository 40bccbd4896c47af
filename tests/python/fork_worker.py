"""Scores before and after forks, for test_threads_and_forks: prints a line for each child that agrees with its parent.

The kernels of llmprune start threads for one call and join them, so nothing of theirs is lost in a fork. torch keeps a
pool of OpenMP threads that a child does not inherit: there it has to run on one thread, as in its own data loaders.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable

import numpy as np
import torch
from compact_plans import llama

import llmprune
from llmprune import _core

IDS = torch.arange(48).reshape(4, 12) % 61


def kernels() -> list[np.ndarray]:
    """A call of ours that starts threads."""
    weight = torch.linspace(-1, 1, 256 * 192).reshape(256, 192)
    x, dy = torch.linspace(0, 1, 64 * 192).reshape(64, 192), torch.linspace(1, 0, 64 * 256).reshape(64, 256)
    row, col = np.zeros(256), np.zeros(192)
    _core.linear_scores(weight, x, dy, 4, 2, row, col, threads=4)
    return [row, col]


def scores() -> list[np.ndarray]:
    """A whole scoring run, traced anew."""
    model = llama()
    found = llmprune.score(model, llmprune.trace(model), IDS, importance="element2")
    return [found[axis] for axis in found]


def child(name: str, work: Callable[[], list[np.ndarray]], expected: list[np.ndarray]) -> None:
    """Fork, work there, and say whether the result is the parent's."""
    sys.stdout.flush()
    number = os.fork()
    if number == 0:
        signal.alarm(120)  # a child that hangs ends by itself
        torch.set_num_threads(1)
        found = work()
        same = len(found) == len(expected) and all(map(np.array_equal, found, expected))
        print(f"{name}: {'equal' if same else 'different'}", flush=True)
        os._exit(0 if same else 1)
    _, status = os.waitpid(number, 0)
    if status != 0:
        print(f"{name}: status {status}", flush=True)


def main() -> None:
    torch.set_num_threads(2)
    child("before any work", scores, scores_of_another_process())
    child("kernels before", kernels, kernels())
    expected = scores()
    child("after scoring", scores, expected)
    child("kernels after", kernels, kernels())


def scores_of_another_process() -> list[np.ndarray]:
    """What a child finds before its parent has used a thread, by a pipe."""
    read, write = os.pipe()
    if os.fork() == 0:
        with os.fdopen(write, "wb") as file:
            np.savez(file, *scores())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        data = file.read()
    os.wait()
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return [arrays[name] for name in arrays.files]


if __name__ == "__main__":
    main()
