"""What all commands have in common: a failure that was expected ends in one sentence, and a status."""

from __future__ import annotations

import errno
import functools
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any

import typer
from rich.console import Console

from mbq import ranks
from mbq.errors import MBQError, MBQWarning

app = typer.Typer(
    help="Modality-balanced quantization of vision-language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

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


def register(*functions: Callable[..., None]) -> None:
    """Make commands of functions called "name_command", in this order in the help."""
    for function in functions:
        app.command(name=function.__name__.removesuffix("_command"))(_command(function))


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """``function``, whose expected failures end in one sentence on stderr and a status."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        if function.__name__ not in SHARED:
            if ranks.rank() > 0:
                return
            os.environ.pop("WORLD_SIZE", None)  # rank 0 works as if alone
        verbose = kwargs.get("verbose", 0)
        set_up_logging(verbose)
        try:
            function(*args, **kwargs)
        except KeyboardInterrupt as interrupt:
            fail(str(interrupt) or "Interrupted; nothing was written.", 130)
        except Exception as error:
            sentence = _sentence(error)
            if sentence is None or verbose > 1:
                raise
            fail(sentence, 2)

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


def fail(sentence: str, status: int) -> None:
    if ranks.tells():
        typer.echo(f"mbq: {sentence}", err=True)
    if ranks.count() > 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends those that are left, this one has ended
    raise typer.Exit(status)


def set_up_logging(verbose: int) -> None:
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


def announce(console: Console) -> Callable[[object], None]:
    """Prints a plan before the run that it is of."""
    return lambda plan: console.print(str(plan), markup=False, highlight=False, soft_wrap=True)


def errors() -> Console:
    """Progress goes to stderr, so that stdout holds results only."""
    return Console(stderr=True)
