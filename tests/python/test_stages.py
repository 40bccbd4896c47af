"""Stages: time, peak memory and announcements; and interrupts held back."""

from __future__ import annotations

import mmap
import signal
import sys
import threading

import pytest

from llmprune.machine.interrupts import deferred_interrupts
from llmprune.pipeline.stages import Stages


def test_time_and_peak_of_each_stage() -> None:
    said: list[tuple[str, str]] = []
    stages = Stages(lambda name, doing: said.append((name, doing)))
    with stages.stage("big", "touching memory"):
        block = bytearray(80 << 20)
        block[:: 1 << 12] = b"x" * len(block[:: 1 << 12])
        del block
    with pytest.raises(ValueError, match="no"), stages.stage("small"):
        raise ValueError("no")
    assert said == [("big", "touching memory"), ("small", "")]
    big, small = stages.done
    assert (big.name, small.name) == ("big", "small")
    assert big.seconds > small.seconds >= 0
    assert big.peak > 80 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can start counting anew")
def test_a_peak_is_the_stage_s_own() -> None:
    stages = Stages()
    with stages.stage("big"), mmap.mmap(-1, 200 << 20) as block:  # a heap may keep what is freed
        block[:: mmap.PAGESIZE] = b"x" * len(range(0, len(block), mmap.PAGESIZE))
    with stages.stage("small"):
        pass
    big, small = stages.done
    if small.peak == big.peak:
        pytest.skip("this system does not let a process reset its peak")
    assert small.peak < big.peak - (150 << 20)


class TestDeferredInterrupts:
    def test_an_interrupt_comes_after_the_block(self) -> None:
        reached = []
        with pytest.raises(KeyboardInterrupt), deferred_interrupts():  # noqa: PT012
            signal.raise_signal(signal.SIGINT)
            reached.append(1)
        assert reached == [1]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_an_error_goes_before_the_interrupt(self) -> None:
        with pytest.raises(ValueError, match="first"), deferred_interrupts():  # noqa: PT012
            signal.raise_signal(signal.SIGINT)
            raise ValueError("first")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_blocks_nest(self) -> None:
        reached = []
        with pytest.raises(KeyboardInterrupt), deferred_interrupts():  # noqa: PT012
            with deferred_interrupts():
                signal.raise_signal(signal.SIGINT)
            reached.append(1)
        assert reached == [1]

    def test_other_threads_have_nothing_to_hold_back(self) -> None:
        reached = []

        def work() -> None:
            with deferred_interrupts():
                reached.append(1)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert reached == [1]
