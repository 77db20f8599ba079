"""Conversations for the tests of token roles, in as few words as possible."""

from __future__ import annotations

from typing import Any

from mbq.calibration import NO_LABEL, CalibrationBatch, calibration_batches
from mbq.rows import Row
from tests.tiny import picture

END = "<|im_end|>"


def vision_ids(processor: Any) -> set[int]:
    return {processor.tokenizer.convert_tokens_to_ids(processor.image_token)}


def row(*turns: Any, where: str = "calib.jsonl, line 1") -> Row:
    """Turns are texts, the user's first; a number in a user's list is a picture of that seed."""
    messages = []
    for index, turn in enumerate(turns):
        parts = turn if isinstance(turn, list) else [turn]
        content = [
            {"type": "image", "image": picture(part)} if isinstance(part, int) else {"type": "text", "text": part}
            for part in parts
        ]
        messages.append({"role": ("user", "assistant")[index % 2], "content": content})
    return Row(messages, where)


def one(row: Row, processor: Any, **options: Any) -> CalibrationBatch:
    (batch,) = calibration_batches([row], processor, vision_ids(processor), num_samples=1, **options)
    return batch


def said(processor: Any, batch: CalibrationBatch, index: int = 0) -> str:
    labels = batch.labels[index]
    return processor.tokenizer.decode(labels[labels != NO_LABEL])
