"""A diagnosis for people: tables and findings on a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from mbq.diagnosis.bad_answers import KINDS, Answered, definitions
from mbq.diagnosis.measurements import Measurements
from mbq.diagnosis.outliers import MASSIVE_RATIO, MASSIVE_VALUE, Outlier
from mbq.diagnosis.run import Diagnosis
from mbq.evaluation.table import plus_minus
from mbq.figures import PART_NAMES

OUTLIERS_SHOWN = 6
MODALITIES = ("language", "vision")


def show(found: Diagnosis, console: Console) -> None:
    """Print what was measured, then what it means."""
    m = found.measurements
    console.print(errors_table(m))
    console.print(outlier_table(m.propagation.outliers))
    _line(console, massive_line(m))
    if m.accuracy:
        console.print(accuracy_table(m))
    if m.limits is not None:
        console.print(answers_table(m.answers))
        for kind, text in definitions(m.limits).items():
            _line(console, f"  {kind}: {text}.")
    if m.speed is not None:
        console.print(speed_table(m))
    for note in m.notes:
        _line(console, f"Not looked at: {note}")
    console.print()
    if not found.findings:
        _line(console, "Nothing wrong was found.")
    for number, finding in enumerate(found.findings, start=1):
        console.print(f"{number}. {finding.title}", style="bold", markup=False, highlight=False, soft_wrap=True)
        _line(console, f"   {finding.evidence}")
        _line(console, "   Try: " + finding.advice.replace("; or ", "\n        or "))


def errors_table(m: Measurements) -> Table:
    """Three rows a block: errors with the model's own inputs, on float inputs, and what rounding alone would give."""
    table = _table(f"Relative output errors of blocks on {m.propagation.samples} samples")
    table.add_column("block", justify="right")
    table.add_column("")
    for part in PART_NAMES.values():
        for tokens in MODALITIES:
            table.add_column(f"{part}\n{tokens}", justify="right", no_wrap=True)
    for block, errors in enumerate(m.propagation.blocks):
        for name, each in (("accumulated", errors.accumulated), ("own", errors.own), ("expected", errors.expected)):
            cells = [_number(each[part][tokens]) for part in PART_NAMES for tokens in MODALITIES]
            last = each is errors.expected
            table.add_row(str(block) if each is errors.accumulated else "", name, *cells, end_section=last)
    table.caption = f"own: on float inputs\nexpected: the float block rounded to nearest at {m.scheme.name}"
    table.caption_justify = "left"
    return table


def outlier_table(found: Sequence[Outlier]) -> Table:
    """The most extreme channels of what linears read."""
    table = _table("Outlier channels of what packed linears read, the largest")
    for name in ("block", "linears", "tokens", "channel", "times the median", "share"):
        table.add_column(name, justify="left" if name in ("linears", "tokens") else "right")
    for each in sorted(found, key=lambda each: each.ratio, reverse=True)[:OUTLIERS_SHOWN]:
        cells = (each.modality, str(each.channel), f"{each.ratio:.1f}", f"{each.share:.1%}")
        table.add_row(str(each.block), ", ".join(name.rpartition(".")[2] for name in each.linears), *cells)
    table.caption = "max |x| of the channel over the median channel's; its share of the sum of squares"
    table.caption_justify = "left"
    return table


def massive_line(m: Measurements) -> str:
    blocks = [str(each.block) for each in m.propagation.massive if each.massive]
    largest = max(m.propagation.massive, key=lambda each: each.ratio)
    where = f"behind blocks {', '.join(blocks)}" if blocks else "none"
    return (
        f"Massive activations of first tokens (above {MASSIVE_VALUE:.0f}, and {MASSIVE_RATIO:.0f} times the "
        f"token's median): {where}; the largest is {largest.value:.0f}, {largest.ratio:.0f} times the median, behind "
        f"block {largest.block}."
    )


def accuracy_table(m: Measurements) -> Table:
    table = _table("Right answers, % (± 95 % interval)")
    for name in ("tasks", "questions", "float", "quantized", "difference"):
        table.add_column(name, justify="left" if name == "tasks" else "right", no_wrap=True)
    for kind, each in m.accuracy.items():
        name = f"{kind}: {', '.join(each.tasks)}" if len(each.tasks) < 3 else f"{kind}: mean of {len(each.tasks)} tasks"
        means = (plus_minus(each.reference), plus_minus(each.quantized), plus_minus(each.difference, signed=True))
        table.add_row(name, str(each.questions), *means)
    return table


def answers_table(found: Sequence[Answered]) -> Table:
    """How many answers are bad, and in which way."""
    table = _table(f"{len(found)} answers")
    for name in ("kind", "float", "quantized"):
        table.add_column(name, justify="left" if name == "kind" else "right")
    theirs, ours = Counter(each.float_kind for each in found), Counter(each.kind for each in found)
    for kind in (None, *KINDS):
        table.add_row(kind or "right", str(theirs[kind]), str(ours[kind]))
    return table


def speed_table(m: Measurements) -> Table:
    speed = m.speed
    assert speed is not None
    table = _table(f"A decode step on {speed.device}")
    for name in ("", "ms", "95 % interval", "MB of weights", "GB/s"):
        table.add_column(name, justify="right" if name else "left")
    for name, step in (("float", speed.reference), ("quantized", speed.quantized)):
        if step is not None:
            span = f"{1e3 * step.low:.2f} to {1e3 * step.high:.2f}"
            table.add_row(
                name, f"{1e3 * step.seconds:.2f}", span, f"{step.bytes / 1e6:.1f}", f"{step.bandwidth / 1e9:.2g}"
            )
    kernels = ", ".join(f"{name} in {count} layers" for name, count in speed.kernels.items())
    table.caption = f"kernel: {kernels}; a copy moves {speed.bandwidth / 1e9:.1f} GB/s"
    table.caption_justify = "left"
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def _number(error: float | None) -> str:
    return "-" if error is None else f"{error:.4f}"


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
