"""Where the real models and texts lie: LLMPRUNE_DATA, or shared/data beside the checkout."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("LLMPRUNE_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))

needs_data = pytest.mark.skipif(
    not (DATA / "models").is_dir(), reason="no real models and texts (LLMPRUNE_DATA names their folder)"
)
