"""Results as a table for the terminal, narrow enough for 80 columns with four models."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from mbq.evaluation.results import Results
from mbq.evaluation.statistics import Interval


def results_table(results: Sequence[Results], title: str = "", names: Sequence[str] | None = None) -> Table:
    """A row a task, a column a model: right answers in per cent, and the longer arm of the 95 % interval.

    Under each kind of tasks, image and text, stand their mean and its difference to the first model, whose interval is
    the paired bootstrap's. ``names`` head the columns in place of the models' names.
    """
    names = list(names or (result.model for result in results))
    baseline = results[0]
    heading = title or "Right answers, % (± 95 % interval)"
    table = Table(title=heading, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    table.add_column("task", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right")
    for kind, group in (("image", baseline.image_tasks), ("text", baseline.text_tasks)):
        for task in group:
            table.add_row(
                task, *(plus_minus(result.accuracy(task)) for result in results), end_section=task == group[-1]
            )
        if not group:
            continue
        mean = "mean of 1 task" if len(group) == 1 else f"mean of {len(group)} tasks"
        means = [plus_minus(result.mean(group)) for result in results]
        table.add_row(f"{kind}: {mean}", *means, style="bold", end_section=len(results) == 1)
        if len(results) > 1:
            differences = [plus_minus(result.minus(baseline, group), signed=True) for result in results[1:]]
            table.add_row(f"  less {names[0]}", "", *differences, end_section=True)
    return table


def plus_minus(interval: Interval, signed: bool = False) -> str:
    """``61.2 ±2.1``, in per cent, with the longer arm where the two differ."""
    arm = max(interval.high - interval.estimate, interval.estimate - interval.low)
    return f"{100 * interval.estimate:{'+' if signed else ''}.1f} ±{100 * arm:.1f}"
