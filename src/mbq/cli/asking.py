"""Commands that ask models, and show what they answered."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mbq.cli.command import errors
from mbq.cli.options import (
    Device,
    Dtype,
    FolderArgument,
    Images,
    Length,
    Offload,
    Seed,
    Trust,
    Verbose,
)
from mbq.progress import shown
from mbq.recipe import Recipe

DEFAULT = Recipe()


def generate_command(
    folder: FolderArgument,
    prompt: Annotated[str, typer.Option(help="What to ask.")],
    image: Annotated[list[Path] | None, typer.Option(help="An image; repeatable.", metavar="FILE")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer, in tokens.", min=1)] = 128,
    kernel: Annotated[str, typer.Option(help="auto, or a kernel that mbq doctor lists.")] = "auto",
    compiled: Annotated[
        bool, typer.Option("--compile", help="Let torch.compile make the decode step; slow to start.")
    ] = False,
    device: Device = DEFAULT.device,
    dtype: Dtype = DEFAULT.dtype,
    trust_remote_code: Trust = False,
    verbose: Verbose = 0,
) -> None:
    """Ask a quantized or float model a question about images."""
    from mbq.generation import generate
    from mbq.loading import load_processor
    from mbq.quantized import load

    processor = load_processor(folder, trust_remote_code)
    model = load(folder, device, dtype, kernel, trust_remote_code)
    typer.echo(generate(model, processor, prompt, image or [], max_new_tokens, compiled))


def evaluate_command(
    folder: FolderArgument,
    baseline: Annotated[str | None, typer.Option(help="A model to compare with, question by question.")] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="Tasks to ask, lmms-eval's too; all built-in ones. Repeatable, or a,b,c.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Questions with answers; the built-in test set.", metavar="PATH")
    ] = None,
    images: Images = None,
    limit: Annotated[int | None, typer.Option(help="Questions a task.")] = None,
    include_path: Annotated[
        str | None, typer.Option(help="A folder with lmms-eval tasks of your own.", metavar="DIR")
    ] = None,
    perplexity: Annotated[
        str | None,
        typer.Option(help="Rows to measure perplexity and KL divergence from the baseline on.", metavar="PATH"),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Questions that go through the model at once.")] = 64,
    seed: Annotated[int, typer.Option(help="Where lmms-eval's tasks draw or sample; all else is greedy.")] = 0,
    output: Annotated[str | None, typer.Option(help="Also write a folder a model here: a run.", metavar="DIR")] = None,
    answers: Annotated[int, typer.Option(help="Wrong answers a task that a run shows.", min=0)] = 20,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer that is shown, in tokens.", min=1)] = 128,
    device: Device = DEFAULT.device,
    dtype: Dtype = DEFAULT.dtype,
    trust_remote_code: Trust = False,
    verbose: Verbose = 0,
) -> None:
    """Ask a model questions with known answers and show its accuracy, with intervals."""
    from mbq.evaluation import run

    names = [name for given in tasks or () for name in given.split(",")]
    with shown(errors()) as progress:
        run(
            folder,
            baseline=baseline,
            tasks=names or None,
            data=data,
            images=images,
            limit=limit,
            include_path=include_path,
            perplexity=perplexity,
            batch_size=batch_size,
            seed=seed,
            output=output,
            answers=answers,
            max_new_tokens=max_new_tokens,
            progress=progress,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )


def compare_command(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of mbq evaluate --output; all against the first.")
    ],
    max_drop: Annotated[
        float | None,
        typer.Option(help="Exit with 1 if a kind of tasks (image, text, lmms-eval) fell by more points.", min=0),
    ] = None,
    sure: Annotated[
        bool, typer.Option("--sure", help="--max-drop holds only if the 95 % interval keeps within it.")
    ] = False,
    show: Annotated[int, typer.Option(help="Print so many of the questions that flipped.", min=0)] = 0,
    json: Annotated[Path | None, typer.Option(help="Also write the comparison here.", metavar="FILE")] = None,
    verbose: Verbose = 0,
) -> None:
    """Compare runs on the same questions: differences with intervals, what flipped, and whether that is chance."""
    from mbq.evaluation.command import other_tables
    from mbq.evaluation.compare import compare, exceeded, flips, names_of
    from mbq.evaluation.compare_table import comparison_table, drop_line, flip_lines
    from mbq.evaluation.runs import Run
    from mbq.output import write_json

    loaded = [Run.load(folder) for folder in runs]
    comparisons = compare(loaded)
    console, failures = Console(), []
    for comparison, run in zip(comparisons, loaded[1:], strict=True):
        console.print(comparison_table(comparison))
        for line in flip_lines(flips(loaded[0], run, show)):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        if max_drop is not None:
            over = exceeded(comparison, max_drop, sure)
            failures += [drop_line(comparison, line, max_drop, sure) for line in over]
    for table in other_tables(names_of(loaded), [run.info for run in loaded]):
        console.print(table)
    if json is not None:
        named = [{"folder": str(run.folder), "model": run.name, "created": run.info.get("created")} for run in loaded]
        found = [comparison.to_json() for comparison in comparisons]
        write_json(json, {"runs": named, "comparisons": found, "failures": failures})
    if failures:
        typer.echo("\n".join(failures), err=True)
        raise typer.Exit(1)


def diagnose_command(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A quantized folder.")],
    baseline: Annotated[str, typer.Option(help="The float model that it was made from.", metavar="MODEL")],
    data: Annotated[str, typer.Option(help="Rows with answers: JSON, JSONL, or a datasets folder.", metavar="PATH")],
    images: Images = None,
    output: Annotated[
        Path | None, typer.Option(help="Also write diagnosis.json: a file, or a folder.", metavar="PATH")
    ] = None,
    samples: Annotated[int, typer.Option(help="Rows for the errors of blocks.")] = 32,
    limit: Annotated[int, typer.Option(help="Questions a task, for the accuracy.")] = 100,
    answers: Annotated[int, typer.Option(help="Questions whose answers are written out; 0: none.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer, in tokens.")] = 64,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Time decode steps.")] = True,
    max_seq_length: Length = DEFAULT.max_seq_length,
    batch_size: Annotated[int, typer.Option(help="Rows that go through a model at once.")] = 8,
    seed: Seed = DEFAULT.seed,
    device: Device = DEFAULT.device,
    dtype: Dtype = DEFAULT.dtype,
    offload: Offload = DEFAULT.offload,
    trust_remote_code: Trust = False,
    verbose: Verbose = 0,
) -> None:
    """Measure a quantized model beside its float model; say what went wrong and what to try."""
    from mbq.diagnosis import Loading, diagnose, record
    from mbq.diagnosis.tables import show

    if output is not None:
        record.target(output)
    with shown(errors()) as progress:
        found = diagnose(
            folder,
            baseline,
            data=data,
            images=images,
            loading=Loading(device, dtype, offload, trust_remote_code),
            progress=progress,
            samples=samples,
            limit=limit,
            answers=answers,
            max_new_tokens=max_new_tokens,
            max_seq_length=max_seq_length,
            batch_size=batch_size,
            seed=seed,
            speed=speed,
        )
    show(found, Console())
    if output is not None:
        typer.echo(f"Wrote {record.write(found, output)}.")
    elif Path(folder).is_dir():
        typer.echo(f"To keep it beside the model: --output {folder}")


def report_command(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Runs (mbq evaluate --output), folders of runs, or quantized folders."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The page to write; an older report is replaced.", metavar="FILE")
    ] = Path("report.html"),
    verbose: Verbose = 0,
) -> None:
    """Write one page about quantized models and what they answered: charts, accuracy, answers side by side."""
    from mbq.report import report

    typer.echo(f"Wrote {report(folders, output)}.")
