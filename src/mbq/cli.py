"""The command line: parse, call, print. Heavy imports wait inside the commands, so that --help is quick."""

from __future__ import annotations

import errno
import functools
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mbq import ranks
from mbq.errors import MBQError, MBQWarning
from mbq.options import (
    Activations,
    Batch,
    Data,
    Device,
    DistortedInput,
    Dtype,
    Floor,
    FolderArgument,
    Formatting,
    GQAFold,
    GroupSize,
    Ignore,
    Images,
    Length,
    Method,
    ModelArgument,
    NewFolder,
    Norm,
    Objective,
    Offload,
    OffloadFolder,
    Parity,
    Private,
    PushToHub,
    Resume,
    Samples,
    Scheme,
    SearchTokens,
    Seed,
    ShardSize,
    SmoothAlpha,
    Text,
    Trust,
    Verbose,
    VisionTower,
    VisionWeight,
    WriteReport,
)
from mbq.progress import shown
from mbq.recipe import Recipe

app = typer.Typer(
    help="Modality-balanced quantization of vision-language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

DEFAULT = Recipe()
# Arguments of mbq quantize and mbq export that are no options of the recipe.
NO_RECIPE = ("model", "output", "resume", "report", "push_to_hub", "private", "verbose")
# By torchrun's processes; the others are rank 0's alone.
SHARED = ("quantize_command", "export_command", "sensitivity_command")


def main() -> None:
    """The entry point of the ``mbq`` command."""
    signal.signal(signal.SIGTERM, _terminated)
    app()


def _terminated(*_: Any) -> None:
    """A terminated run removes its unfinished folder as an interrupted one does."""
    if ranks.count() > 1 and sys.exc_info()[0] is not None:
        return  # it is ending already, for a reason that torchrun's signal must not hide
    if ranks.met():
        raise ranks.LostRank
    sys.exit(128 + signal.SIGTERM)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register ``function`` as a command whose expected failures end in one sentence on stderr and a status."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        if function.__name__ not in SHARED:
            if ranks.rank() > 0:
                return
            os.environ.pop("WORLD_SIZE", None)  # rank 0 works as if alone
        verbose = kwargs.get("verbose", 0)
        _set_up_logging(verbose)
        try:
            function(*args, **kwargs)
        except KeyboardInterrupt as interrupt:
            _fail(str(interrupt) or "Interrupted; nothing was written.", 130)
        except Exception as error:
            sentence = _sentence(error)
            if sentence is None or verbose > 1:
                raise
            _fail(sentence, 2)

    app.command(name=function.__name__.removesuffix("_command"))(run)
    return run


def _sentence(error: Exception) -> str | None:
    """What to tell the user about ``error``; None for a fault of the program, which keeps its traceback."""
    if isinstance(error, MBQError):
        return str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"No space is left on the disk of {error.filename or 'the output'}; free some, or write to another disk."
    if type(error).__name__ == "OutOfMemoryError":
        options = "--num-calibration-samples, --max-seq-length or --batch-size"
        return f"The GPU's memory is full; lower {options}, or choose another --device."
    return None


def _fail(sentence: str, status: int) -> None:
    if ranks.tells():
        typer.echo(f"mbq: {sentence}", err=True)
    if ranks.count() > 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends those that are left, this one has ended
    raise typer.Exit(status)


def _set_up_logging(verbose: int) -> None:
    if not sys.stderr.isatty() or ranks.rank() > 0:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
    if verbose:
        logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)
        logging.getLogger("mbq").setLevel(logging.INFO)
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    warnings.simplefilter("ignore")
    warnings.simplefilter("default", MBQWarning)
    warnings.showwarning = lambda message, *rest: typer.echo(f"mbq: {message}", err=True)
    if ranks.rank() > 0:
        warnings.simplefilter("ignore")


def _announce(console: Console) -> Callable[[object], None]:
    """Prints a plan before the run that it is of."""
    return lambda plan: console.print(str(plan), markup=False, highlight=False, soft_wrap=True)


def _errors() -> Console:
    """Progress goes to stderr, so that stdout holds results only."""
    return Console(stderr=True)


