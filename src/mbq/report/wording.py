"""Numbers as a reader takes them in."""

from __future__ import annotations

from typing import Any

from mbq.evaluation.statistics import Interval

PARTS = {"attn": "attention", "mlp": "MLP"}
METHODS = {"rtn": "RTN", "awq": "AWQ", "mbq": "MBQ", "smoothquant": "SmoothQuant", "fixed": "fixed factor"}
MINUS = "\u2212"
NOTHING = "\u2013"  # in a cell that has no number


def size(count: Any) -> str:
    """Bytes as MB or GB; a dash for what is not known."""
    if not isinstance(count, int | float):
        return NOTHING
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def duration(seconds: Any) -> str:
    if not isinstance(seconds, int | float):
        return NOTHING
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def number(value: Any) -> str:
    """Three digits that count."""
    return f"{value:.3g}" if isinstance(value, int | float) else NOTHING


def percent(interval: Interval) -> str:
    return interval.percent()


def points(interval: Interval) -> str:
    """A difference in points of a per cent, with a minus sign that is as wide as the plus."""
    return interval.percent(signed=True).replace("-", MINUS)


def counted(count: int, thing: str) -> str:
    return f"{count:,} {thing}" + ("" if count == 1 else "s")
