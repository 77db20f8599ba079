"""The paper's first figure: how much the loss feels vision and language tokens, a block a row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from mbq.errors import MBQError

if TYPE_CHECKING:
    from mbq.sensitivity import Sensitivity

PART_NAMES = {"attn": "attention", "mlp": "MLP"}
COLOURS = {"language": "#c1452b", "vision": "#2b6cb0"}
NO_VISION = "No vision tokens stand in this model's sequence: its blocks read pictures by cross-attention."
_BAR = 16


def sensitivity_table(sensitivity: Sensitivity) -> Table:
    """A row a block: mean absolute gradient of both modalities after attention and after the MLP, and their ratio.

    The bars show the attention's two values on one logarithmic scale. Of a model without vision tokens that is said.
    """
    table = Table(
        title="Mean |gradient| of the answer's loss; ratio: language / vision",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    if sensitivity.vision is None:
        table.caption, table.caption_justify = NO_VISION, "left"
    table.add_column("block", justify="right", no_wrap=True)
    for part in PART_NAMES:
        for column in ("language", "vision", "ratio"):
            table.add_column(f"{part}\n{column}", justify="right", no_wrap=True)
    table.add_column("attn, log scale:\nlanguage, vision", no_wrap=True)
    language = sensitivity.language
    nothing = (None,) * len(language["attn"])
    vision: Mapping[str, Sequence[float | None]] = sensitivity.vision or dict.fromkeys(PART_NAMES, nothing)
    low, high = _range([*language["attn"], *(value for value in vision["attn"] if value is not None)])
    for block in range(len(language["attn"])):
        cells = [str(block)]
        for part in PART_NAMES:
            cells += _cells(language[part][block], vision[part][block])
        bars = (
            f"[{COLOURS[modality]}]{_bar(values['attn'][block] or 0.0, low, high)}[/]"
            for modality, values in (("language", language), ("vision", vision))
        )
        table.add_row(*cells, "\n".join(bars))
    return table


def _cells(language: float, vision: float | None) -> list[str]:
    ratio = f"{language / vision:.1f}" if vision else "-"  # nothing attends to the last block's vision tokens
    return [f"{language:.1e}", "-" if vision is None else f"{vision:.1e}", ratio]


def _range(values: list[float]) -> tuple[float, float]:
    """Whole powers of ten around the values that are not zero."""
    positive = [value for value in values if value > 0]
    if not positive:
        raise MBQError("Every gradient is zero; calibrate on other samples or try --dtype float32.")
    return math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)) + 1e-9)


def _bar(value: float, low: float, high: float) -> str:
    if value <= 0:
        return ""
    return "█" * max(1, round(_BAR * (math.log10(value) - low) / max(high - low, 1)))


def save_sensitivity_picture(sensitivity: Sensitivity, path: Path, title: str) -> None:
    """Write a PNG: a panel for attention and one for the MLP, a block a row, one bar a modality, log scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    blocks = range(len(sensitivity.language["attn"]))
    sides = {"language": sensitivity.language, "vision": sensitivity.vision}
    by_modality = {modality: values for modality, values in sides.items() if values is not None}
    low, high = _range([value for values in by_modality.values() for part in PART_NAMES for value in values[part]])
    figure = Figure(figsize=(9, 1.8 + 0.3 * len(blocks)), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, (part, name) in zip(figure.subplots(1, 2, sharey=True), PART_NAMES.items(), strict=True):
        for shift, (modality, values) in zip((-0.2, 0.2), by_modality.items(), strict=False):
            rows = [block + shift for block in blocks]
            panel.barh(rows, values[part], height=0.4, color=COLOURS[modality], label=f"{modality} tokens")
        panel.set_xscale("log")
        panel.set_title(name)
        panel.set_xlabel("mean |dL/dY|")
        panel.set_yticks(list(blocks))
        panel.set_xlim(10**low, 10**high)
    first = figure.axes[0]
    first.set_ylabel("block")
    first.invert_yaxis()
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
