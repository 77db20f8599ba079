"""Questions whose answers are shown, with what every model wrote and the pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mbq.evaluation.runs import Answer
from mbq.report.accuracy import Comparison, results_of
from mbq.report.pictures import Pictures
from mbq.report.subjects import Subject

MOST = 240  # questions of a comparison
LONGEST = 1200  # characters of a text that is shown
DIRECTIONS = {
    "lost": "lost: only the float model is right",
    "gained": "gained: only the quantized model is right",
    "wrong": "both wrong",
    "right": "both right",
}


@dataclass(frozen=True)
class Said:
    """What a model answered; ``text`` is None where a wrong answer was not kept."""

    label: str
    text: str | None
    right: bool
    direction: str | None


@dataclass(frozen=True)
class Question:
    task: str
    text: str
    reference: str
    pictures: tuple[int, ...]
    said: tuple[Said, ...]

    @property
    def directions(self) -> dict[str, str]:
        """What became of the baseline's answer, by model: a key of DIRECTIONS."""
        return {said.label: said.direction for said in self.said if said.direction}


@dataclass(frozen=True)
class Questions:
    """``known`` is how many the runs hold; ``shown`` are taken evenly over the tasks, changed answers first."""

    shown: tuple[Question, ...]
    known: int


def questions(comparison: Comparison, pictures: Pictures) -> Questions:
    """Those that any of the runs shows, as all of its models answered them."""
    answers = {subject.label: _kept(subject) for subject in comparison.subjects}
    places = dict.fromkeys(place for kept in answers.values() for place in kept)
    found = {}
    for place in places:
        said = tuple(
            _said(subject, comparison, answers[subject.label].get(place), place) for subject in comparison.subjects
        )
        found[place] = said
    chosen = _evenly(found, comparison)
    tasks = list(results_of(comparison.baseline).tasks)
    shown = []
    for place in sorted(chosen, key=lambda place: (tasks.index(place[0]), place[1])):
        holder = next(subject for subject in comparison.subjects if place in answers[subject.label])
        shown.append(_question(holder, answers[holder.label][place], found[place], pictures))
    return Questions(tuple(shown), len(found))


Place = tuple[str, int]


def _kept(subject: Subject) -> dict[Place, Answer]:
    assert subject.run is not None, "only runs are compared"
    return {(answer.task, answer.index): answer for answer in subject.run.answers}


def _said(subject: Subject, comparison: Comparison, answer: Answer | None, place: Place) -> Said:
    task, index = place
    right = bool(results_of(subject).correct[task][index])
    before = bool(results_of(comparison.baseline).correct[task][index])
    direction = None
    if subject is not comparison.baseline:
        direction = {(True, False): "lost", (False, True): "gained", (False, False): "wrong", (True, True): "right"}[
            before, right
        ]
    return Said(subject.label, None if answer is None else _short(answer.answer), right, direction)


def _question(subject: Subject, answer: Answer, said: Sequence[Said], pictures: Pictures) -> Question:
    assert subject.run is not None, "only runs are compared"
    numbers = [pictures.number(subject.run.folder, name) for name in answer.pictures]
    return Question(
        answer.task,
        _short(answer.question),
        _short(answer.reference),
        tuple(number for number in numbers if number is not None),
        tuple(_filled(each, answer.reference) for each in said),
    )


def _filled(said: Said, reference: str) -> Said:
    """A right answer is the reference to the letter, also where a run did not keep it."""
    return Said(said.label, _short(reference), True, said.direction) if said.right and said.text is None else said


def _evenly(found: dict[Place, tuple[Said, ...]], comparison: Comparison) -> Iterable[Place]:
    """At most MOST: one of each task in turn, those first that a model lost or gained."""
    queues: dict[str, list[Place]] = {}
    for place in sorted(found, key=lambda place: (_kept_by_all(found[place]), place[1])):
        queues.setdefault(place[0], []).append(place)
    chosen: list[Place] = []
    while len(chosen) < MOST and any(queues.values()):
        for queue in queues.values():
            if queue and len(chosen) < MOST:
                chosen.append(queue.pop(0))
    return chosen


def _kept_by_all(said: Sequence[Said]) -> bool:
    return not any(each.direction in ("lost", "gained") for each in said)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"