def _check_push(push_to_hub: str | None, private: bool) -> None:
    """Whether the upload can succeed, before the search."""
    if push_to_hub is None and private:
        raise MBQError("--private is of the repository that --push-to-hub names; give both.")
    if push_to_hub is not None and ranks.rank() == 0:
        from mbq.publishing import check_push

        check_push(push_to_hub, private)


def _push(folder: Path, repository: str | None, private: bool) -> None:
    if repository is not None:
        from mbq.publishing import push

        typer.echo(str(push(folder, repository, private)))


@command
def quantize_command(
    model: ModelArgument,
    output: NewFolder,
    scheme: Scheme = DEFAULT.scheme,
    method: Method = DEFAULT.method,
    data: Data = None,
    images: Images = None,
    num_calibration_samples: Samples = DEFAULT.num_calibration_samples,
    max_seq_length: Length = DEFAULT.max_seq_length,
    batch_size: Batch = DEFAULT.batch_size,
    seed: Seed = DEFAULT.seed,
    formatting: Formatting = DEFAULT.formatting,
    text: Text = None,
    group_size: GroupSize = None,
    ignore: Ignore = None,
    norm: Norm = DEFAULT.norm,
    objective: Objective = DEFAULT.objective,
    floor: Floor = None,
    vision_weight: VisionWeight = DEFAULT.vision_weight,
    smooth_alpha: SmoothAlpha = DEFAULT.smooth_alpha,
    gqa_fold: GQAFold = False,
    distorted_input: DistortedInput = False,
    parity: Parity = False,
    search_tokens: SearchTokens = DEFAULT.search_tokens,
    vision_tower: VisionTower = None,
    max_shard_size: ShardSize = DEFAULT.max_shard_size,
    device: Device = DEFAULT.device,
    dtype: Dtype = DEFAULT.dtype,
    offload: Offload = DEFAULT.offload,
    activations: Activations = DEFAULT.activations,
    offload_folder: OffloadFolder = None,
    resume: Resume = False,
    report: WriteReport = True,
    push_to_hub: PushToHub = None,
    private: Private = False,
    trust_remote_code: Trust = False,
    verbose: Verbose = 0,
) -> None:
    """Quantize a vision-language model and write it as a folder that mbq and transformers load."""
    options = {name: value for name, value in locals().items() if name not in NO_RECIPE}
    options["ignore"] = ignore or ()
    Recipe.of(**options)  # a wrong option is told before torch is imported
    _check_push(push_to_hub, private)
    from mbq.pipeline import quantize

    console = _errors()
    with shown(console) as progress:
        result = quantize(
            model,
            output=output,
            resume=resume,
            progress=progress,
            announce=_announce(console),
            report=report,
            **options,
        )
    if ranks.rank() == 0:
        typer.echo(str(result))
        _push(output, push_to_hub, private)


