"""One self-contained page about quantized models and what they answer (docs/report.md)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mbq.checkpoint.folder import write_file
from mbq.errors import MBQError

__all__ = ["report"]


def report(paths: Iterable[str | Path], output: str | Path) -> Path:
    """Write a page about runs and quantized folders to the file ``output``, and return its path.

    paths  runs (``mbq evaluate --output``), folders of runs, quantized folders

    Raises MBQError for a folder that is neither, or damaged, and where ``output`` is a file that no report is.
    """
    from mbq.report.page import page
    from mbq.report.subjects import read_subjects

    output = Path(output)
    check_output(output)
    return write(page(read_subjects(paths)), output)


def check_output(output: Path) -> None:
    """Raise MBQError unless ``output`` can become a report: an older one is replaced, nothing else is."""
    from mbq.report.page import GENERATOR

    if output.is_dir():
        raise MBQError(f"{output} is a folder; give the name of a file, such as {output / 'report.html'}.")
    if output.exists() and f'content="{GENERATOR}' not in output.read_text("utf-8", errors="replace")[:4000]:
        raise MBQError(f"{output} exists and is no report of mbq; choose another name with --output.")
    if not output.absolute().parent.is_dir():
        raise MBQError(f"{output.absolute().parent} is no folder; make it, or choose another --output.")


def write(html: str, output: Path) -> Path:
    """The file, whole or not at all. What is no Unicode in answers (half a surrogate pair) becomes a question mark."""
    write_file(output, html.encode("utf-8", "replace"))
    return output
