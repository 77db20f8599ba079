"""``mbq demo``: one small trained model, quantized by several methods, and what each cost in accuracy."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

import mbq
from mbq.checkpoint.folder import check_new, new_folder
from mbq.errors import MBQError
from mbq.evaluation import Questions, Results, answers, evaluate, prepare
from mbq.evaluation.command import run_info
from mbq.evaluation.examples import Examples
from mbq.evaluation.run import PER_TASK, world_questions
from mbq.evaluation.runs import write_run
from mbq.evaluation.table import plus_minus, results_table
from mbq.progress import Progress, shown
from mbq.report import report
from mbq.rows import Row, text_of

OUTPUT = Path("mbq-demo")
SCHEMES = {"W3A16": ("rtn", "awq", "mbq"), "W4A8": ("rtn", "smoothquant", "mbq")}
NAMES = {"rtn": "RTN", "awq": "AWQ", "mbq": "MBQ", "smoothquant": "SmoothQuant"}
SAMPLES = 128  # questions about pictures to calibrate on
CALIBRATION_BATCH, EVALUATION_BATCH = 8, 256
SHOWN, LONGEST = 6, 32  # wrong answers a task that the report shows, and tokens of an answer


@dataclass(frozen=True)
class Trial:
    """One model of the demo.

    name     its folder's, such as "W3A16-mbq", or "float"
    label    its column's
    size     of its weight files, in bytes
    seconds  that quantizing took; None for the float model
    """

    name: str
    label: str
    model: Any
    size: int
    seconds: float | None
    results: Results


def demo(
    output: str | Path = OUTPUT,
    *,
    model: str | Path | None = None,
    per_task: int = PER_TASK,
    tasks: Sequence[str] | None = None,
    console: Console | None = None,
) -> None:
    """Quantize ``model`` (None: the InternVL that mbq brings) at two schemes, reload, evaluate, print tables.

    output    a new folder: calibration data, questions with their pictures, the quantized models, what they answered
              (runs), and a page about all of it (report.html)
    per_task  questions a task; ``tasks`` are names of ``mbq.world.TASKS``, None all

    Raises MBQError if ``output`` is not empty, or if the model is nowhere to be found.
    """
    console = console or Console()
    output = Path(output)
    source = Path(model) if model is not None else reference_model("internvl")
    check_new(output)
    disable_progress_bar()  # of transformers, which would draw one a model over ours
    started = time.monotonic()
    with new_folder(output) as folder, shown(Console(stderr=True)) as progress:
        calibration, rows = _write_data(folder, per_task, tasks, progress)
        processor = mbq.load_processor(source)
        questions = prepare(rows, processor, EVALUATION_BATCH, progress)
        shown_answers = Examples(questions, SHOWN, LONGEST, EVALUATION_BATCH)
        jobs = [(scheme, method) for scheme, methods in SCHEMES.items() for method in methods]
        bar = _part(progress, 0, len(jobs) + 1, "float")
        trials = [_float(source, questions, bar)]
        shown_answers.add(trials[0].model, trials[0].results, bar)
        for done, (scheme, method) in enumerate(jobs, start=1):
            bar = _part(progress, done, len(jobs) + 1, f"{scheme} {NAMES[method]}")
            trials.append(_quantized(source, folder, calibration, scheme, method, questions, bar))
            shown_answers.add(trials[-1].model, trials[-1].results, bar)
        progress("models", len(trials), len(trials), "")
        example = rows[_example(questions, [trial.results for trial in trials])]
        said = [answers(trial.model, processor, [example])[0] for trial in trials]
        _write_report(source, folder, trials, shown_answers)
    for scheme in SCHEMES:
        console.print(_table(scheme, [trials[0], *(trial for trial in trials if trial.name.startswith(scheme))]))
    _print_answers(console, example, output, folder, trials, said)
    for line in (
        f"The quantized models are in {output}; MBQ's at 3 bits: {output / 'W3A16-mbq'}",
        f'Ask it yourself: mbq generate {output / "W3A16-mbq"} --image PICTURE --prompt "..."',
        f"The demo took {time.monotonic() - started:.0f} s.",
        f"All of it on one page: {output / 'report.html'}",
    ):
        console.print(line, highlight=False, soft_wrap=True)


def reference_model(family: str) -> Path:
    """The folder of a trained reference model: in the installed package, or in the repository around it."""
    package = Path(__file__).parent
    for folder in (package / "models" / family, package.parents[1] / "models" / family):
        if (folder / "config.json").is_file():
            return folder
    raise MBQError(f"The reference model {family} is missing; install mbq from its wheel, or run it in its repository.")


def _write_data(folder: Path, per_task: int, tasks: Sequence[str] | None, progress: Progress) -> tuple[Path, list[Row]]:
    """Questions to calibrate on, and those of the test, which share no scene with them."""
    from mbq.world import TASKS, write

    progress("draw pictures", 0, SAMPLES + per_task, "")
    asked = [task.name for task in TASKS.values() if task.needs_image]
    calibration = write(folder / "calibration", split="calibration", tasks=asked, per_task=SAMPLES)
    progress("draw pictures", SAMPLES, SAMPLES + per_task, "")
    rows = world_questions(folder / "questions", tasks, per_task)
    progress("draw pictures", SAMPLES + per_task, SAMPLES + per_task, "")
    return calibration, rows


def _float(source: Path, questions: Questions, progress: Progress) -> Trial:
    model = mbq.load(source)
    results = evaluate(model, questions, "float", progress=progress)
    return Trial("float", "float", model, _weight_bytes(source), None, results)


def _quantized(
    source: Path, folder: Path, data: Path, scheme: str, method: str, questions: Questions, progress: Progress
) -> Trial:
    """Quantize into a folder, load what was written, and evaluate that."""
    name, label = f"{scheme}-{method}", NAMES[method]
    made = mbq.quantize(
        source,
        scheme=scheme,
        method=method,
        data=data,
        output=folder / name,
        num_calibration_samples=SAMPLES,
        batch_size=CALIBRATION_BATCH,
        device="cpu",
        progress=progress,
    )
    model = mbq.load(folder / name)
    results = evaluate(model, questions, name, progress=progress)
    return Trial(name, label, model, _weight_bytes(folder / name), sum(made.seconds.values()), results)


def _write_report(source: Path, folder: Path, trials: Sequence[Trial], shown_answers: Examples) -> None:
    """A run's folder a model, and the page about them."""
    for number, trial in enumerate(trials):
        place = source if trial.seconds is None else folder / trial.name
        info = run_info(trial.model, place, trial.name) | {
            "source": place.name,
            "seconds": round(trial.results.seconds, 2),
            "data": {"data": None, "tasks": None, "limit": None},
        }
        pictures = shown_answers.pictures(number)
        write_run(folder / "runs" / trial.name, info, trial.results, shown_answers.of(number), pictures, place)
    report([folder / "runs" / trial.name for trial in trials], folder / "report.html")


