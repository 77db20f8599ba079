"""Figures of run.json that are no right or wrong answers: text, and public benchmarks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mbq.report.panel import Table
from mbq.report.subjects import Subject
from mbq.report.wording import NOTHING, number

SOURCES = {"text": "Perplexity and divergence on text", "lmms_eval": "Public benchmarks (lmms-eval)"}
INTERVAL = {"estimate", "low", "high"}
MOST = 300  # rows of a table


def figure_tables(subjects: Sequence[Subject]) -> list[Table]:
    """A table a source that any run has, a row a figure, a column a run; names are the files' own."""
    tables = []
    for source, caption in SOURCES.items():
        found = {
            subject.label: dict(_figures(subject.run.info[source]))
            for subject in subjects
            if subject.run is not None and subject.run.info.get(source)
        }
        names = list(dict.fromkeys(name for figures in found.values() for name in figures))
        if names:
            rows = [[name, *(figures.get(name, NOTHING) for figures in found.values())] for name in names[:MOST]]
            more = f", the first {MOST} of {len(names)} figures" if len(names) > MOST else ""
            tables.append(Table(caption + more, ("figure", *found), rows))
    return tables


def _figures(content: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every number in nested objects, named by the keys that lead to it; an estimate with its interval is one."""
    if isinstance(content, Mapping) and set(content) == INTERVAL:
        estimate, low, high = (number(content[each]) for each in ("estimate", "low", "high"))
        yield name, f"{estimate} ({low} to {high})"
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _figures(value, f"{name} {key}".strip())
    elif isinstance(content, int | float) and not isinstance(content, bool):
        yield name, number(content) if isinstance(content, float) else f"{content:,}"
