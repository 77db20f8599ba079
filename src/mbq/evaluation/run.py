"""Evaluate a model on questions: the world's own, or rows from a file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mbq.evaluation.questions import Questions
from mbq.evaluation.results import Results
from mbq.evaluation.scoring import score
from mbq.progress import Progress, silent
from mbq.rows import Row, read_rows

PER_TASK = 2000  # questions a task of the world's test set


def evaluate(
    model: Any,
    questions: Questions,
    name: str = "model",
    recipe: dict[str, Any] | None = None,
    progress: Progress = silent,
) -> Results:
    """Put prepared questions to a loaded model; the answer must be the reference answer to the letter."""
    started = time.monotonic()
    right = score(model, questions, progress).numpy()
    members = questions.members
    return Results(
        model=name,
        correct={task: right[rows] for task, rows in members.items()},
        pictures={task: questions.pictures[rows] for task, rows in members.items()},
        image_tasks=questions.image_tasks,
        questions=questions.digest,
        recipe=recipe or {},
        seconds=time.monotonic() - started,
    )


def world_questions(
    folder: str | Path, tasks: Sequence[str] | None = None, limit: int | None = None, seed: int = 0
) -> list[Row]:
    """Draw the world's test set into ``folder`` and read it. Raises MBQError for a task it does not have."""
    from mbq.world import write

    data = write(folder, split="test", tasks=tasks, per_task=PER_TASK if limit is None else limit, seed=seed)
    return read_rows(data)
