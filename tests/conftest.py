"""What every test starts from."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    """Take interrupts as a terminal's process does: a shell has what it runs in the background ignore them."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
