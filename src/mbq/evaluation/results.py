"""What an evaluation found, question by question, so that any interval can be computed from it later."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mbq.errors import MBQError
from mbq.evaluation import statistics
from mbq.evaluation.statistics import Interval


@dataclass(frozen=True)
class Results:
    """Right and wrong answers of one model.

    model        its name
    correct      task -> bool [question]
    pictures     task -> int [question]: the picture that it is about; questions with the same number share one
    image_tasks  the tasks that show pictures
    questions    digest of the questions: results with different digests cannot be compared
    recipe       how the model was quantized; {} for a float model
    seconds      that the evaluation took
    """

    model: str
    correct: dict[str, np.ndarray]
    pictures: dict[str, np.ndarray]
    image_tasks: tuple[str, ...]
    questions: str
    recipe: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.correct)

    @property
    def text_tasks(self) -> tuple[str, ...]:
        return tuple(task for task in self.correct if task not in self.image_tasks)

    def accuracy(self, task: str) -> Interval:
        """Accuracy of one task with its 95 % interval (Wilson)."""
        return statistics.accuracy(self.correct[task])

    def mean(self, tasks: Sequence[str] | None = None) -> Interval:
        """Mean accuracy of ``tasks`` (None: of all) with its 95 % interval, resampling pictures."""
        chosen = self.tasks if tasks is None else tasks
        return statistics.mean(_only(self.correct, chosen), _only(self.pictures, chosen))

    def minus(self, baseline: Results, tasks: Sequence[str] | None = None) -> Interval:
        """Mean accuracy of ``tasks`` less the baseline's, with the 95 % interval of the paired bootstrap.

        Raises MBQError if the two did not answer the same questions.
        """
        if self.questions != baseline.questions:
            raise MBQError(
                f"{self.model} and {baseline.model} answered different questions; evaluate both on the same data."
            )
        chosen = self.tasks if tasks is None else tasks
        return statistics.paired_difference(
            _only(self.correct, chosen), _only(baseline.correct, chosen), _only(self.pictures, chosen)
        )

    def save(self, path: str | Path) -> None:
        """Write JSON: a bit a question, and the pictures' numbers as their differences, both compressed."""
        content = {
            "model": self.model,
            "recipe": self.recipe,
            "questions": self.questions,
            "seconds": round(self.seconds, 2),
            "image_tasks": list(self.image_tasks),
            "tasks": {
                task: {
                    "questions": len(correct),
                    "right": int(correct.sum()),
                    "correct": _packed(np.packbits(correct)),
                    "pictures": _packed(np.diff(self.pictures[task], prepend=0).astype("<i4")),
                }
                for task, correct in self.correct.items()
            },
        }
        Path(path).write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read what ``save`` wrote."""
        content = json.loads(Path(path).read_text())
        tasks = content["tasks"]
        return cls(
            model=content["model"],
            correct={
                name: np.unpackbits(_unpacked(task["correct"], "u1"), count=task["questions"]).astype(bool)
                for name, task in tasks.items()
            },
            pictures={name: _unpacked(task["pictures"], "<i4").cumsum() for name, task in tasks.items()},
            image_tasks=tuple(content["image_tasks"]),
            questions=content["questions"],
            recipe=content["recipe"],
            seconds=content["seconds"],
        )


def _only(scores: dict[str, np.ndarray], tasks: Sequence[str]) -> dict[str, np.ndarray]:
    return {task: scores[task] for task in tasks}


def _packed(values: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(values.tobytes(), 9)).decode()


def _unpacked(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=dtype)
