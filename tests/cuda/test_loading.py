"""The CUDA extension as it was built: it loads, and finds a device or says in a sentence why not."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest

from llmprune.machine import cuda

pytestmark = pytest.mark.skipif(find_spec("llmprune._cuda") is None, reason="built without CUDA (make cuda)")


def test_it_finds_a_device_or_says_why_not() -> None:
    reason = cuda.unavailable()
    if reason is not None and find_spec("nvidia") is None:
        assert "libcublas" in reason or "no usable CUDA device" in reason, reason
    elif reason is not None:
        assert reason.startswith("no usable CUDA device: cuda"), reason
        assert "\n" not in reason
        pytest.skip(f"loaded, but {reason}")


def test_importing_llmprune_does_not_load_it() -> None:
    script = (
        "import sys, llmprune, llmprune.scoring.score, llmprune.compaction.compact\n"
        "assert 'llmprune._cuda' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
