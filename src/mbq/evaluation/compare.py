"""Runs on the same questions, compared one by one: which differences are more than chance, and what flipped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

from mbq.errors import MBQError
from mbq.evaluation.documents import document_results
from mbq.evaluation.results import Results
from mbq.evaluation.runs import Answer, Run
from mbq.evaluation.statistics import Interval

Kind = Literal["task", "image", "text", "lmms-eval"]


@dataclass(frozen=True)
class Line:
    """Two runs on some tasks: one, all that show pictures, all that show none, or all of lmms-eval's.

    before, after  mean accuracy over the tasks of the first run and of the other
    difference     after less before; its 95 % interval is the paired bootstrap's, which keeps the questions about one
                   picture together
    lost, gained   questions that only the first, or only the other, has right (with fractions: that it has more of)
    agreement      share of the questions that both have right or both have wrong (with fractions: equally right)
    p              McNemar's exact test: how probable flips as uneven as these are where lost and gained are equally
                   likely (a binomial test of the flips; Psychometrika 12, 1947; with fractions, the sign test). It
                   takes questions as independent
    """

    kind: Kind
    name: str
    questions: int
    before: Interval
    after: Interval
    difference: Interval
    lost: int
    gained: int
    agreement: float
    p: float

    def to_json(self) -> dict[str, Any]:
        return {name: vars(value) if isinstance(value, Interval) else value for name, value in vars(self).items()}


@dataclass(frozen=True)
class Comparison:
    """A run against the first: ``lines`` by task and, behind the tasks of each kind, of the kind."""

    baseline: str
    model: str
    lines: list[Line]

    def to_json(self) -> dict[str, Any]:
        return {"baseline": self.baseline, "model": self.model, "lines": [line.to_json() for line in self.lines]}


@dataclass(frozen=True)
class Flip:
    """A question that one of two runs has right, and what each wrote; ``lost`` if it is the first that has it right."""

    task: str
    index: int
    question: str
    reference: str
    before: str
    after: str
    lost: bool


def compare(runs: Sequence[Run]) -> list[Comparison]:
    """Every run against the first. Raises MBQError where they did not answer the same questions."""
    if len(runs) < 2:
        raise MBQError("A comparison needs two runs at least; name the folders that mbq evaluate --output wrote.")
    names = names_of(runs)
    builtin = [run.results for run in runs]
    public = [document_results(run) for run in runs]
    found = []
    for number in range(1, len(runs)):
        lines: list[Line] = []
        for results in (builtin, public):
            before, after = results[0], results[number]
            if before is not None and after is not None:
                lines += _lines(before, after, "text" if results is builtin else "lmms-eval")
        if not lines:
            raise MBQError(
                f"{names[0]} and {names[number]} have no questions in common that are stored one by one; evaluate "
                "both on the same tasks."
            )
        found.append(Comparison(names[0], names[number], lines))
    return found


def names_of(runs: Sequence[Run]) -> list[str]:
    """The models' names, or the folders where two runs are of one model."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def _lines(before: Results, after: Results, others: Kind) -> list[Line]:
    """By task and kind; ``others`` is what tasks are that show no pictures, or may."""
    lines = []
    kinds: list[tuple[Kind, tuple[str, ...]]] = [("image", before.image_tasks), (others, before.text_tasks)]
    for kind, tasks in kinds:
        lines += [_line("task", task, [task], before, after) for task in tasks]
        if tasks:
            lines.append(_line(kind, f"{kind} tasks", list(tasks), before, after))
    return lines


def _line(kind: Kind, name: str, tasks: list[str], before: Results, after: Results) -> Line:
    difference = after.minus(before, tasks)  # refuses different questions before they are laid side by side
    one, other = (np.concatenate([results.correct[task] for task in tasks]) for results in (before, after))
    lost, gained = int((one > other).sum()), int((one < other).sum())
    counted = kind == "task" and one.dtype == other.dtype == bool
    means = [results.accuracy(tasks[0]) if counted else results.mean(tasks) for results in (before, after)]
    p = float(stats.binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0
    agreement = float((one == other).mean())
    return Line(kind, name, len(one), means[0], means[1], difference, lost, gained, agreement, p)


def exceeded(comparison: Comparison, max_drop: float, sure: bool = False) -> list[Line]:
    """The kinds of tasks (image, text, lmms-eval) whose mean fell by more than ``max_drop`` percentage points.

    sure  take the lower bound of the difference's interval in place of the estimate, so that what passes is within
          ``max_drop`` as far as the questions can tell. (Where nothing flipped a bootstrap's interval is a point.)
    """
    tolerance = 1e-9  # a drop of exactly max_drop is allowed, and 0.01 is no binary fraction
    return [
        line
        for line in comparison.lines
        if line.kind != "task"
        and -100 * (line.difference.low if sure else line.difference.estimate) > max_drop + tolerance
    ]


def flips(before: Run, after: Run, limit: int | None = None) -> list[Flip]:
    """Questions that flipped and that the run which has them wrong shows, the lost ones first.

    The run that has a question right wrote the reference.
    """
    old, new = before.results, after.results
    found: list[Flip] = []
    if old is None or new is None:
        return found
    for run, other, lost in ((after, old, True), (before, new, False)):
        for answer in run.answers:
            if not answer.right and other.correct[answer.task][answer.index]:
                found.append(_flip(answer, lost))
    return found[:limit]


def _flip(answer: Answer, lost: bool) -> Flip:
    before, after = (answer.reference, answer.answer) if lost else (answer.answer, answer.reference)
    return Flip(answer.task, answer.index, answer.question, answer.reference, before, after, lost)
