"""What a model writes: greedy answers to many questions, several at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mbq.evaluation.packed import on_device
from mbq.evaluation.questions import encode, pictured, prompt_of
from mbq.progress import Progress, silent
from mbq.rows import Row

# Whatever generation_config.json asks for: an answer is greedy, so that it is the one that ``score`` judges.
GREEDY = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0}


def answers(
    model: Any,
    processor: Any,
    rows: Sequence[Row],
    max_new_tokens: int = 64,
    batch_size: int = 32,
    progress: Progress = silent,
) -> list[str]:
    """What the model writes by greedy decoding, one text a row; the rows' own answers are not shown to it."""
    prompts = [prompt_of(row, processor) for row in rows]
    options = {**GREEDY, "max_new_tokens": max_new_tokens}
    return replies(model, processor, rows, prompts, options, batch_size, progress)


@torch.inference_mode()
def replies(
    model: Any,
    processor: Any,
    rows: Sequence[Row],
    prompts: Sequence[str],
    options: dict[str, Any],
    batch_size: int = 32,
    progress: Progress = silent,
) -> list[str]:
    """What ``model.generate`` writes with ``options`` behind ``prompts``, which show the rows' pictures.

    Prompts of about the same length go through the model together, padded on the left, over the model's own cache.
    """
    texts: dict[int, str] = {}
    pad = processor.tokenizer.pad_token_id
    ends = model.generation_config.eos_token_id
    options = {"pad_token_id": pad if pad is not None else ends[0] if isinstance(ends, list) else ends, **options}
    for some in _batches(rows, prompts, processor, batch_size):
        inputs = encode([prompts[i] for i in some], [rows[i] for i in some], processor, padding_side="left")
        written = model.generate(**on_device(inputs, model), **options)
        new = written[:, inputs["input_ids"].shape[1] :]
        texts |= dict(zip(some, processor.tokenizer.batch_decode(new, skip_special_tokens=True), strict=True))
        progress("write answers", len(texts), len(rows), "")
    return [texts[i] for i in range(len(rows))]


def _batches(rows: Sequence[Row], prompts: Sequence[str], processor: Any, batch_size: int) -> list[list[int]]:
    """Rows with pictures and rows without apart, the shortest prompts first, so that little is padded."""
    kinds: dict[int, list[int]] = {}
    for i in sorted(range(len(rows)), key=lambda i: (len(rows[i].images), len(prompts[i]))):
        kinds.setdefault(pictured(rows[i], processor), []).append(i)
    return [part[start : start + batch_size] for part in kinds.values() for start in range(0, len(part), batch_size)]
