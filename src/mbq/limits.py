"""Bounds on what a folder can make this process do: seconds, and bytes of address space."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mbq.errors import MBQError


class _TimeIsUp(BaseException):
    """Not an Exception, so that nothing on the way up takes it for one of its own."""


@contextmanager
def time_limit(seconds: float, sentence: str) -> Iterator[None]:
    """Raise MBQError(``sentence``) where the block takes longer than ``seconds``.

    By the system's timer, which interrupts Python code and regular expressions. Only the main thread gets its signal,
    and Windows has none: there, the block runs without a limit.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TimeIsUp

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _TimeIsUp:
        raise MBQError(sentence) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if before is None else before)


@contextmanager
def memory_limit(more: int, sentence: str) -> Iterator[None]:
    """Raise MBQError(``sentence``) where the block makes the process grow by more than about ``more`` bytes.

    By the limit on its address space, which all threads share, so the block should be short. Linux only.
    """
    if sys.platform != "linux":
        yield
        return
    import resource

    with open("/proc/self/statm", "rb", buffering=0) as file:
        now = int(file.read(100).split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    bounds = [now + more, *(bound for bound in (soft, hard) if bound != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_AS, (min(bounds), hard))
    try:
        yield
    except MemoryError:
        raise MBQError(sentence) from None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
