"""What is wrong with an answer: the five kinds of bad answers that the MBQ paper counts, by rules that can be measured.

The first rule that applies names the kind. Limits come from the float model and the data (``limits_for``).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mbq.conditions import Condition
from mbq.rows import Row, text_of

NO_OUTPUT, REPETITION, RANDOM = "no output", "repetition", "random tokens"
CONDITION, WRONG = "missed condition", "fluent but wrong"
KINDS = (NO_OUTPUT, RANDOM, REPETITION, CONDITION, WRONG)
# Of answers that are drawn blindly, so many in a hundred are above the limit: a one-sided 95 % bound.
BLIND_SHARE = 0.05
# "Very, very good" is no loop, whatever the float model happens to have written.
LEAST_REPEATS = 3


@dataclass(frozen=True)
class Limits:
    """repeats: of an n-gram in a row that make a loop; loss: mean -log p a token, in nats, that random tokens reach."""

    repeats: int
    loss: float


@dataclass(frozen=True)
class Answered:
    """What both models wrote to one question, and what was wrong with it (None: it is the reference)."""

    question: str
    reference: str
    pictured: bool
    float_answer: str
    float_kind: str | None
    answer: str
    kind: str | None


def definitions(limits: Limits) -> dict[str, str]:
    """What each kind is, in the order in which the rules are asked."""
    return {
        NO_OUTPUT: "nothing but blanks before the end of the turn",
        REPETITION: f"one n-gram of tokens, {limits.repeats} times in a row or more, is over half of the answer; no "
        f"answer of the float model and no reference repeats one so often",
        RANDOM: f"a mean -log p of {limits.loss:.1f} or more a token under the float model, which 95 of 100 answers of "
        "blindly drawn tokens reach",
        CONDITION: "the row asks for a form of the answer (max_words, choices, regex), and the answer has another",
        WRONG: "any other answer that is not the reference to the letter",
    }


def kind_of(
    answer: str, reference: str, condition: Condition | None, tokens: Sequence[int], loss: float, limits: Limits
) -> str | None:
    """The kind of a bad answer, None for the reference; ``tokens`` are the answer's, ``loss`` their mean loss."""
    if answer.strip() == reference.strip():
        return None
    if not answer.strip():
        return NO_OUTPUT
    if looped(tokens) >= limits.repeats:
        return REPETITION
    if loss >= limits.loss:
        return RANDOM
    if condition is not None and not condition.met(answer):
        return CONDITION
    return WRONG


def looped(tokens: Sequence[int]) -> int:
    """How often one n-gram stands in a row in over half of ``tokens``; 1 where none does."""
    most = 1
    for size in range(1, len(tokens) // 2 + 1):
        run = 0
        for place in range(size, len(tokens)):
            run = run + 1 if tokens[place] == tokens[place - size] else 0
            if 2 * (run + size) > len(tokens):
                most = max(most, (run + size) // size)
    return most


def limits_for(known: Sequence[Sequence[int]], blind: np.ndarray) -> Limits:
    """From the tokens of the float model's answers and the references, and the losses of ``blind`` answers [row]."""
    repeats = max(LEAST_REPEATS, 1 + max(looped(tokens) for tokens in known))
    return Limits(repeats, float(np.nanquantile(blind, BLIND_SHARE)))


def blind_answers(processor: Any, lengths: Sequence[int], seed: int) -> list[str]:
    """Texts of so many tokens each, every token of the vocabulary as likely as another, but for special ones."""
    tokenizer = processor.tokenizer
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ids = [number for number in range(len(tokenizer)) if number not in special]
    draw = random.Random(seed)
    return [tokenizer.decode(draw.choices(ids, k=max(1, length))) for length in lengths]


def with_answer(row: Row, answer: str) -> Row:
    """The row as if ``answer`` were its reference."""
    said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    return replace(row, messages=[*row.messages[:-1], said])


def spread(rows: Sequence[Row], count: int) -> list[Row]:
    """``count`` of the rows, as even over the tasks as can be, the first of each."""
    tasks: dict[str | None, list[Row]] = {}
    for row in rows:
        tasks.setdefault(row.task, []).append(row)
    longest = max((len(each) for each in tasks.values()), default=0)
    turns = [each[turn] for turn in range(longest) for each in tasks.values() if turn < len(each)]
    return turns[:count]


def compared(
    rows: Sequence[Row],
    ours: Sequence[str],
    theirs: Sequence[str],
    kinds: Sequence[str | None],
    float_kinds: Sequence[str | None],
) -> list[Answered]:
    """A row each: answers of the quantized model (``ours``) and of the float model beside the reference."""
    return [
        Answered(text_of(row.messages[-2]), text_of(row.messages[-1]), bool(row.images), their, their_kind, our, kind)
        for row, their, their_kind, our, kind in zip(rows, theirs, float_kinds, ours, kinds, strict=True)
    ]
