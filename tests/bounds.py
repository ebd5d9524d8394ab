"""Bounds on what one call may cost: seconds of work and megabytes above what was held before."""

from __future__ import annotations

import contextlib
import ctypes
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SECONDS, MEGABYTES, PATIENCE = 10, 500, 20


class TooLong(BaseException):
    """Not an Exception: no ``except`` of the program may take it for a mistake in the input."""


def held(word: str) -> float | None:
    """Megabytes of this process, VmRSS now or VmHWM at most; None where the system does not tell."""
    told = Path("/proc/self/status")
    found = re.search(rf"{word}:\s+(\d+) kB", told.read_text()) if told.exists() else None
    return int(found[1]) / 1024 if found else None


@contextlib.contextmanager
def timed(seconds: float = SECONDS) -> Iterator[None]:
    """Stops what works for longer, or waits for much longer; a busy machine's waiting is no fault."""

    def stop(number: int, frame: Any) -> None:
        raise TooLong(f"more than {seconds} s of work, or {PATIENCE * seconds} s of waiting")

    clocks = {signal.SIGPROF: signal.ITIMER_PROF, signal.SIGALRM: signal.ITIMER_REAL}
    before = {number: signal.signal(number, stop) for number in clocks}
    for number, clock in clocks.items():
        signal.setitimer(clock, seconds * (PATIENCE if number == signal.SIGALRM else 1))
    try:
        yield
    finally:
        for number, clock in clocks.items():
            signal.setitimer(clock, 0)
            signal.signal(number, before[number])


@contextlib.contextmanager
def lean(megabytes: float = MEGABYTES) -> Iterator[None]:
    """Fails when what happens inside takes more memory; anything is allowed where that cannot be measured."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before is not at hand
    start = held("VmRSS")
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak from here on; see proc(5)
    yield
    peak = held("VmHWM")
    if start is not None and peak is not None:
        assert peak - start < megabytes, f"{peak - start:.0f} MB above the start"


@contextlib.contextmanager
def bounded(seconds: float = SECONDS, megabytes: float = MEGABYTES) -> Iterator[None]:
    """Both."""
    with lean(megabytes), timed(seconds):
        yield
