"""Evaluate a model on questions: the world's own, or rows from a file."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console

import mbq
from mbq.checkpoint.folder import check_new
from mbq.errors import MBQError
from mbq.evaluation import examples
from mbq.evaluation.examples import Examples
from mbq.evaluation.questions import Questions, prepare, select
from mbq.evaluation.results import Results
from mbq.evaluation.runs import write_run
from mbq.evaluation.scoring import score
from mbq.evaluation.table import results_table
from mbq.loading import model_folder
from mbq.progress import Progress, silent
from mbq.qlinear import QuantLinear
from mbq.recipe import package_versions
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
    answers: int = examples.PER_TASK,
    max_new_tokens: int = examples.MAX_NEW_TOKENS,
    console: Console | None = None,
    progress: Progress = silent,
    **loading: Any,
) -> list[Results]:
    """``mbq evaluate``: accuracy of a folder, and of a baseline on the same questions, as a table on ``console``.

    data     rows with answers (and a "task" each, if there are several); None is the world's test set
    limit    questions a task, the first of each
    output   where each model gets a run's folder, named as the model (``runs``)
    answers  wrong answers a task that a run shows, with what the model wrote, of at most ``max_new_tokens``
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
    paths = (model,) if baseline is None else (baseline, model)
    names = run_names(paths)
    if output is not None:
        for name in names:
            check_new(Path(output) / name)
    asked = {"data": None if data is None else str(data), "tasks": tasks and list(tasks), "limit": limit}
    with tempfile.TemporaryDirectory(prefix="mbq-questions-") as folder:
        rows = world_questions(folder, tasks, limit) if data is None else read_questions(data, images, tasks, limit)
        questions = prepare(
            rows, mbq.load_processor(paths[0], loading.get("trust_remote_code", False)), batch_size, progress
        )
        shown = Examples(questions, answers, max_new_tokens, batch_size)
        results, infos = [], []
        for path, name in zip(paths, names, strict=True):
            loaded = mbq.load(path, **loading)
            results.append(evaluate(loaded, questions, name=name, progress=progress))
            infos.append(run_info(loaded, path, name) | {"seconds": round(results[-1].seconds, 2), "data": asked})
            if output is not None:
                shown.add(loaded, results[-1], progress)
            del loaded  # before the next one needs its memory
        console.print(results_table(results))
        if output is not None:
            for number, (path, info) in enumerate(zip(paths, infos, strict=True)):
                target = Path(output) / info["model"]
                write_run(
                    target, info, results[number], shown.of(number), shown.pictures(number), model_folder(path, False)
                )
    return results


def run_names(paths: Sequence[str | Path]) -> list[str]:
    """What models are called in tables, and what their runs' folders are: the last part of each path, told apart."""
    names: list[str] = []
    for path in paths:
        name = plain = Path(path).name or Path(path).resolve().name or "model"
        number = 1
        while name in names:  # two folders of one name
            number += 1
            name = f"{plain}-{number}"
        names.append(name)
    return names


def run_info(model: Any, path: str | Path, name: str) -> dict[str, Any]:
    """What run.json says about a loaded model, where it came from and what runs it."""
    kernels = sorted({module.kernel for module in model.modules() if isinstance(module, QuantLinear)})
    return {
        "model": name,
        "source": str(path),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "kernel": ", ".join(kernels) or None,
        "bytes": sum(file.stat().st_size for file in model_folder(path).glob("*.safetensors")),
        "versions": package_versions(),
        "text": None,
        "lmms_eval": None,
    }
