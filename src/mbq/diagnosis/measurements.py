"""Everything that the rules look at: frozen data, and questions about it that several rules ask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

from mbq.diagnosis.bad_answers import Answered, Limits
from mbq.diagnosis.outliers import MODALITIES
from mbq.diagnosis.outside import Outside
from mbq.diagnosis.propagation import Propagation
from mbq.diagnosis.speed import Speed
from mbq.evaluation import Results
from mbq.evaluation.statistics import Interval, accuracy, paired_difference
from mbq.scheme import Scheme
from mbq.sensitivity import PARTS


@dataclass(frozen=True)
class Accuracy:
    """Mean right answers over the tasks of one kind; ``difference`` is the quantized model's less the float model's."""

    tasks: tuple[str, ...]
    questions: int
    reference: Interval
    quantized: Interval
    difference: Interval

    @property
    def falls(self) -> bool:
        """Surely: the whole 95 % interval of the paired difference is below zero."""
        return self.difference.high < 0


@dataclass(frozen=True)
class Measurements:
    """What ``diagnose`` measured.

    model, baseline  names
    scheme           of the decoder's packed layers
    recipe           recipe.yaml of the folder, {} without one
    blocks           the path of the decoder blocks in the model
    tower_quantized  whether the vision tower has packed layers
    outside          what is not quantized, beside the float model's
    propagation      errors and outliers, block by block
    accuracy         "image" and "text" tasks, those that there are
    answers          what both wrote to some of the questions
    limits           of ``answers``; None without any
    speed            None where it was not measured
    notes            what could not be looked at, a sentence each
    """

    model: str
    baseline: str
    scheme: Scheme
    recipe: dict[str, Any]
    blocks: str
    tower_quantized: bool
    outside: Outside
    propagation: Propagation
    accuracy: dict[str, Accuracy] = field(default_factory=dict)
    answers: list[Answered] = field(default_factory=list)
    limits: Limits | None = None
    speed: Speed | None = None
    notes: list[str] = field(default_factory=list)

    def own(self, part: str, tokens: str) -> list[float | None]:
        """The blocks' own errors."""
        return [errors.own[part][tokens] for errors in self.propagation.blocks]

    def expected(self, part: str, tokens: str) -> list[float | None]:
        """What rounding to nearest in the same scheme would make of them, no less than what the dtype rounds.

        A fold into a block that stays in 16 bits rounds its weights once more.
        """
        found = (errors.expected[part][tokens] for errors in self.propagation.blocks)
        return [None if each is None else max(each, self.outside.rounding) for each in found]

    def usual(self, part: str, tokens: str) -> float:
        """The median over the blocks of their own errors, no less than what the dtype rounds."""
        errors = [each for each in self.own(part, tokens) if each is not None]
        return max(median(errors or [0.0]), self.outside.rounding)

    def places(self) -> list[tuple[int, str, str]]:
        """(block, part, modality) wherever tokens matter: nothing attends to the last block's vision tokens."""
        last = len(self.propagation.blocks) - 1
        return [
            (block, part, tokens)
            for block, errors in enumerate(self.propagation.blocks)
            for part in PARTS
            for tokens in MODALITIES
            if errors.own[part][tokens] is not None and (block, tokens) != (last, "vision")
        ]


def accuracies(quantized: Results, reference: Results) -> dict[str, Accuracy]:
    """Of image tasks and of language-only tasks, as far as there are any."""
    found = {}
    for kind, tasks in (("image", quantized.image_tasks), ("text", quantized.text_tasks)):
        if tasks:
            count = sum(len(quantized.correct[task]) for task in tasks)
            means = (reference.mean(tasks), quantized.mean(tasks))
            found[kind] = Accuracy(tuple(tasks), count, *means, _difference(quantized, reference, tasks))
    return found


def _difference(quantized: Results, reference: Results, tasks: Sequence[str]) -> Interval:
    """``Results.minus``; where no question flipped, a bootstrap has nothing to vary, and Wilson's bound of 0 out of as
    many stands on both sides.
    """
    found = quantized.minus(reference, tasks)
    flipped = np.concatenate([quantized.correct[task] != reference.correct[task] for task in tasks])
    if flipped.any():
        return found
    most = accuracy(flipped).high
    return Interval(0.0, -most, most)


def more_often(ours: Sequence[bool], theirs: Sequence[bool]) -> Interval:
    """How much larger a share of the same questions ``ours`` is than ``theirs``: paired bootstrap, 95 %."""
    return paired_difference({"": np.array(ours, float)}, {"": np.array(theirs, float)})


def gap(first: Interval, second: Interval) -> Interval:
    """``first`` less ``second``, of different questions: the arms of both intervals, squared and added.

    (Newcombe, Statistics in Medicine 17, 1998; Zou and Donner's MOVER for any two independent estimates.)
    """
    estimate = first.estimate - second.estimate
    low = np.hypot(first.estimate - first.low, second.high - second.estimate)
    high = np.hypot(first.high - first.estimate, second.estimate - second.low)
    return Interval(estimate, estimate - float(low), estimate + float(high))
