"""Questions as tensors: tokenized once, then put to any number of models with the same processor.

Benchmarks ask several questions about a picture. Their prompts begin alike, with the picture's tokens, so they share
one sequence: the common beginning once, then each question with its answer, blind to the other questions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mbq.calibration import CROSS_ATTENTION_MASK
from mbq.chat import render
from mbq.errors import MBQError
from mbq.progress import Progress, silent
from mbq.rows import Row, text_of

NO_TASK = "questions"  # what rows without a task are counted under
PADDING = -1


@dataclass(frozen=True)
class Batch:
    """Packed sequences, one a picture (or a question without one), right-padded.

    leaders    [sequence] the row whose prompt begins the sequence
    ids        [sequence, token]
    segment    [sequence, token] 0 in the common beginning, 1, 2, ... in the questions, PADDING behind them
    step       [sequence, token] where the token stands in its own question's prompt and answer
    rows       [question] numbers of the rows
    positions  [answer token] flat index into [sequence, token] of the position that predicts the token
    labels     [answer token] the token; after an answer stands the end-of-turn token
    question   [answer token] index into ``rows``
    ends       [answer token] bool, the end-of-turn tokens
    """

    leaders: list[int]
    ids: torch.Tensor
    segment: torch.Tensor
    step: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    question: torch.Tensor
    ends: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return Batch(leaders=self.leaders, **tensors)


@dataclass(frozen=True)
class Questions:
    """Prepared questions.

    rows, processor  what they were made of; pictures are opened again when a model looks at them
    prompts          [row] the chat up to the answer, as text
    answers          [row] the reference answer's tokens
    groups           rows that share a sequence, the leader first
    batches          the groups as tensors
    pictures         [row] the number of the row's picture; rows about the same picture share it
    image_tasks      the tasks that show pictures
    digest           of the rows, so that only results on the same questions are compared
    kept             what models with the same embeddings and vision tower read, by its fingerprint (``scoring``)
    """

    rows: list[Row]
    processor: Any
    prompts: list[str]
    answers: list[list[int]]
    groups: list[list[int]]
    batches: list[Batch]
    pictures: np.ndarray
    image_tasks: tuple[str, ...]
    digest: str
    kept: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def tasks(self) -> list[str]:
        """[row] what it is counted under."""
        return [task_of(row) for row in self.rows]

    @cached_property
    def members(self) -> dict[str, np.ndarray]:
        """task -> the numbers of its rows."""
        tasks = np.array(self.tasks)
        return {task: np.flatnonzero(tasks == task) for task in dict.fromkeys(self.tasks)}

    def __len__(self) -> int:
        return len(self.rows)


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
    return render(processor, row.chat[:-1], row.where, add_generation_prompt=True)


def encode(prompts: Sequence[str], rows: Sequence[Row], processor: Any, padding_side: str = "right") -> dict[str, Any]:
    """What the model's forward takes for these prompts about the rows' pictures: all rows have some, or none has."""
    # One list of pictures a prompt: LLaVA-OneVision cuts a picture into tiles only where it is alone in its prompt.
    pictures = [row.open_images() for row in rows]
    bos = processor.tokenizer.bos_token
    once = {"add_special_tokens": False} if bos and prompts[0].startswith(bos) else {}
    try:
        inputs = processor(
            text=list(prompts),
            images=pictures if pictures[0] else None,
            padding=True,
            padding_side=padding_side,
            return_tensors="pt",
            **once,
        )
    except ValueError as error:
        raise MBQError(
            f"{rows[0].where}: the model's processor refuses the row ({error}); mend it or drop it."
        ) from error
    return dict(inputs)


def prepare(rows: Sequence[Row], processor: Any, batch_size: int = 64, progress: Progress = silent) -> Questions:
    """Tokenize prompts and reference answers; the processor sees each picture once, whatever is asked about it.

    A prompt ends as it does before ``generate``, then come the answer's own tokens. (A chat template may write
    something else before an answer in a conversation than at its end: LLaVA-OneVision's does.)

    batch_size  questions that go through a model at once

    Raises MBQError for no rows, and for a row whose last message is no answer.
    """
    if not rows:
        raise MBQError("There are no questions to evaluate; give rows with --data.")
    rows = list(rows)
    prompts = [prompt_of(row, processor) for row in rows]
    answers = processor.tokenizer([text_of(row.messages[-1]) for row in rows], add_special_tokens=False)["input_ids"]
    tokens, groups = _tokenized(rows, prompts, processor, batch_size, progress)
    lengths = [_packed_length(group, tokens, answers) for group in groups]
    # sequences with and without pictures never share a batch: pixel values are there for all, or for none
    kinds = [pictured(rows[group[0]], processor) for group in groups]
    order = sorted(range(len(groups)), key=lambda i: (kinds[i], lengths[i]))
    end = processor.tokenizer.eos_token_id
    batches = [
        _batch([groups[i] for i in chosen], tokens, answers, end)
        for chosen in _chunks(order, groups, kinds, batch_size)
    ]
    return Questions(
        rows=rows,
        processor=processor,
        prompts=prompts,
        answers=answers,
        groups=groups,
        batches=batches,
        pictures=_picture_numbers(rows),
        image_tasks=tuple(dict.fromkeys(task_of(row) for row in rows if row.images)),
        digest=_digest(rows),
    )


def _tokenized(
    rows: list[Row], prompts: list[str], processor: Any, batch_size: int, progress: Progress
) -> tuple[dict[int, list[int]], list[list[int]]]:
    """Each prompt's tokens with pictures expanded, and the groups of rows about the same picture.

    Only a group's first prompt goes through the processor. The others differ behind the last picture, where the
    tokenizer starts afresh: their tokens are the first one's up to there and their own text's. That is checked on the
    first prompt's own text; where it does not hold, every row is a group of its own.
    """
    mark: str = getattr(processor, "image_token", None) or ""
    groups: dict[Any, list[int]] = {}
    for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        head = prompt.rpartition(mark)[0] if mark and row.images else None
        key = (_pictures(row), head) if head else ("row", i)
        groups.setdefault(key, []).append(i)
    leaders = [group[0] for group in groups.values()]
    tokens = _processed(leaders, rows, prompts, processor, batch_size, progress)
    followers = [i for group in groups.values() for i in group[1:]]
    tails = {i: prompts[i].rpartition(mark)[2] for i in {*followers, *leaders}} if followers else {}
    tail_tokens = _tokens_of(tails, processor)
    kept: list[list[int]] = []
    for group in groups.values():
        first = group[0]
        own = tail_tokens.get(first, [])
        if len(group) > 1 and tokens[first][-len(own) :] == own:
            head_tokens = tokens[first][: -len(own)]
            tokens.update({i: head_tokens + tail_tokens[i] for i in group[1:]})
            kept.append(group)
        else:
            tokens.update(_processed(group[1:], rows, prompts, processor, batch_size, silent))
            kept.extend([i] for i in group)
    return tokens, kept


def _processed(
    chosen: list[int], rows: list[Row], prompts: list[str], processor: Any, batch_size: int, progress: Progress
) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {}
    for part in ([i for i in chosen if rows[i].images], [i for i in chosen if not rows[i].images]):
        for start in range(0, len(part), batch_size):
            some = part[start : start + batch_size]
            inputs = encode([prompts[i] for i in some], [rows[i] for i in some], processor)
            lengths = inputs["attention_mask"].sum(1).tolist()
            tokens |= {i: ids[:n] for i, ids, n in zip(some, inputs["input_ids"].tolist(), lengths, strict=True)}
            progress("read questions", len(tokens), len(chosen), "")
    return tokens


def _tokens_of(texts: dict[int, str], processor: Any) -> dict[int, list[int]]:
    if not texts:
        return {}
    encoded = processor.tokenizer(list(texts.values()), add_special_tokens=False)["input_ids"]
    return dict(zip(texts, encoded, strict=True))


def _common(group: list[int], tokens: dict[int, list[int]]) -> int:
    """How many tokens the prompts of a group have in common at their beginning, short of any prompt's last."""
    limit = min(len(tokens[i]) for i in group) - 1
    first = tokens[group[0]]
    for place in range(limit):
        if any(tokens[i][place] != first[place] for i in group[1:]):
            return place
    return limit


