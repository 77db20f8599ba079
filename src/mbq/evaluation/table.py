"""Results as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from mbq.evaluation.results import Results
from mbq.evaluation.statistics import Interval


def task_table(results: Sequence[Results], names: Sequence[str] | None = None) -> Table:
    """A row a task, a column a model: accuracy in per cent, and the longer arm of its 95 % interval."""
    first = results[0]
    table = Table(title="Right answers a task, % (95 % interval)", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("task")
    for name in names or [result.model for result in results]:
        table.add_column(name, justify="right")
    for group in (first.image_tasks, first.text_tasks):
        for task in group:
            table.add_row(task, *(_plus_minus(result.accuracy(task)) for result in results))
        if len(group) > 1:
            kind = "image" if group is first.image_tasks else "text"
            table.add_row(
                f"mean, {len(group)} {kind} tasks",
                *(_plus_minus(result.mean(group)) for result in results),
                style="bold",
                end_section=True,
            )
    return table


def summary_table(results: Sequence[Results]) -> Table:
    """A row a model: means over image and text tasks, and the paired difference to the first model."""
    baseline = results[0]
    groups = [("image tasks", baseline.image_tasks), ("text tasks", baseline.text_tasks)]
    groups = [(kind, group) for kind, group in groups if group]
    title = "Mean accuracy, % (95 % interval; differences: paired bootstrap)"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("model")
    for kind, _ in groups:
        table.add_column(kind, justify="right")
        if len(results) > 1:
            table.add_column(f"less {baseline.model}", justify="right")
    for result in results:
        cells = []
        for _, group in groups:
            cells.append(result.mean(group).percent())
            if len(results) > 1:
                cells.append("" if result is baseline else result.minus(baseline, group).percent(signed=True))
        table.add_row(result.model, *cells)
    return table


def _plus_minus(interval: Interval) -> str:
    arm = max(interval.high - interval.estimate, interval.estimate - interval.low)
    return f"{100 * interval.estimate:.1f} ±{100 * arm:.1f}"
