"""Commands for the Hub: a folder's model card, and its upload."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mbq import ranks
from mbq.cli.options import (
    Private,
    Verbose,
)
from mbq.errors import MBQError


def card_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that mbq quantize or mbq export wrote.")],
    results: Annotated[Path, typer.Option(help="The run of this model (mbq evaluate --output).", metavar="RUN")],
    baseline: Annotated[Path | None, typer.Option(help="A run to compare with.", metavar="RUN")] = None,
    verbose: Verbose = 0,
) -> None:
    """Write what mbq evaluate found into the folder's model card."""
    from mbq.card_results import write_results

    typer.echo(f"Wrote {write_results(folder, results, baseline)}")


def push_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that mbq quantize or mbq export wrote.")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME[@BRANCH]", help="A repository on the hub.")],
    private: Private = False,
    verbose: Verbose = 0,
) -> None:
    """Upload a folder to the Hugging Face hub, its model's files and no others."""
    upload(folder, repository, private)


def check_push(push_to_hub: str | None, private: bool) -> None:
    """Whether the upload can succeed, before the search."""
    if push_to_hub is None and private:
        raise MBQError("--private is of the repository that --push-to-hub names; give both.")
    if push_to_hub is not None and ranks.rank() == 0:
        from mbq.publishing import check_push

        check_push(push_to_hub, private)


def upload(folder: Path, repository: str | None, private: bool) -> None:
    if repository is not None:
        from mbq.publishing import push

        typer.echo(str(push(folder, repository, private)))