def _part(progress: Progress, models: int, total: int, name: str) -> Progress:
    """The steps of one model as a note on the bar that counts models."""

    def update(step: str, done: int, steps: int, note: str = "") -> None:
        progress("models", models, total, f"{name}: {step} {done}/{steps}")

    return update


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _table(scheme: str, trials: Sequence[Trial]) -> Table:
    """Accuracy a task and on average, what MBQ gains over the others, size and time."""
    results = [trial.results for trial in trials]
    title = f"{scheme}: right answers, % (± 95 % interval)"
    table = results_table(results, title, [trial.label for trial in trials])
    kind = results[0].image_tasks or results[0].tasks
    gains = [results[-1].minus(result, kind) for result in results[:-1]]
    table.add_row("image tasks: MBQ less it", *(plus_minus(gain, signed=True) for gain in gains), "", end_section=True)
    table.add_row("weights on disk, MB", *(f"{trial.size / 1e6:.2f}" for trial in trials))
    table.add_row("quantized in, s", *("" if trial.seconds is None else f"{trial.seconds:.1f}" for trial in trials))
    table.add_row("evaluated in, s", *(f"{trial.results.seconds:.1f}" for trial in trials))
    return table


def _example(questions: Questions, results: Sequence[Results]) -> int:
    """The first question about a picture that the float model has right and not every model has; else the first."""
    place: dict[str, int] = {}
    for row, task in enumerate(questions.tasks):
        index = place.get(task, 0)
        place[task] = index + 1
        right = [bool(result.correct[task][index]) for result in results]
        if task in questions.image_tasks and right[0] and not all(right):
            return row
    return 0


def _print_answers(
    console: Console, row: Row, output: Path, folder: Path, trials: Sequence[Trial], said: Sequence[str]
) -> None:
    def line(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    line("What each answers to one question about a picture, the first on which they differ if there is one:")
    for picture in row.images:
        shown_path = output / Path(str(picture)).relative_to(folder)
        line(f"  picture   {shown_path}")
    line(f"  question  {text_of(row.messages[-2])}")
    line(f"  answer    {text_of(row.messages[-1])}")
    width = max(len(trial.name) for trial in trials)
    for trial, text in zip(trials, said, strict=True):
        printable = "".join(letter if letter.isprintable() else " " for letter in text)
        line(f"    {trial.name:{width}}  {printable.strip()}")
