"""How far a long step is: bars on a terminal, a line now and then in a log, nothing in a library call."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

from mbq import ranks

# progress(step, done, total, note): the step's name, how many of its parts are done, out of how many, and what to show
# beside them, such as "block 3, loss 0.0121". done == total ends the step.
Progress = Callable[[str, int, int, str], None]

SECONDS_BETWEEN_LINES = 20.0


def silent(step: str, done: int, total: int, note: str = "") -> None:
    """The progress of a library call."""


def memory_in_use() -> str:
    """What the process holds: GPU memory where there is a GPU in use, else resident memory; such as "14.6 GB"."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        used = sum(torch.cuda.memory_allocated(i) for i in range(torch.cuda.device_count()))
    else:
        import psutil

        used = psutil.Process().memory_info().rss
    return f"{used / 1e9:.1f} GB"


@contextmanager
def shown(console: Console) -> Iterator[Progress]:
    """A Progress that writes to ``console``, on rank 0: bars if it is a terminal, else plain lines."""
    if ranks.rank() > 0:
        yield silent
        return
    if not console.is_terminal:
        yield _Lines(console)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[memory]}"),
        TextColumn("{task.fields[note]}"),
    )
    tasks = {}
    with Bars(*columns, console=console) as bars:

        def update(step: str, done: int, total: int, note: str = "") -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step, total=total, memory="", note="")
            bars.update(tasks[step], completed=done, total=total, note=note, memory=memory_in_use())

        yield update


class _Lines:
    """A line when a step begins, one every SECONDS_BETWEEN_LINES, and one when it ends."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.started: dict[str, float] = {}
        self.last_line = 0.0

    def __call__(self, step: str, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        begins = step not in self.started
        started = self.started.setdefault(step, now)
        if begins or done >= total or now - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = now
            left = (now - started) / done * (total - done) if done else None
            parts = [f"{step}: {done}/{total}", f"{now - started:.0f} s"]
            parts += [f"{left:.0f} s left"] if left else []
            parts += [memory_in_use()] + ([note] if note else [])
            self.console.print(", ".join(parts), highlight=False)
