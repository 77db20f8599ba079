"""``mbq evaluate``: what is asked of a model and of a baseline, what is printed of it and what is stored."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import mbq
from mbq.checkpoint.folder import check_new
from mbq.errors import MBQError
from mbq.evaluation import examples
from mbq.evaluation.examples import Examples
from mbq.evaluation.public import PublicTasks, evaluate_tasks, find_tasks, public_table
from mbq.evaluation.questions import prepare, select, task_of
from mbq.evaluation.results import Results
from mbq.evaluation.run import evaluate, world_questions
from mbq.evaluation.runs import write_run
from mbq.evaluation.table import results_table
from mbq.evaluation.text import measure_text, text_table
from mbq.loading import model_folder
from mbq.progress import Progress, silent
from mbq.qlinear import QuantLinear
from mbq.recipe import package_versions
from mbq.rows import Row, check_images, read_rows


@dataclass(frozen=True)
class Asked:
    """What every model is asked: questions, lmms-eval's tasks, text to read; None for what is not wanted."""

    rows: list[Row] | None
    public: PublicTasks | None
    text: list[Row] | None


@dataclass(frozen=True)
class Evaluated:
    """A model: where it is, what run.json will say, right and wrong, and what lmms-eval's tasks have written."""

    path: str | Path
    info: dict[str, Any]
    results: Results | None
    files: Path | None


def run(
    model: str | Path,
    *,
    baseline: str | Path | None = None,
    tasks: Sequence[str] | None = None,
    data: str | Path | None = None,
    images: str | Path | None = None,
    limit: int | None = None,
    include_path: str | Path | None = None,
    perplexity: str | Path | None = None,
    batch_size: int = 64,
    seed: int = 0,
    output: str | Path | None = None,
    answers: int = examples.PER_TASK,
    max_new_tokens: int = examples.MAX_NEW_TOKENS,
    console: Console | None = None,
    progress: Progress = silent,
    **loading: Any,
) -> list[Results]:
    """Evaluate a folder, and a baseline on the same, and print tables on ``console``.

    tasks       names of the data's tasks, and of lmms-eval's
    data        rows with answers (and a "task" each, if there are several); None is the world's test set, which is
                asked unless all ``tasks`` are lmms-eval's or only ``perplexity`` is wanted
    limit       questions a task, the first of each, and rows of ``perplexity``
    perplexity  rows with answers to measure perplexity on and, with a baseline, the KL divergence from it
    seed        where lmms-eval's tasks draw or sample; everything else is greedy
    output      where each model gets a run's folder, named as the model (``runs``)
    answers     wrong answers a task that a run shows, with what the model wrote, of at most ``max_new_tokens``
    loading     device, dtype, trust_remote_code

    Returns the results of the built-in questions, the baseline's first; nothing where none were asked.

    Raises MBQError for whatever the user can mend, before any model is loaded where that is possible.
    """
    if limit is not None and limit < 1:
        raise MBQError(f"--limit is {limit}; give a number of questions a task from 1 up.")
    if images is not None and data is None and perplexity is None:
        raise MBQError(
            "--images belongs to --data, which is missing; give both, or neither for the built-in questions."
        )
    paths = (model,) if baseline is None else (baseline, model)
    names = run_names(paths)
    if output is not None:
        for name in names:
            check_new(Path(output) / name)
    options: dict[str, Any] = {"tasks": tasks, "data": data, "images": images, "limit": limit}
    options |= {"include_path": include_path, "perplexity": perplexity}
    with tempfile.TemporaryDirectory(prefix="mbq-evaluate-") as scratch:
        asked = _asked(Path(scratch), progress, **options)
        processor = mbq.load_processor(paths[0], loading.get("trust_remote_code", False))
        questions = None if asked.rows is None else prepare(asked.rows, processor, batch_size, progress)
        shown = None if questions is None else Examples(questions, answers, max_new_tokens, batch_size)
        found: list[Evaluated] = []
        reference = None
        for path, name in zip(paths, names, strict=True):
            bar = progress if len(paths) == 1 else _part(progress, name)
            loaded = mbq.load(path, **loading)
            info = run_info(loaded, path, name) | {"data": _plain(options)}
            started = time.monotonic()
            results = files = None
            if questions is not None and shown is not None:
                results = evaluate(loaded, questions, name=name, progress=bar)
                if output is not None:
                    shown.add(loaded, results, bar)
            if asked.public is not None:
                files = Path(scratch) / f"lmms_eval-{name}"
                files.mkdir()
                info["lmms_eval"] = evaluate_tasks(
                    loaded, processor, asked.public, files, limit=limit, batch_size=batch_size, seed=seed, progress=bar
                )
            if asked.text is not None:
                info["text"] = measure_text(loaded, processor, asked.text, reference, bar).to_json()
                reference = loaded  # the baseline stays, to be read side by side with the model
            found.append(Evaluated(path, info | {"seconds": round(time.monotonic() - started, 2)}, results, files))
            del loaded  # before the next one needs its memory
        _print(console or Console(), found)
        if output is not None:
            for number, one in enumerate(found):
                _write(Path(output), one, shown, number)
    return [one.results for one in found if one.results is not None]


def _asked(
    scratch: Path,
    progress: Progress,
    tasks: Sequence[str] | None,
    data: str | Path | None,
    images: str | Path | None,
    limit: int | None,
    include_path: str | Path | None,
    perplexity: str | Path | None,
) -> Asked:
    """What to ask, read and checked. Raises MBQError for whatever is wrong with it."""
    from mbq.world import TASKS

    given = None if data is None else read_rows(data, images)
    known = list(TASKS) if given is None else list(dict.fromkeys(task_of(row) for row in given))
    own = None if tasks is None else [name for name in tasks if name in known]
    others = [name for name in tasks or () if name not in known]
    text = None if perplexity is None else read_rows(perplexity, images, limit=limit)
    if include_path is not None and not others:
        raise MBQError("--include-path belongs to --tasks, which names none of the tasks there; name one, or leave it.")
    public = find_tasks(others, include_path, known, progress) if others else None
    rows = None
    if own or (tasks is None and (given is not None or perplexity is None)):
        rows = world_questions(scratch / "world", own, limit) if given is None else select(given, own, limit)
    for pictured in (rows or [], text or []):
        check_images(pictured)
    return Asked(rows, public, text)


def _part(progress: Progress, name: str) -> Progress:
    """Steps of one model of several, so that what is left is told for each."""

    def update(step: str, done: int, total: int, note: str = "") -> None:
        progress(f"{name}: {step}", done, total, note)

    return update


def _plain(value: Any) -> Any:
    """Options as JSON has them."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def _print(console: Console, found: Sequence[Evaluated]) -> None:
    results = [one.results for one in found if one.results is not None]
    names = [one.info["model"] for one in found]
    if results:
        console.print(results_table(results))
    for table in other_tables(names, [one.info for one in found]):
        console.print(table)


def other_tables(names: Sequence[str], infos: Sequence[dict[str, Any]]) -> list[Table]:
    """What runs hold beside right and wrong answers, by their run.json, where all of them hold it."""
    made = []
    for key, table in (("lmms_eval", public_table), ("text", text_table)):
        parts = [info[key] for info in infos if info.get(key)]
        if len(parts) == len(infos):
            made.append(table(names, parts))
    return made


def _write(output: Path, one: Evaluated, shown: Examples | None, number: int) -> None:
    answered = shown.of(number) if shown is not None else []
    pictures = shown.pictures(number) if shown is not None else {}
    records = model_folder(one.path, weights=False)
    write_run(output / one.info["model"], one.info, one.results, answered, pictures, records, one.files)


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
