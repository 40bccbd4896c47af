"""Short stretches of code that Ctrl-C may not tear apart."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Hold SIGINT back until the block is done, then deliver it.

    Used where a model is between two valid states. Python runs signal handlers in the main thread only, so elsewhere
    there is nothing to hold back. An exception of the block itself is raised in preference to the interrupt. A handler
    that was not installed from Python cannot be put back by Python and is left alone.
    """
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or previous in (None, signal.SIG_IGN):
        yield
        return
    pending: list[FrameType | None] = []
    signal.signal(signal.SIGINT, lambda _number, frame: pending.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if pending:
        if callable(previous):
            previous(signal.SIGINT, pending[0])
        else:
            raise KeyboardInterrupt
