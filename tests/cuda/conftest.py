"""The tests of this folder need a CUDA device and say so where there is none."""

from __future__ import annotations

import pytest

from llmprune.machine import cuda


@pytest.fixture(autouse=True)
def _device(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("cuda") is None:
        return
    reason = cuda.unavailable()
    if reason is not None:
        pytest.skip(reason)
