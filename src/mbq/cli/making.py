"""Commands that make a folder of a model, or look into a model before that."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mbq import ranks
from mbq.cli.command import announce, errors
from mbq.cli.options import (
    Activations,
    Batch,
    Data,
    Device,
    DistortedInput,
    Dtype,
    Floor,
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
from mbq.cli.sharing import check_push, upload
from mbq.progress import shown
from mbq.recipe import Recipe

DEFAULT = Recipe()
# Arguments of mbq quantize and mbq export that are no options of the recipe.
NO_RECIPE = ("model", "output", "resume", "report", "push_to_hub", "private", "verbose")


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
    check_push(push_to_hub, private)
    from mbq.pipeline import quantize

    console = errors()
    with shown(console) as progress:
        result = quantize(
            model,
            output=output,
            resume=resume,
            progress=progress,
            announce=announce(console),
            report=report,
            **options,
        )
    if ranks.rank() == 0:
        typer.echo(str(result))
        upload(output, push_to_hub, private)


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
    check_push(push_to_hub, private)
    from mbq.exporting import export

    console = errors()
    with shown(console) as progress:
        result = export(
            model,
            output=output,
            format=format,
            resume=resume,
            progress=progress,
            announce=announce(console),
            **options,
        )
    if ranks.rank() == 0:
        typer.echo(str(result))
        upload(output, push_to_hub, private)


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
    console = errors()
    with shown(console) as progress:
        measured = measure_sensitivity(model, progress=progress, announce=announce(console), **options)
    if ranks.rank() > 0:
        return
    Console().print(sensitivity_table(measured))
    if output is not None:
        with new_folder(output) as folder:
            write_json(folder / "sensitivity.json", measured.to_json())
            save_sensitivity_picture(measured, folder / "sensitivity.png", Path(model).name)
        typer.echo(f"Wrote {output / 'sensitivity.json'} and {output / 'sensitivity.png'}.")