@command
def export_command(
    model: ModelArgument,
    output: NewFolder,
    format: Annotated[
        str, typer.Option(help="equalized: a float folder for any other quantizer; gguf: for llama.cpp.")
    ] = "equalized",
    scheme: Scheme = DEFAULT.scheme,
    method: Method = DEFAULT.method,
    data: Data = None,
    images: Images = None,
    num_calibration_samples: Samples = DEFAULT.num_calibration_samples,
    max_seq_length: Length = DEFAULT.max_seq_length,
    batch_size: Batch = DEFAULT.batch_size,
    seed: Seed = DEFAULT.seed,
    formatting: Formatting = DEFAULT.formatting,
    text: Text = None,
    group_size: GroupSize = None,
    ignore: Ignore = None,
    norm: Norm = DEFAULT.norm,
    objective: Objective = DEFAULT.objective,
    floor: Floor = None,
    vision_weight: VisionWeight = DEFAULT.vision_weight,
    smooth_alpha: SmoothAlpha = DEFAULT.smooth_alpha,
    gqa_fold: GQAFold = False,
    distorted_input: DistortedInput = False,
    parity: Parity = False,
    search_tokens: SearchTokens = DEFAULT.search_tokens,
    vision_tower: VisionTower = None,
    max_shard_size: ShardSize = DEFAULT.max_shard_size,
    device: Device = DEFAULT.device,
    dtype: Dtype = DEFAULT.dtype,
    offload: Offload = DEFAULT.offload,
    activations: Activations = DEFAULT.activations,
    offload_folder: OffloadFolder = None,
    resume: Resume = False,
    push_to_hub: PushToHub = None,
    private: Private = False,
    trust_remote_code: Trust = False,
    verbose: Verbose = 0,
) -> None:
    """Equalize a vision-language model as mbq quantize does, and write it without quantizing it."""
    options = {name: value for name, value in locals().items() if name not in (*NO_RECIPE, "format")}
    options["ignore"] = ignore or ()
    Recipe.of(**options)
    _check_push(push_to_hub, private)
    from mbq.exporting import export

    console = _errors()
    with shown(console) as progress:
        result = export(
            model,
            output=output,
            format=format,
            resume=resume,
            progress=progress,
            announce=_announce(console),
            **options,
        )
    if ranks.rank() == 0:
        typer.echo(str(result))
        _push(output, push_to_hub, private)


@command
def inspect_command(
    model: ModelArgument,
    scheme: Annotated[str, typer.Option(help="A scheme, as for mbq quantize.")] = DEFAULT.scheme,
    group_size: Annotated[int | None, typer.Option(help="Input channels that share a scale (128).")] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="A linear to keep in 16 bits; repeatable.")] = None,
    vision_tower: VisionTower = None,
    method: Method = DEFAULT.method,
    num_calibration_samples: Samples = DEFAULT.num_calibration_samples,
    max_seq_length: Length = DEFAULT.max_seq_length,
    batch_size: Batch = DEFAULT.batch_size,
    device: Device = DEFAULT.device,
    dtype: Dtype = DEFAULT.dtype,
    offload: Offload = DEFAULT.offload,
    activations: Activations = DEFAULT.activations,
    offload_folder: OffloadFolder = None,
    trust_remote_code: Trust = False,
    verbose: Verbose = 0,
) -> None:
    """Show what would be quantized, sizes, memory, disk and time; reads only the configuration."""
    options = {name: value for name, value in locals().items() if name not in ("model", "verbose")}
    options["ignore"] = ignore or ()
    Recipe.of(**options)
    from mbq.inspection import inspect, inspection_lines, inspection_table

    found = inspect(model, **options)
    Console().print(inspection_table(found))
    typer.echo(inspection_lines(found))


@command
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


@command
def sensitivity_command(
    model: ModelArgument,
    data: Data = None,
    images: Images = None,
    output: Annotated[
        Path | None, typer.Option(help="Also write sensitivity.json and sensitivity.png here.", metavar="DIR")
    ] = None,
    num_calibration_samples: Samples = DEFAULT.num_calibration_samples,
    max_seq_length: Length = DEFAULT.max_seq_length,
    batch_size: Batch = DEFAULT.batch_size,
    seed: Seed = DEFAULT.seed,
    formatting: Formatting = DEFAULT.formatting,
    text: Text = None,
    device: Device = DEFAULT.device,
    dtype: Dtype = DEFAULT.dtype,
    offload: Offload = DEFAULT.offload,
    activations: Activations = DEFAULT.activations,
    offload_folder: OffloadFolder = None,
    trust_remote_code: Trust = False,
    verbose: Verbose = 0,
) -> None:
    """Show how much the answer's loss depends on vision and on language tokens, block by block."""
    options = {name: value for name, value in locals().items() if name not in ("model", "output", "verbose")}
    Recipe.of(**options)
    from mbq.checkpoint.folder import check_new, new_folder
    from mbq.figures import save_sensitivity_picture, sensitivity_table
    from mbq.output import write_json
    from mbq.pipeline import measure_sensitivity

    if output is not None:
        check_new(output)
    console = _errors()
    with shown(console) as progress:
        measured = measure_sensitivity(model, progress=progress, announce=_announce(console), **options)
    if ranks.rank() > 0:
        return
    Console().print(sensitivity_table(measured))
    if output is not None:
        with new_folder(output) as folder:
            write_json(folder / "sensitivity.json", measured.to_json())
            save_sensitivity_picture(measured, folder / "sensitivity.png", Path(model).name)
        typer.echo(f"Wrote {output / 'sensitivity.json'} and {output / 'sensitivity.png'}.")