def _packed_length(group: list[int], tokens: dict[int, list[int]], answers: list[list[int]]) -> int:
    common = _common(group, tokens)
    return common + sum(len(tokens[i]) - common + len(answers[i]) for i in group)


def pictured(row: Row, processor: Any) -> int:
    """What rows of one batch must have in common: whether they show pictures.

    How many, where cross-attention reads them: a token before the first picture sees all that is there, and would see
    what fills up the places of others.
    """
    names = getattr(processor, "model_input_names", ())
    return len(row.images) if CROSS_ATTENTION_MASK in names else int(bool(row.images))


def _chunks(order: list[int], groups: list[list[int]], kinds: list[int], batch_size: int) -> list[list[int]]:
    """Consecutive groups of at least ``batch_size`` questions in all, those of different kinds apart."""
    chunks: list[list[int]] = []
    questions, kind = batch_size, None
    for i in order:
        if questions >= batch_size or kinds[i] != kind:
            chunks.append([])
            questions, kind = 0, kinds[i]
        chunks[-1].append(i)
        questions += len(groups[i])
    return chunks


def _batch(groups: list[list[int]], tokens: dict[int, list[int]], answers: list[list[int]], end: int) -> Batch:
    sequences: list[tuple[list[int], list[int], list[int]]] = []
    rows: list[int] = []
    predicted: list[tuple[int, int, int, int, bool]] = []  # sequence, position, label, question, is the end
    for number, group in enumerate(groups):
        common = _common(group, tokens)
        sequence_ids, places = tokens[group[0]][:common], list(range(common))
        segments = [0] * common
        for index, i in enumerate(group, start=1):
            own = tokens[i][common:] + answers[i]
            at = len(sequence_ids) + len(tokens[i]) - common - 1
            wanted = [*answers[i], end]
            predicted += [(number, at + k, label, len(rows), k == len(answers[i])) for k, label in enumerate(wanted)]
            rows.append(i)
            sequence_ids = sequence_ids + own
            segments += [index] * len(own)
            places += range(common, common + len(own))
        sequences.append((sequence_ids, segments, places))
    width = max(len(places) for _, _, places in sequences)
    ids, segment, step = (
        torch.tensor([values + [fill] * (width - len(values)) for values in part])
        for part, fill in zip(zip(*sequences, strict=True), (0, PADDING, 0), strict=True)
    )
    sequence, position, labels, question, ends = (torch.tensor(part) for part in zip(*predicted, strict=True))
    positions = sequence * width + position
    leaders = [group[0] for group in groups]
    return Batch(leaders, ids, segment, step, torch.tensor(rows), positions, labels, question, ends)


def _pictures(row: Row) -> tuple[Any, ...]:
    """What tells a row's pictures from other rows' without opening them."""
    return tuple(source if isinstance(source, bytes | Path) else id(source) for source in row.images)


def _picture_numbers(rows: Sequence[Row]) -> np.ndarray:
    """Rows about the same pictures get the same number, a row without pictures one of its own."""
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(_pictures(row) or ("row", i), len(numbers)) for i, row in enumerate(rows)])


def _digest(rows: Sequence[Row]) -> str:
    """Of what is asked and answered, and of the pictures' names."""
    names = [[source.name if isinstance(source, Path) else "" for source in row.images] for row in rows]
    asked = [[task_of(row), row.chat, pictures] for row, pictures in zip(rows, names, strict=True)]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()
