"""Every error llmprune raises on purpose. The text of each is one sentence: what was wrong, where, and what to do.

The command line prints that sentence and exits with code 2.
"""

from __future__ import annotations

from llmprune._core import DeviceError, LlmpruneError, PlanError, TensorError, TraceError

__all__ = [
    "CalibrationError",
    "CheckpointError",
    "DeviceError",
    "InputError",
    "LlmpruneError",
    "PlanError",
    "RankError",
    "RecoveryError",
    "TensorError",
    "TraceError",
    "VerificationError",
]


class CalibrationError(LlmpruneError):
    """Calibration data that cannot be used: empty, too short, token ids out of range, or a loss that is not finite."""


class CheckpointError(LlmpruneError):
    """A checkpoint folder that cannot be read or written."""


class VerificationError(LlmpruneError):
    """The compacted model does not equal its masked reference, or the C core another computation of the same."""


class RecoveryError(LlmpruneError):
    """A training that diverged."""


class InputError(LlmpruneError, ValueError):
    """An argument outside its documented domain."""


class RankError(LlmpruneError):
    """A run of several processes that cannot go on: they differ, or one of them failed or has gone."""
