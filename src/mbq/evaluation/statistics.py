"""Intervals for accuracies and for differences between two models that answered the same questions.

Scores come by task, ``{"arms": array of 0 and 1, ...}``. The questions are the random part of every interval here: none
says how much another calibration sample or another training run would change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from mbq.errors import MBQError

Scores = Mapping[str, np.ndarray]
RESAMPLES = 10_000
RESAMPLES_AT_ONCE = 1_000


@dataclass(frozen=True)
class Interval:
    """An estimate between the bounds of its confidence interval, all three as fractions (0.5 is 50 %)."""

    estimate: float
    low: float
    high: float

    def percent(self, signed: bool = False) -> str:
        """``61.2 (60.1 to 62.3)`` in per cent; ``signed``, for differences, writes the plus too."""
        sign = "+" if signed else ""
        return "{:{s}.1f} ({:{s}.1f} to {:{s}.1f})".format(
            *(100 * value for value in (self.estimate, self.low, self.high)), s=sign
        )


def accuracy(correct: np.ndarray, confidence: float = 0.95) -> Interval:
    """Share of right answers with Wilson's score interval (JASA 22, 1927), which holds near 0 and 1 too."""
    bounds = stats.binomtest(int(correct.sum()), len(correct)).proportion_ci(confidence, method="wilson")
    return Interval(float(np.mean(correct)), float(bounds.low), float(bounds.high))


def mean(scores: Scores, pictures: Scores | None = None, *, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Mean of the tasks' mean scores, every task with the same weight; percentile bootstrap, stratified by task.

    ``pictures`` numbers the picture of each question. Questions about one picture are resampled together, because a
    picture that a model misreads costs it several answers; without it every question stands alone. Where all answers
    of all tasks are right (or wrong) a bootstrap has nothing to vary, and the interval is a point.
    """
    if not scores:
        raise MBQError("A mean over tasks needs at least one task.")
    generator = np.random.default_rng(seed)
    total = np.zeros(RESAMPLES)
    for contributions in _strata(scores, pictures):
        total += _resampled_sums(contributions, generator)
    low, high = np.quantile(total, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(np.mean([np.mean(values) for values in scores.values()])), float(low), float(high))


def paired_difference(
    scores: Scores, baseline: Scores, pictures: Scores | None = None, *, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """``mean(scores) - mean(baseline)`` on the same questions: the bootstrap resamples each question's difference."""
    if {task: len(values) for task, values in scores.items()} != {
        task: len(values) for task, values in baseline.items()
    }:
        raise MBQError(
            "Two results can only be compared on the same questions; evaluate both with the same tasks and data."
        )
    differences = {
        task: np.asarray(values, float) - np.asarray(baseline[task], float) for task, values in scores.items()
    }
    return mean(differences, pictures, confidence=confidence, seed=seed)


def ratio(sums: np.ndarray, counts: np.ndarray, *, confidence: float = 0.95, seed: int = 0) -> Interval:
    """``sum(sums) / sum(counts)``, a mean over tokens; percentile bootstrap over rows, whose tokens stay together.

    sums, counts  [row]
    """
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(RESAMPLES // RESAMPLES_AT_ONCE):
        drawn = generator.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=RESAMPLES_AT_ONCE)
        found.append((drawn @ sums) / (drawn @ counts))
    low, high = np.quantile(np.concatenate(found), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(sums.sum() / counts.sum()), float(low), float(high))


def _strata(scores: Scores, pictures: Scores | None) -> list[np.ndarray]:
    """What each picture adds to the mean over tasks, one array for every set of tasks that pictures are asked."""
    share: dict[int, float] = {}
    tasks: dict[int, tuple[str, ...]] = {}
    alone = 0
    for task, values in scores.items():
        if pictures is None:
            numbers = np.arange(alone - len(values), alone)
            alone -= len(values)
        else:
            numbers = pictures[task]
        for picture, value in zip(numbers.tolist(), (values / (len(scores) * len(values))).tolist(), strict=True):
            share[picture] = share.get(picture, 0.0) + value
            tasks[picture] = (*tasks.get(picture, ()), task)
    strata: dict[tuple[str, ...], list[float]] = {}
    for picture, value in share.items():
        strata.setdefault(tasks[picture], []).append(value)
    return [np.array(values) for values in strata.values()]


def _resampled_sums(contributions: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Sums of ``RESAMPLES`` draws with replacement: how often each distinct value is drawn is multinomial."""
    values, counts = np.unique(contributions.round(12), return_counts=True)
    return generator.multinomial(len(contributions), counts / len(contributions), size=RESAMPLES) @ values
