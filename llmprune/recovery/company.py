"""Several processes that recover together: alike before they begin, and told when one has gone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from llmprune.checkpoints.record import versions
from llmprune.errors import RankError

_GONE = ("gloo/transport", "by peer", "Broken pipe", "remote process exited")
"""What the messages of a broken connection say; gloo raises them as plain RuntimeErrors."""


def agree(settings: Mapping[str, Any], data: str | None, model: str) -> None:
    """Refuse to train unless all processes of the run have the same.

    Args:
        settings: of the recovery.
        data: hash of what is learned.
        model: hash of names, sizes and some values of the weights.

    Raises:
        RankError: two processes differ.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    from llmprune.scoring.ranks import Ranks

    Ranks().agree(
        {
            "set of versions": versions(),
            "set of recovery data": data,
            "set of weights": model,
            "set of settings": dict(settings),
        }
    )


@contextmanager
def losing_no_one() -> Iterator[None]:
    """Say what a connection that breaks means; nothing has been published that is not complete.

    Raises:
        RankError: another process has gone.
    """
    try:
        yield
    except RuntimeError as error:
        broken = dist.is_available() and isinstance(error, (dist.DistBackendError, dist.DistNetworkError))
        if not broken and not any(part in str(error) for part in _GONE):
            raise
        raise RankError(
            f"another process of this recovery has gone ({str(error).strip().splitlines()[0][:160]}): its own output "
            "says why; the same command goes on from the last checkpoint"
        ) from error
