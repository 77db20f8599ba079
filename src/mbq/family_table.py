"""What mbq knows of model families, as a table: ``mbq families``, and the same in docs/families.md."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from mbq.architecture import EACH, Architecture
from mbq.families import FAMILIES, REFUSED, ROUTER_PATH, TRAINED

COLUMNS = ("models", "class", "kept in 16 bits", "linears, group by group", "tested on")


def family_rows() -> list[tuple[str, ...]]:
    """A row an architecture, with a cell for each of ``COLUMNS``."""
    return [
        (
            architecture.models,
            name,
            ", ".join(_plain(pattern) for pattern in architecture.kept),
            _groups(architecture),
            "a trained model, random ones" if name in TRAINED and architecture is architectures[0] else "random models",
        )
        for name, architectures in FAMILIES.items()
        for architecture in architectures
    ]


def family_table() -> Table:
    """Models, classes and linears: what fits a terminal of 80 columns in two lines a row."""
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in (COLUMNS[0], COLUMNS[1], COLUMNS[3]):
        made.add_column(column, no_wrap=column == "class", overflow="fold")
    for models, name, _, linears, _ in family_rows():
        made.add_row(models, name, linears)
    return made


def markdown_table() -> str:
    """The families, and what is refused."""
    return f"{_markdown(COLUMNS, family_rows())}\n\n{_markdown(('not quantized', 'has'), list(REFUSED.items()))}"


def _markdown(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ("---",) * len(columns), *rows))


def refused_lines() -> str:
    """A sentence for each class that is known and not quantized."""
    return "\n".join(f"Not quantized: {name}, which has {reason}." for name, reason in REFUSED.items())


def _plain(pattern: str) -> str:
    """A pattern of ``Architecture.kept`` without the signs of regular expressions."""
    return pattern.removeprefix("re:.*").removesuffix(".*").removesuffix("$").replace("\\", "").rstrip(".")


def _groups(architecture: Architecture) -> str:
    """'q k v, o' and so on: the linears of one group side by side, kinds of blocks apart; experts' with a star."""
    return "; ".join(
        ", ".join(" ".join(_linear(path) for path in group.linears) for group in kind.groups)
        for kind in architecture.kinds
    )


def _linear(path: str) -> str:
    name = path.rpartition(".")[2].removesuffix("_proj")
    if path == ROUTER_PATH:
        return "router"
    return f"{name}*" if EACH in path else name
