"""What a model writes: greedy answers to many questions, several at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mbq.evaluation.packed import on_device
from mbq.evaluation.questions import encode, prompt_of
from mbq.progress import Progress, silent
from mbq.rows import Row

# Whatever generation_config.json asks for: an answer is greedy, so that it is the one that ``score`` judges.
GREEDY = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0}


@torch.inference_mode()
def answers(
    model: Any,
    processor: Any,
    rows: Sequence[Row],
    max_new_tokens: int = 64,
    batch_size: int = 32,
    progress: Progress = silent,
) -> list[str]:
    """What the model writes by greedy decoding, one text a row; the rows' own answers are not shown to it.

    Prompts of about the same length go through the model together, padded on the left, over the model's own cache.
    """
    prompts = [prompt_of(row, processor) for row in rows]
    texts: dict[int, str] = {}
    for some in _batches(rows, prompts, batch_size):
        inputs = encode([prompts[i] for i in some], [rows[i] for i in some], processor, padding_side="left")
        written = model.generate(**on_device(inputs, model), **GREEDY, max_new_tokens=max_new_tokens)
        new = written[:, inputs["input_ids"].shape[1] :]
        texts |= dict(zip(some, processor.tokenizer.batch_decode(new, skip_special_tokens=True), strict=True))
        progress("write answers", len(texts), len(rows), "")
    return [texts[i] for i in range(len(rows))]


def _batches(rows: Sequence[Row], prompts: Sequence[str], batch_size: int) -> list[list[int]]:
    """Rows with as many pictures as each other, the shortest prompts first, so that little is padded."""
    kinds: dict[bool, list[int]] = {}
    for i in sorted(range(len(rows)), key=lambda i: (len(rows[i].images), len(prompts[i]))):
        kinds.setdefault(bool(rows[i].images), []).append(i)
    return [part[start : start + batch_size] for part in kinds.values() for start in range(0, len(part), batch_size)]
