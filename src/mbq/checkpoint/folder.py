"""An output folder that appears whole, or not at all; a file likewise."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mbq.errors import MBQError


@contextmanager
def new_folder(path: str | Path, needs: int = 0) -> Iterator[Path]:
    """A temporary sibling of ``path`` to write into; it becomes ``path`` when the block ends without an exception.

    needs  bytes that will be written, as far as is known; checked against the free space first

    Raises MBQError where ``path`` exists and is not an empty folder, where the disk is full, and where the place
    cannot be written. Whatever ends the block otherwise, KeyboardInterrupt too, removes all that was written.
    """
    path = Path(path).expanduser().absolute()
    check_new(path)
    temporary = None
    try:
        check_space(path, needs)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        _finish(temporary)
        check_new(path)
        os.replace(temporary, path)  # over an empty folder, too
        sync_entry(path.parent)
    except OSError as error:
        raise MBQError(_sentence(path, needs, error)) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def check_new(path: str | Path) -> None:
    """Raise MBQError unless a folder can appear at ``path``: before hours of work, not after.

    ``path`` must not exist, or be an empty folder, and what exists of the way there must be a folder that takes more.
    """
    path = Path(path).expanduser().absolute()
    if path.is_dir() and any(path.iterdir()):
        raise MBQError(f"The output folder {path} is not empty; choose another one or remove it.")
    if path.exists() and not path.is_dir():
        raise MBQError(f"The output {path} is a file; choose the path of a new folder.")
    above = next(parent for parent in path.parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        what = "takes no new files" if above.is_dir() else "is a file"
        raise MBQError(f"{path} cannot be written, because {above} {what}; choose another output folder.")


def check_space(path: str | Path, needs: int) -> None:
    """Raise MBQError unless ``needs`` bytes are free where ``path`` will be."""
    path = Path(path).expanduser().absolute()
    free = shutil.disk_usage(next(parent for parent in path.parents if parent.exists())).free
    if free < needs:
        raise MBQError(_full(path, needs, free))


def _sentence(path: Path, needs: int, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _full(path, needs, None)
    return f"{path} cannot be written ({error.strerror or error}); choose another output folder."


def _full(path: Path, needs: int, free: int | None) -> str:
    about = f": the model needs about {needs / 1e9:.2f} GB" if needs else ""
    left = f" and {free / 1e9:.2f} GB are free" if needs and free is not None else ""
    return f"The disk of {path} is full{about}{left}; free some space or choose another output folder."


def _finish(folder: Path) -> None:
    """Bring every file to the disk, so that a crash after the rename cannot leave a folder of empty files.

    Safetensors' files are readable by their owner alone; here they get the permissions that any new file has.
    """
    mode = 0o666 & ~_umask()
    for root, _, files in os.walk(folder):
        for name in files:
            with open(os.path.join(root, name), "rb+") as file:
                os.fsync(file.fileno())
            os.chmod(os.path.join(root, name), mode)
        sync_entry(Path(root))


def write_file(path: Path, data: bytes) -> None:
    """Write or replace a file, whole or not at all, also after a crash of the system. Raises MBQError."""
    temporary = path.with_suffix(".part")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_entry(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise MBQError(
            f"{path} cannot be written ({error.strerror}); free some space or choose another output folder."
        ) from error


def sync_entry(folder: Path) -> None:
    """Bring the names in ``folder`` to the disk."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
