"""Arguments and options that several commands have, as typer takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model's folder, or its id (id@revision) on the Hugging Face hub.")
]
FolderArgument = Annotated[
    str, typer.Argument(metavar="DIR", help="A quantized folder, or a float model's folder or id.")
]
NewFolder = Annotated[Path, typer.Option(help="The folder to write; it must not hold anything.", metavar="DIR")]
Data = Annotated[str | None, typer.Option(help="Calibration rows: JSON, JSONL, or a datasets folder.", metavar="PATH")]
Images = Annotated[str | None, typer.Option(help="The folder that the rows' image paths start from.", metavar="DIR")]
Samples = Annotated[int, typer.Option(help="How many rows to calibrate on.")]
Length = Annotated[int, typer.Option(help="Tokens of a sample; the rest is cut off.")]
Batch = Annotated[int, typer.Option(help="Samples that go through the model at once.")]
Seed = Annotated[int, typer.Option(help="Seed of the draw of samples.")]
Formatting = Annotated[str, typer.Option(help="plain, few-shot or interleaved.")]
Text = Annotated[str | None, typer.Option(help="Plain text for --formatting interleaved.", metavar="FILE")]
Scheme = Annotated[str, typer.Option(help="W2A16, W3A16, W4A16, W4A16_SYM, W8A8, W4A8, W3A8 or W4A4.")]
Method = Annotated[str, typer.Option(help="mbq, awq, fixed, smoothquant or rtn.")]
GroupSize = Annotated[int | None, typer.Option(help="Input channels that share a scale (weight-only schemes; 128).")]
Ignore = Annotated[
    list[str] | None, typer.Option(help="A linear to keep in 16 bits, by name or 're:PATTERN'; repeatable.")
]
Norm = Annotated[str, typer.Option(help="The search's loss: mae or mse.")]
Objective = Annotated[str, typer.Option(help="mbq's weights: released or paper.")]
Floor = Annotated[float | None, typer.Option(help="mbq's least vision/language ratio; the median over blocks.")]
VisionWeight = Annotated[float, typer.Option(help="A vision token's weight for --method fixed.")]
SmoothAlpha = Annotated[float, typer.Option(help="SmoothQuant's alpha.")]
GQAFold = Annotated[bool, typer.Option("--gqa-fold", help="Fold o_proj into v_proj under GQA too.")]
DistortedInput = Annotated[bool, typer.Option("--distorted-input", help="Search on the quantized blocks' outputs.")]
Parity = Annotated[bool, typer.Option("--parity", help="Reproduce the released search choice by choice.")]
SearchTokens = Annotated[
    int, typer.Option(help="Tokens on which all candidates are compared, the best again on more; 0: all on all.")
]
VisionTower = Annotated[str | None, typer.Option(help="Quantize the vision tower too: W8A8 or W4A8.")]
ShardSize = Annotated[str, typer.Option(help="Largest safetensors file.")]
WriteReport = Annotated[bool, typer.Option("--report/--no-report", help="Write report.html into the folder.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run of the same command.")]
PushToHub = Annotated[
    str | None, typer.Option(help="Then upload the folder to the Hugging Face hub.", metavar="OWNER/NAME[@BRANCH]")
]
Private = Annotated[bool, typer.Option("--private", help="Make the hub's repository, if it is new, a private one.")]
Device = Annotated[str, typer.Option(help="auto (the GPU if there is one), cpu, cuda, cuda:1.")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), bfloat16, float16 or float32.")]
Offload = Annotated[str, typer.Option(help="blocks keeps all blocks but one in CPU memory; none; auto.")]
Activations = Annotated[str, typer.Option(help="Where they are stored: device, cpu, disk; auto by what is free.")]
OffloadFolder = Annotated[str | None, typer.Option(help="Where on disk; beside the output.", metavar="DIR")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own Python files, once listed.")]
Verbose = Annotated[int, typer.Option("-v", "--verbose", count=True, help="Log steps; twice: tracebacks too.")]
