"""Questions as tensors: tokenized once, then put to any number of models with the same processor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mbq.errors import MBQError
from mbq.progress import Progress, silent
from mbq.rows import Row, text_of

NO_TASK = "questions"  # what rows without a task are counted under


@dataclass(frozen=True)
class Batch:
    """Questions with their reference answers, right-padded, and where the model predicts which token.

    inputs     what the model's forward takes, on the CPU until a model needs it elsewhere
    rows       [question] numbers of the rows
    positions  [answer token] flat index into [question, token] of the position that predicts the token
    labels     [answer token] the token; after the answer stands the end-of-turn token
    question   [answer token] which question of the batch
    ends       [answer token] bool, the end-of-turn tokens
    """

    inputs: dict[str, Any]
    rows: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    question: torch.Tensor
    ends: torch.Tensor


@dataclass(frozen=True)
class Questions:
    """Prepared questions, in batches of similar length.

    tasks        a task a row
    pictures     [row] the number of the row's picture; rows about the same picture share it
    image_tasks  the tasks that show pictures
    digest       of rows, so that results are only compared on the same questions
    """

    batches: list[Batch]
    tasks: list[str]
    pictures: np.ndarray
    image_tasks: tuple[str, ...]
    digest: str
    embedded: dict[str, list[dict[str, Any]]] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.tasks)


def select(rows: Sequence[Row], tasks: Sequence[str] | None = None, limit: int | None = None) -> list[Row]:
    """The rows of these tasks (None: of all), the first ``limit`` of each. Raises MBQError for an unknown task."""
    known = dict.fromkeys(task_of(row) for row in rows)
    for task in tasks or ():
        if task not in known:
            raise MBQError(f"Unknown task {task!r}; choose from {', '.join(known)}.")
    counts: dict[str, int] = dict.fromkeys(known, 0)
    chosen = []
    for row in rows:
        counts[task_of(row)] += 1
        if (tasks is None or task_of(row) in tasks) and (limit is None or counts[task_of(row)] <= limit):
            chosen.append(row)
    return chosen


def task_of(row: Row) -> str:
    """What the row is counted under."""
    return row.task or NO_TASK


def prompt_of(row: Row, processor: Any) -> str:
    """The conversation before the last answer, as text that ends where ``generate`` would begin."""
    if row.messages[-1]["role"] != "assistant":
        raise MBQError(
            f"{row.where}: the last message is no answer; end the row with the assistant's reference answer."
        )
    return processor.apply_chat_template(row.chat[:-1], add_generation_prompt=True, tokenize=False)


def prepare(rows: Sequence[Row], processor: Any, batch_size: int = 64, progress: Progress = silent) -> Questions:
    """Tokenize questions and reference answers; the processor sees every row once, however many models follow.

    The prompt ends as it does before ``generate``, then come the answer's own tokens. (A chat template may write
    something else before an answer in the middle of a conversation than at its end: LLaVA-OneVision's does.)
    Raises MBQError for no rows, and for a row whose last message is no answer.
    """
    if not rows:
        raise MBQError("There are no questions to evaluate; give rows with --data.")
    prompts = [prompt_of(row, processor) for row in rows]
    answers = [text_of(row.messages[-1]) for row in rows]
    # questions with and without pictures never share a batch: pixel values are there for all rows, or for none
    order = sorted(range(len(rows)), key=lambda i: (bool(rows[i].images), len(prompts[i]) + len(answers[i])))
    with_pictures = sum(bool(row.images) for row in rows)
    batches: list[Batch] = []
    for part in (order[: len(rows) - with_pictures], order[len(rows) - with_pictures :]):
        for start in range(0, len(part), batch_size):
            chosen = part[start : start + batch_size]
            batches.append(_batch(chosen, rows, prompts, answers, processor))
            progress("read questions", sum(len(batch.rows) for batch in batches), len(rows), "")
    return Questions(
        batches=batches,
        tasks=[task_of(row) for row in rows],
        pictures=_picture_numbers(rows),
        image_tasks=tuple(dict.fromkeys(task_of(row) for row in rows if row.images)),
        digest=_digest(rows),
    )


def _batch(
    chosen: list[int], rows: Sequence[Row], prompts: Sequence[str], answers: Sequence[str], processor: Any
) -> Batch:
    inputs = encode([prompts[i] for i in chosen], [rows[i] for i in chosen], processor, padding_side="right")
    written = processor.tokenizer([answers[i] for i in chosen], add_special_tokens=False)["input_ids"]
    return _with_answers(inputs, written, torch.tensor(chosen), processor.tokenizer.eos_token_id)


def encode(prompts: Sequence[str], rows: Sequence[Row], processor: Any, padding_side: str) -> dict[str, Any]:
    """What the model's forward takes for these prompts about the rows' pictures: all rows have some, or none has."""
    # One list of pictures a prompt: LLaVA-OneVision cuts a picture into tiles only where it is alone in its prompt.
    pictures = [row.open_images() for row in rows]
    bos = processor.tokenizer.bos_token
    once = {"add_special_tokens": False} if bos and prompts[0].startswith(bos) else {}
    inputs = processor(
        text=list(prompts),
        images=pictures if pictures[0] else None,
        padding=True,
        padding_side=padding_side,
        return_tensors="pt",
        **once,
    )
    return dict(inputs)


def _with_answers(inputs: dict[str, Any], written: list[list[int]], rows: torch.Tensor, end: int) -> Batch:
    """Put each row's answer where its prompt ends, and note which positions predict it."""
    lengths = inputs["attention_mask"].sum(1)
    counts = torch.tensor([len(answer) for answer in written])
    width = int((lengths + counts).max())
    ids = inputs["input_ids"]
    wide = {
        name: torch.nn.functional.pad(value, (0, width - ids.shape[1]))
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor) and value.shape == ids.shape
    }
    question = torch.arange(len(written)).repeat_interleave(counts + 1)
    step = torch.cat([torch.arange(len(answer) + 1) for answer in written])
    labels = torch.tensor([token for answer in written for token in (*answer, end)])
    ends = step == counts[question]
    place = lengths[question] + step  # where the token stands; the position before predicts it
    wide["input_ids"][question[~ends], place[~ends]] = labels[~ends]
    wide["attention_mask"][question[~ends], place[~ends]] = 1
    return Batch(inputs | wide, rows, question * width + place - 1, labels, question, ends)


def _picture_numbers(rows: Sequence[Row]) -> np.ndarray:
    """Rows about the same pictures get the same number, a row without pictures one of its own."""
    numbers: dict[Any, int] = {}
    keys = [tuple(_identity(source) for source in row.images) or ("row", i) for i, row in enumerate(rows)]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys])


def _identity(source: Any) -> Any:
    return source if isinstance(source, bytes | Path) else id(source)


def _digest(rows: Sequence[Row]) -> str:
    """Of what is asked and answered, and of the pictures' names."""
    names = [[source.name if isinstance(source, Path) else "" for source in row.images] for row in rows]
    asked = [[task_of(row), row.chat, pictures] for row, pictures in zip(rows, names, strict=True)]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()
