"""The trained InternVL of this repository, rounded to nearest, and a quick diagnosis of what tests do to it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mbq
from mbq.diagnosis import Diagnosis, diagnose
from mbq.rows import Row, read_rows
from mbq.world import write

MODEL = Path(__file__).parents[1] / "models" / "internvl"
TASKS = ("house", "founder", "heir", "colour", "reading", "towns", "arithmetic")


class Trained:
    """The float model, its processor, and 40 questions of five tasks with pictures and two without."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = mbq.load(MODEL)
        self.processor: Any = mbq.load_processor(MODEL)
        self.rows: list[Row] = read_rows(write(folder, "test", TASKS, per_task=40))
        self.made: dict[str, Any] = {}

    def rounded(self, scheme: str) -> Any:
        """The model rounded to nearest, a new one each time."""
        if scheme not in self.made:
            self.made[scheme] = mbq.quantize(self.model, self.processor, scheme=scheme, method="rtn").model
        return copy.deepcopy(self.made[scheme])

    def examine(
        self, quantized: Any, baseline: Any = None, rows: Sequence[Row] | None = None, **options: Any
    ) -> Diagnosis:
        few = {"samples": 12, "limit": 40, "answers": 0, "max_new_tokens": 12, "batch_size": 16, "speed": False}
        return diagnose(
            quantized, baseline or self.model, self.processor, data=list(rows or self.rows), **few | options
        )


def rules(found: Diagnosis) -> list[str]:
    return [finding.rule for finding in found.findings]


def blocks(model: Any) -> Any:
    """The decoder's."""
    return model.model.language_model.layers
