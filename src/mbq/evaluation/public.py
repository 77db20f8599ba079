"""Public benchmarks, and tasks of one's own, through lmms-eval's evaluator: its prompts, its scoring, its errors."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import ImageFile
from rich import box
from rich.table import Table

from mbq.errors import MBQError
from mbq.output import write_json
from mbq.progress import Progress, silent

INSTALL = "pip install 'mbq[evaluate]'"
WRITTEN, COMPARED = {"generate_until"}, {"loglikelihood", "multiple_choice"}


@dataclass(frozen=True)
class PublicTasks:
    """Tasks that lmms-eval has loaded.

    manager  its index of tasks
    written  names of tasks and groups that let the model write
    compared names of those that compare likelihoods of given answers
    """

    manager: Any
    written: list[str]
    compared: list[str]


def installed() -> bool:
    return importlib.util.find_spec("lmms_eval") is not None


def find_tasks(
    names: Sequence[str], include_path: str | Path | None, others: Sequence[str], progress: Progress = silent
) -> PublicTasks:
    """Load tasks, with their data, before any model.

    include_path  a folder with tasks of one's own, looked through first
    others        the names that are no business of lmms-eval's, for the message

    Raises MBQError without lmms-eval, for names that it does not know, for data that cannot be had, and for tasks of a
    kind that mbq does not run.
    """
    known = ", ".join(others)
    if not installed():
        raise MBQError(f"Unknown task {names[0]!r}; choose from {known}, or get public benchmarks by {INSTALL}.")
    with _lmms_eval():
        from lmms_eval.tasks import TaskManager

        manager = None
        if include_path is not None:
            if not Path(include_path).is_dir():
                raise MBQError(f"--include-path {include_path} is no folder; give one with tasks' YAML files.")
            manager = TaskManager("ERROR", include_path=str(include_path), include_defaults=False)
        if manager is None or not set(names) <= set(manager.all_tasks):
            manager = TaskManager("ERROR", include_path=None if include_path is None else str(include_path))
        for name in names:
            if name not in manager.all_tasks:
                raise MBQError(
                    f"Unknown task {name!r}; choose from {known}, or from lmms-eval's, which `lmms-eval tasks list` "
                    "prints, and from the folder of --include-path."
                )
        written: list[str] = []
        compared: list[str] = []
        for number, name in enumerate(names):
            progress("load lmms-eval's tasks", number, len(names), name)
            (compared if _kinds(name, manager) & COMPARED else written).append(name)
        progress("load lmms-eval's tasks", len(names), len(names), "")
    return PublicTasks(manager, written, compared)


def _kinds(name: str, manager: Any) -> set[str]:
    """What the tasks behind a name ask of a model. Raises MBQError for what mbq does not run."""
    from lmms_eval.evaluator_utils import get_task_list
    from lmms_eval.tasks import get_task_dict

    try:
        tasks = [output.task for output in get_task_list(get_task_dict([name], manager, "chat"))]
    except Exception as error:  # data sets, their code and a task's own Python fail in as many ways as there are
        raise MBQError(f"lmms-eval cannot load the task {name} ({_reason(error)}); check its data.") from error
    for task in tasks:
        if task.OUTPUT_TYPE not in WRITTEN | COMPARED:
            raise MBQError(f"{task.task_name} is a {task.OUTPUT_TYPE} task, which mbq does not run; leave it out.")
    return {task.OUTPUT_TYPE for task in tasks}


def evaluate_tasks(
    model: Any,
    processor: Any,
    tasks: PublicTasks,
    folder: Path,
    *,
    limit: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Run lmms-eval on a loaded model and return what run.json says of it.

    folder  gets samples_TASK.jsonl, a line a document with what the model wrote, and what tasks write themselves
    limit   documents a task, the first
    seed    of few-shot examples, and of sampling where a task asks for it

    Raises MBQError where a task's own code fails.
    """
    found: dict[str, Any] = {}
    with _lmms_eval():
        from lmms_eval.evaluator import simple_evaluate
        from lmms_eval.utils import handle_non_serializable

        from mbq.evaluation.harness import ChatModel, SimpleModel

        for names, adapter in ((tasks.written, ChatModel), (tasks.compared, SimpleModel)):
            if not names:
                continue
            try:
                results = simple_evaluate(
                    model=adapter(model, processor, batch_size, progress),
                    tasks=list(names),
                    limit=limit,
                    batch_size=batch_size,
                    task_manager=tasks.manager,
                    random_seed=seed,
                    numpy_random_seed=seed,
                    torch_random_seed=seed,
                    fewshot_random_seed=seed,
                    process_docs_parallel=1,
                    cli_args=SimpleNamespace(output_path=str(folder), process_with_media=False),
                )
            except (MBQError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                raise MBQError(f"lmms-eval failed on {', '.join(names)}: {_reason(error)}.") from error
            plain = json.loads(json.dumps(results, default=handle_non_serializable))
            for task, samples in plain.pop("samples", {}).items():
                lines = (json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
                (folder / f"samples_{task}.jsonl").write_text("".join(lines), encoding="utf-8")
            for key in ("results", "groups", "n-samples", "n-shot", "versions", "higher_is_better", "configs"):
                found.setdefault(key, {}).update(plain.get(key, {}))
    configs = found.pop("configs")
    write_json(folder / "configs.json", configs)
    return {"version": _version(), "limit": limit, "seed": seed, **found}


def scores(summary: Mapping[str, Any]) -> Iterator[tuple[str, str, float, float | None]]:
    """(task, metric, value, standard error or None) of what ``evaluate_tasks`` returned."""
    for task, metrics in summary.get("results", {}).items():
        for key, value in metrics.items():
            metric, _, filtered = key.partition(",")
            if isinstance(value, int | float) and filtered and "_stderr" not in metric:
                error = metrics.get(f"{metric}_stderr,{filtered}")
                name = metric if filtered == "none" else f"{metric} ({filtered})"
                yield task, name, float(value), float(error) if isinstance(error, int | float) else None


def public_table(names: Sequence[str], summaries: Sequence[dict[str, Any]]) -> Table:
    """A row a task and metric, a column a model, as the harness counts: value and one standard error."""
    title = f"lmms-eval {summaries[0]['version']} (± one standard error)"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    for head in ("task", "metric"):
        table.add_column(head, no_wrap=True)
    for name in names:
        table.add_column(name, justify="right")
    columns = [{(task, metric): (value, error) for task, metric, value, error in scores(each)} for each in summaries]
    for task, metric in columns[0]:
        cells = [column.get((task, metric)) for column in columns]
        table.add_row(task, metric, *("" if cell is None else plus_minus(*cell) for cell in cells))
    return table


def plus_minus(value: float, error: float | None) -> str:
    """A value and its standard error, where there is one."""
    return f"{value:.4f}" if error is None else f"{value:.4f} ±{error:.4f}"


@contextlib.contextmanager
def _lmms_eval() -> Iterator[None]:
    """Inside, lmms-eval can be imported and called; what it prints goes to stderr, and what it changes is changed back.

    It lets Pillow read pictures that are cut off, as some of its data sets' are, for the whole process.
    """
    truncated = ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        with contextlib.redirect_stdout(sys.stderr):
            from loguru import logger

            importlib.import_module("lmms_eval.evaluator")  # which sets a log of its own up, on stdout

            logger.remove()
            logger.add(sys.stderr, level="ERROR")
            ImageFile.LOAD_TRUNCATED_IMAGES = True
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = truncated


def _reason(error: BaseException) -> str:
    last = getattr(error, "last_attempt", None)  # tenacity's, which tries several times
    cause = (last.exception() if last is not None else None) or error
    return " ".join(str(cause).split())[:300].rstrip(".") or type(cause).__name__


def _version() -> str:
    from importlib.metadata import version

    return version("lmms-eval")