@command
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
    with shown(_errors()) as progress:
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


@command
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


@command
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
    with shown(_errors()) as progress:
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


@command
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


@command
def demo_command(
    output: Annotated[Path, typer.Option(help="A new folder for pictures and models.", metavar="DIR")] = Path(
        "mbq-demo"
    ),
    model: Annotated[str | None, typer.Option(help="A model other than the one that mbq brings.")] = None,
    verbose: Verbose = 0,
) -> None:
    """Quantize a small trained model by every method and show what each costs."""
    from mbq.demo import demo

    demo(output, model=model)


@command
def doctor_command(verbose: Verbose = 0) -> None:
    """Show which kernels run on this machine, and why the others do not."""
    from mbq.doctor import doctor

    doctor(Console())


@command
def card_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that mbq quantize or mbq export wrote.")],
    results: Annotated[Path, typer.Option(help="The run of this model (mbq evaluate --output).", metavar="RUN")],
    baseline: Annotated[Path | None, typer.Option(help="A run to compare with.", metavar="RUN")] = None,
    verbose: Verbose = 0,
) -> None:
    """Write what mbq evaluate found into the folder's model card."""
    from mbq.card_results import write_results

    typer.echo(f"Wrote {write_results(folder, results, baseline)}")


@command
def push_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that mbq quantize or mbq export wrote.")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME[@BRANCH]", help="A repository on the hub.")],
    private: Private = False,
    verbose: Verbose = 0,
) -> None:
    """Upload a folder to the Hugging Face hub, its model's files and no others."""
    _push(folder, repository, private)


@command
def families_command(
    markdown: Annotated[bool, typer.Option("--markdown", help="The table of docs/families.md.")] = False,
    verbose: Verbose = 0,
) -> None:
    """Show which model families mbq knows, and what it does to them (--markdown: all of it)."""
    from mbq.family_table import family_table, markdown_table, refused_lines

    if markdown:
        typer.echo(markdown_table())
    else:
        Console().print(family_table(), refused_lines(), highlight=False)


@command
def bench_command(
    model: Annotated[
        str | None,
        typer.Option(help="A folder or id that gives the shapes; Qwen2-7B's.", metavar="MODEL"),
    ] = None,
    schemes: Annotated[list[str] | None, typer.Option(help="W3A16,W4A16. Repeatable, or a,b,c.")] = None,
    rows: Annotated[list[str] | None, typer.Option(help="Rows of x: 1,4,16. Repeatable, or a,b,c.")] = None,
    dtype: Annotated[str, typer.Option(help="float16 or bfloat16.")] = "float16",
    layers: Annotated[int | None, typer.Option(help="Layers of the stack; the model's.", min=1)] = None,
    kernel: Annotated[str, typer.Option(help="auto, or a kernel that mbq doctor lists.")] = "auto",
    json: Annotated[Path | None, typer.Option(help="Also write the measurements here.", metavar="FILE")] = None,
    trust_remote_code: Trust = False,
    verbose: Verbose = 0,
) -> None:
    """Time the packed linears on this GPU, beside cuBLAS and beside only reading their bytes."""
    from mbq.bench import bench
    from mbq.bench_report import table
    from mbq.output import write_json

    with shown(_errors()) as progress:
        report = bench(
            model,
            schemes=[name for given in schemes or ["W3A16,W4A16"] for name in given.split(",")],
            rows=[count for given in rows or ["1,4,16"] for count in given.split(",")],
            dtype=dtype,
            layers=layers,
            kernel=kernel,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    Console().print(table(report))
    if json is not None:
        write_json(json, report.to_json())
        typer.echo(f"Wrote {json}.")
