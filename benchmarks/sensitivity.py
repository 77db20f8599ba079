"""Gradients a block for language and vision tokens of the three reference models: docs/sensitivity.md and its pictures.

python -m benchmarks.sensitivity
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import mbq
from benchmarks.results import FAMILIES, ROOT, SAMPLES
from benchmarks.results_page import FAMILY_NAMES, markdown
from mbq.figures import PART_NAMES, save_sensitivity_picture
from mbq.pipeline import measure_sensitivity
from mbq.rows import read_rows
from mbq.sensitivity import Sensitivity
from mbq.world import write

HEAD = """# Sensitivity

Written by `python -m benchmarks.sensitivity`, as `mbq sensitivity` measures it: the mean absolute gradient of the
answer's loss with respect to the output of attention (o_proj) and of the MLP (down_proj), over the positions that
predict an answer token ("language") and over the vision tokens, averaged over {samples} calibration samples of the task
"{task}". The paper (arXiv 2412.19509) finds the language gradient more than ten times the vision gradient in
LLaVA-OneVision-7B. In the last block vision tokens have none: nothing attends to them any more.
"""


def page(found: dict[str, Sensitivity], task: str) -> str:
    """Tables of every model's gradients and the ratios' range in a sentence."""
    parts = [HEAD.format(samples=SAMPLES, task=task)]
    for family, sensitivity in found.items():
        parts += [f"## {FAMILY_NAMES[family]}\n", table(sensitivity), "", sentence(sensitivity), ""]
        parts += [f"![Gradients of {FAMILY_NAMES[family]} a block](sensitivity-{family}.png)", ""]
    return "\n".join(parts)


def table(sensitivity: Sensitivity) -> str:
    """A row a block."""
    columns = [f"{name}, {column}" for name in PART_NAMES.values() for column in ("language", "vision", "ratio")]
    rows = []
    for block in range(len(sensitivity.language["attn"])):
        row = [str(block)]
        for part in PART_NAMES:
            language, vision = sensitivity.language[part][block], sensitivity.vision[part][block]
            row += [f"{language:.2e}", f"{vision:.2e}", f"{language / vision:.1f}" if vision else "no vision gradient"]
        rows.append(row)
    return markdown(["block", *columns], rows)


def sentence(sensitivity: Sensitivity) -> str:
    ratios: list[float] = []
    for part in PART_NAMES:
        pairs = zip(sensitivity.language[part], sensitivity.vision[part], strict=True)
        ratios += [language / vision for language, vision in pairs if vision]
    if not ratios:
        return "No block has a vision gradient."
    return f"Where vision tokens have a gradient, language's is {min(ratios):.1f} to {max(ratios):.1f} times as large."


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Measure the reference models' sensitivity; write docs/sensitivity.md."
    )
    parser.add_argument("--models", type=Path, default=ROOT / "models", help="the folder of the families' folders")
    parser.add_argument("--output", type=Path, default=ROOT / "docs")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--calibrate", default="caption", help="the task whose rows calibrate")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(arguments)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="mbq-sensitivity-") as folder:
        rows = read_rows(write(folder, split="calibration", tasks=[args.calibrate], per_task=SAMPLES))
        for family in args.families:
            model, processor = (
                mbq.load(args.models / family, device=args.device),
                mbq.load_processor(args.models / family),
            )
            found[family] = measure_sensitivity(
                model, processor, data=rows, num_calibration_samples=SAMPLES, batch_size=32
            )
            title = f"{FAMILY_NAMES[family]}: language and vision tokens"
            save_sensitivity_picture(found[family], args.output / f"sensitivity-{family}.png", title)
    (args.output / "sensitivity.md").write_text(page(found, args.calibrate))


if __name__ == "__main__":
    main()
