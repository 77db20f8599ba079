"""Commands about mbq itself and this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mbq.cli.command import errors
from mbq.cli.options import (
    Trust,
    Verbose,
)
from mbq.progress import shown


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


def doctor_command(verbose: Verbose = 0) -> None:
    """Show which kernels run on this machine, and why the others do not."""
    from mbq.doctor import doctor

    doctor(Console())


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

    with shown(errors()) as progress:
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
