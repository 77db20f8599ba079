"""Comparisons for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from mbq.evaluation.compare import Comparison, Flip, Line
from mbq.evaluation.table import plus_minus


def comparison_table(comparison: Comparison) -> Table:
    """A row a task and modality: accuracies, their difference, flips, agreement and McNemar's p."""
    title = f"{comparison.model} against {comparison.baseline}: right answers, % (± 95 % interval)"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    table.add_column("task", no_wrap=True)
    for head in ("before", "after", "difference", "lost", "gained", "agree", "p"):
        table.add_column(head, justify="right", no_wrap=True)
    for line in comparison.lines:
        whole = line.kind != "task"
        table.add_row(*_cells(line), style="bold" if whole else None, end_section=whole)
    return table


def _cells(line: Line) -> list[str]:
    return [
        line.name,
        f"{100 * line.before.estimate:.1f}",
        f"{100 * line.after.estimate:.1f}",
        plus_minus(line.difference, signed=True),
        str(line.lost),
        str(line.gained),
        f"{100 * line.agreement:.1f}",
        f"{line.p:.3f}" if line.p >= 0.0005 else "<0.001",
    ]


def flip_lines(flips: Sequence[Flip]) -> list[str]:
    """What was asked and what each run wrote, a few lines a question; nothing that a terminal would act on."""
    lines = []
    for flip in flips:
        lines.append(f"{flip.task} {flip.index}, {'lost' if flip.lost else 'gained'}: {_printable(flip.question)}")
        lines.append(f"  reference  {_printable(flip.reference)}")
        lines.append(f"  before     {_printable(flip.before)}")
        lines.append(f"  after      {_printable(flip.after)}")
    return lines


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text).strip()


def drop_line(comparison: Comparison, line: Line, max_drop: float, sure: bool) -> str:
    """Why a comparison fails."""
    value = line.difference.low if sure else line.difference.estimate
    what = "may have fallen by" if sure else "fell by"
    return (
        f"{comparison.model}: the {line.name} {what} {-100 * value:.2f} points against {comparison.baseline}, "
        f"more than --max-drop {max_drop:g}."
    )
