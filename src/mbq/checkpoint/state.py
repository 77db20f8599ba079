"""An unfinished run, block by block on the disk, so that ``--resume`` goes on where it ended.

Beside the folder that is to be written, as ``NAME.unfinished``: ``run.json`` (the fingerprint of the run, the
sensitivity, every block's part of search.json and a SHA-256 of its file) and a safetensors file a block. A file is
complete or not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load, save

from mbq.checkpoint.folder import write_file
from mbq.errors import MBQError
from mbq.ranks import LostRank

PIECE = 2**20  # of the beginning and the end of a weights file: what a fingerprint looks at


class RunState:
    """What is done of one run. ``content`` is run.json's."""

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any]) -> None:
        self.folder = folder
        self.content: dict[str, Any] = {"fingerprint": dict(fingerprint), "sensitivity": None, "blocks": {}}

    @property
    def begun(self) -> bool:
        return (self.folder / "run.json").exists()

    @property
    def sensitivity(self) -> dict[str, Any] | None:
        return self.content["sensitivity"]

    def keep_sensitivity(self, measured: dict[str, Any]) -> None:
        self.content["sensitivity"] = measured
        self._write_content()

    def keep(self, block: int, tensors: Mapping[str, torch.Tensor], rows: list[dict[str, Any]]) -> None:
        """A block that is done: its tensors, and its part of search.json."""
        data = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
        write_file(self._file(block), data)
        self.content["blocks"][str(block)] = {"sha256": hashlib.sha256(data).hexdigest(), "rows": rows}
        self._write_content()

    def kept(self, block: int) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]] | None:
        """The same again, or None where the block is not done. Raises MBQError where its file is damaged."""
        entry, file = self.content["blocks"].get(str(block)), self._file(block)
        if entry is None or not file.exists():
            return None
        data = file.read_bytes()
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise MBQError(f"{file} is damaged; remove it, and its block is done again.")
        return load(data), entry["rows"]

    def _file(self, block: int) -> Path:
        return self.folder / f"block-{block:04d}.safetensors"

    def _write_content(self) -> None:
        write_file(self.folder / "run.json", (json.dumps(self.content) + "\n").encode())


@contextmanager
def run_state(output: Path, fingerprint: Mapping[str, Any], resume: bool) -> Iterator[RunState]:
    """The state of the run that writes ``output``: gone when the block ends well, else kept if it holds anything.

    Raises MBQError where another run has it, where there is one that nobody asked to resume, and where the one to be
    resumed was begun with another fingerprint or is damaged.
    """
    folder = _beside(output)
    state = RunState(folder, fingerprint)
    with _locked(folder, output):
        if state.begun:
            _take_up(state, output, resume)
        try:
            yield state
        except (KeyboardInterrupt, LostRank) as error:
            if state.begun:
                raise _kept(error, folder) from error
            raise
        except MBQError as error:
            if not state.content["blocks"]:  # what the options or the model brought about, at once
                shutil.rmtree(folder)
                raise
            raise _kept(error, folder) from error
        else:
            shutil.rmtree(folder)
        finally:
            if folder.exists() and not state.begun:
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def kept_by_rank_0(output: Path) -> Iterator[None]:
    """What ends another rank says too what there is to go on with, if its host sees rank 0's folder."""
    file = _beside(output) / "run.json"
    try:
        yield
    except (KeyboardInterrupt, MBQError) as error:
        if file.exists() and json.loads(file.read_text(encoding="utf-8"))["blocks"]:
            raise _kept(error, file.parent) from error
        raise


def _beside(output: Path) -> Path:
    folder = output.expanduser().absolute()
    return folder.with_name(f"{folder.name}.unfinished")


def _kept(error: KeyboardInterrupt | MBQError, folder: Path) -> KeyboardInterrupt | MBQError:
    """The same error, which says too that the run can go on."""
    said = str(error).rstrip(".") or "Interrupted"
    return type(error)(f"{said}; what is done is kept in {folder}: --resume goes on with it.")


def _take_up(state: RunState, output: Path, resume: bool) -> None:
    file = state.folder / "run.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        known, blocks, _ = found["fingerprint"], found["blocks"], found["sensitivity"]
    except (ValueError, KeyError, TypeError) as error:
        raise MBQError(f"{file} is damaged; remove {state.folder} and start anew.") from error
    if not resume:
        raise MBQError(
            f"An unfinished run of {output} is in {state.folder}, {len(blocks)} blocks done; continue it with "
            "--resume, or remove that folder."
        )
    wanted = json.loads(json.dumps(state.content["fingerprint"]))
    other = sorted(name for name in known.keys() | wanted.keys() if known.get(name) != wanted.get(name))
    if other:
        raise MBQError(
            f"The unfinished run in {state.folder} has another {', '.join(other)}; give the same again, or remove that "
            "folder and start anew."
        )
    state.content = found


@contextmanager
def _locked(folder: Path, output: Path) -> Iterator[None]:
    """Nobody else works in ``folder`` meanwhile; the system lets go of the lock of a run that was killed."""
    missing = [parent for parent in folder.parents if not parent.exists()]
    try:
        with _lock_file(folder) as file:
            if not _taken(file):
                raise MBQError(f"Another run is writing {output}; wait for it, or choose another output folder.")
            yield
    finally:
        for parent in missing:  # from the innermost; those that hold something by now stay
            with suppress(OSError):
                parent.rmdir()


def _lock_file(folder: Path) -> IO[str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return open(folder / "lock", "w", encoding="utf-8")
    except OSError as error:
        raise MBQError(f"{folder} cannot be written ({error.strerror}); choose another output folder.") from error


def _taken(file: IO[str]) -> bool:
    """Whether the lock is this run's now. Windows has no such locks: there, nobody is kept out."""
    if os.name == "nt":
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def files_hash(folder: Path) -> str:
    """SHA-256 of names and sizes of the weights files and config.json in ``folder``, and of their first and last MB."""
    found = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
        size = file.stat().st_size
        found.update(f"{file.name} {size}\n".encode())
        with open(file, "rb") as opened:
            found.update(opened.read(PIECE))
            opened.seek(max(0, size - PIECE))
            found.update(opened.read(PIECE))
    return found.hexdigest()
