"""Evaluate a model on questions: the world's own, or rows from a file."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

import mbq
from mbq.errors import MBQError
from mbq.evaluation.questions import Questions, prepare, select
from mbq.evaluation.results import Results
from mbq.evaluation.scoring import score
from mbq.evaluation.table import results_table
from mbq.progress import Progress, silent
from mbq.rows import Row, check_images, read_rows

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
    tasks = np.array(questions.tasks)
    members = {task: np.flatnonzero(tasks == task) for task in dict.fromkeys(questions.tasks)}
    return Results(
        model=name,
        correct={task: right[rows] for task, rows in members.items()},
        pictures={task: questions.pictures[rows] for task, rows in members.items()},
        image_tasks=questions.image_tasks,
        questions=questions.digest,
        recipe=recipe or {},
        seconds=time.monotonic() - started,
    )


def read_questions(
    data: str | Path, images: str | Path | None = None, tasks: Sequence[str] | None = None, limit: int | None = None
) -> list[Row]:
    """Rows of a file to evaluate on. Raises MBQError for a task that no row has, or a picture that is not there."""
    rows = select(read_rows(data, images), tasks, limit)
    check_images(rows)
    return rows


def world_questions(
    folder: str | Path, tasks: Sequence[str] | None = None, limit: int | None = None, seed: int = 0
) -> list[Row]:
    """Draw the world's test set into ``folder`` and read it. Raises MBQError for a task it does not have."""
    from mbq.world import write

    data = write(folder, split="test", tasks=tasks, per_task=PER_TASK if limit is None else limit, seed=seed)
    return read_rows(data)


def run(
    model: str | Path,
    *,
    baseline: str | Path | None = None,
    tasks: Sequence[str] | None = None,
    data: str | Path | None = None,
    images: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    output: str | Path | None = None,
    console: Console | None = None,
    progress: Progress = silent,
    **loading: Any,
) -> list[Results]:
    """``mbq evaluate``: accuracy of a folder, and of a baseline on the same questions, as a table on ``console``.

    data     rows with answers (and a "task" each, if there are several); None is the world's test set
    limit    questions a task, the first of each
    output   a folder to write <model's name>.json into, for later comparisons
    loading  device, dtype, trust_remote_code

    Raises MBQError for whatever the user can mend, before any model is loaded where that is possible.
    """
    if limit is not None and limit < 1:
        raise MBQError(f"--limit is {limit}; give a number of questions a task from 1 up.")
    if images is not None and data is None:
        raise MBQError(
            "--images belongs to --data, which is missing; give both, or neither for the built-in questions."
        )
    console = console or Console()
    results: list[Results] = []
    with tempfile.TemporaryDirectory(prefix="mbq-questions-") as folder:
        rows = world_questions(folder, tasks, limit) if data is None else read_questions(data, images, tasks, limit)
        questions: Questions | None = None
        for path in (model,) if baseline is None else (baseline, model):
            loaded = mbq.load(path, **loading)
            if questions is None:
                processor = mbq.load_processor(path, loading.get("trust_remote_code", False))
                questions = prepare(rows, processor, batch_size, progress)
            name = Path(path).name
            if any(result.model == name for result in results):  # two folders of one name: the files must differ
                name += "-2"
            results.append(evaluate(loaded, questions, name=name, progress=progress))
    console.print(results_table(results))
    if output is not None:
        Path(output).mkdir(parents=True, exist_ok=True)
        for result in results:
            result.save(Path(output) / f"{result.model}.json")
    return results
