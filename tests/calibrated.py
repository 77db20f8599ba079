"""A tiny model with calibration batches: what the tests of the search start from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mbq.architecture import Binding, bind
from mbq.calibration import CalibrationBatch, calibration_batches
from mbq.rows import Row
from tests.tiny import picture, tiny

ANSWERS = (
    "A red circle is left of a blue square.",
    "Two green triangles and the number 7 are in the picture, and a yellow star is left of the triangles.",
    "Yellow.",
    "There are three shapes.",
)


def row(answer: str, images: int, seed: int) -> Row:
    """A question, about ``images`` pictures or none, and its answer."""
    parts: list[dict[str, Any]] = [{"type": "image", "image": picture(seed + index)} for index in range(images)]
    asked = {"role": "user", "content": [*parts, {"type": "text", "text": "What is shown " + "here " * seed + "?"}]}
    return Row([asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}], f"row {seed}")


def batches_for(
    binding: Binding, processor: Any, batch_size: int, images: Sequence[int] = (1, 1, 0, 1), answers: Any = ANSWERS
) -> list[CalibrationBatch]:
    rows = [row(answer, count, seed) for seed, (answer, count) in enumerate(zip(answers, images, strict=True))]
    ids = set(binding.vision_tokens)
    return calibration_batches(rows, processor, ids, num_samples=len(rows), batch_size=batch_size)


def calibrated(family: str, batch_size: int = 2, **overrides: Any) -> tuple[Binding, list[CalibrationBatch]]:
    """A bound tiny model and four padded samples, one of them without a picture."""
    model, processor = tiny(family, **overrides)
    binding = bind(model)
    return binding, batches_for(binding, processor, batch_size)
