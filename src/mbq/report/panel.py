"""What a section of the page is made of: charts, the controls that they share, and the same numbers as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mbq.report.charts import Spec

SEPARATOR = "\x1f"  # between the values of controls, as in page.js


@dataclass(frozen=True)
class Control:
    """A labelled field that sets the parameter ``param`` of every chart of its panel.

    options  (value, what is shown); numbers as values make a slider, texts a list
    """

    param: str
    label: str
    options: tuple[tuple[Any, str], ...]
    value: Any

    @property
    def slides(self) -> bool:
        return all(isinstance(value, int) for value, _ in self.options)


@dataclass(frozen=True)
class Chart:
    name: str
    title: str
    spec: Spec


@dataclass(frozen=True)
class Table:
    """``rows`` hold a cell a column of ``head``, the first of which heads its row; ``strong`` rows sum others up."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Panel:
    """A section's charts.

    readout  what the controls' values stand for, as a sentence, by those values joined with SEPARATOR
    notes    what a reader must know to read the charts, a sentence each
    """

    name: str
    charts: Sequence[Chart]
    tables: Sequence[Table]
    controls: Sequence[Control] = ()
    readout: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()


def chooser(
    param: str, label: str, values: Sequence[Any], names: Mapping[Any, str] | None = None, first: Any = None
) -> list[Control]:
    """A control over ``values``, or none where there is nothing to choose; ``first``, or the first, is chosen."""
    options = tuple((value, (names or {}).get(value, str(value))) for value in values)
    return [Control(param, label, options, values[0] if first is None else first)] if len(values) > 1 else []


def key(*values: Any) -> str:
    return SEPARATOR.join(str(value) for value in values)
