"""Which questions of an evaluation are shown with what every model wrote to them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mbq.evaluation.greedy import answers
from mbq.evaluation.questions import Questions
from mbq.evaluation.results import Results
from mbq.evaluation.runs import Answer, picture_names
from mbq.images import ImageSource
from mbq.progress import Progress, silent
from mbq.rows import text_of

PER_TASK = 20  # wrong answers of a model
MAX_NEW_TOKENS = 128

Place = tuple[str, int]  # task, index in the task


@dataclass
class Examples:
    """Questions that are shown, and what each model wrote to those that it got wrong.

    Models come one after the other and are not kept. The first shows its first wrong answers of each task, each later
    one the first that it alone has wrong; all models answer all questions that any of them shows. So no model is
    needed again: what it had right it wrote to the letter, and what it had wrong was shown, or is not shown at all.
    """

    questions: Questions
    per_task: int = PER_TASK
    max_new_tokens: int = MAX_NEW_TOKENS
    batch_size: int = 32
    results: list[Results] = field(default_factory=list)
    places: dict[Place, None] = field(default_factory=dict)
    written: list[dict[Place, str]] = field(default_factory=list)

    def add(self, model: Any, results: Results, progress: Progress = silent) -> None:
        """Choose from what a model got wrong, and let it write."""
        for task, correct in results.correct.items():
            new = ~correct & np.all([earlier.correct[task] for earlier in self.results], axis=0)
            self.places |= {(task, int(index)): None for index in np.flatnonzero(new)[: self.per_task]}
        self.results.append(results)
        wrong = [place for place in self.places if not results.correct[place[0]][place[1]]]
        rows = [self.questions.rows[self._row(place)] for place in wrong]
        texts = answers(model, self.questions.processor, rows, self.max_new_tokens, self.batch_size, progress)
        self.written.append(dict(zip(wrong, texts, strict=True)))

    def of(self, number: int) -> list[Answer]:
        """All shown questions, by task and index, as the ``number``-th model answered them."""
        results, written = self.results[number], self.written[number]
        tasks = list(results.tasks)
        places = sorted(self.places, key=lambda place: (tasks.index(place[0]), place[1]))
        sources = [self.questions.rows[self._row(place)].images for place in places]
        names = iter(picture_names([source for each in sources for source in each]))
        found = []
        for place, pictures in zip(places, sources, strict=True):
            row = self.questions.rows[self._row(place)]
            reference = text_of(row.messages[-1])
            found.append(
                Answer(
                    *place,
                    question=text_of(next(each for each in reversed(row.messages) if each["role"] == "user")),
                    reference=reference,
                    answer=written.get(place, reference),
                    right=bool(results.correct[place[0]][place[1]]),
                    pictures=tuple(next(names) for _ in pictures),
                )
            )
        return found

    def pictures(self, number: int) -> dict[str, ImageSource]:
        """The pictures of ``of(number)``, by name."""
        found: dict[str, ImageSource] = {}
        for answer in self.of(number):
            sources = self.questions.rows[self._row((answer.task, answer.index))].images
            found |= dict(zip(answer.pictures, sources, strict=True))
        return found

    def _row(self, place: Place) -> int:
        return int(self.questions.members[place[0]][place[1]])
