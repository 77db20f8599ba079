"""Where activations wait between blocks: where they were made, in the CPU's memory, or in files on a disk.

``capture``, ``trace`` and ``token_gradients`` take a ``Keep``: what they store is what it returns, an ordinary tensor
each time. None stores a tensor where it was made.
"""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from mbq.errors import MBQError

Keep = Callable[[torch.Tensor], torch.Tensor]
PLACES = ("device", "cpu", "disk")  # from the fastest to the largest
WASTE = 1.15  # times a tensor's bytes: what it may take in the CPU's memory


def keeper(place: str | None, folder: Path) -> Keep | None:
    """What keeps tensors in one of ``PLACES``, on disk in ``folder``."""
    if place == "disk":
        return partial(on_disk, folder=folder)
    return in_memory if place == "cpu" else None


def kept(tensor: torch.Tensor, keep: Keep | None) -> torch.Tensor:
    return tensor if keep is None else keep(tensor)


def in_memory(tensor: torch.Tensor) -> torch.Tensor:
    """In pages that stay where they are, which a GPU reaches ten times faster; torch uses them again and again.

    torch takes the next power of two of such memory, so tensors of which that would waste much have ordinary pages.
    """
    size = tensor.nbytes
    if tensor.device.type != "cuda" or not size or (1 << (size - 1).bit_length()) > WASTE * size:
        return tensor.to("cpu")
    try:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
    except RuntimeError:  # the system gives no more such pages
        return tensor.to("cpu")


def give_back() -> None:
    """What ``in_memory`` has taken and nobody uses any more: torch would keep it for tensors of the same size."""
    empty = getattr(torch._C, "_host_emptyCache", None)  # torch.accelerator.empty_host_cache in newer versions
    if empty is not None and torch.cuda.is_available():
        empty()


def on_disk(tensor: torch.Tensor, folder: Path) -> torch.Tensor:
    """The same values in a file of ``folder`` that is mapped into memory: the system writes its pages out and reads
    them again as it needs room. The file has lost its name before this returns, so the system takes its space back
    with the tensor, or with the process however that ends.

    Raises MBQError where the disk is full, cannot be written, or holds more files than a process may map.
    """
    values = tensor.detach().to("cpu").contiguous()
    if not values.numel():
        return values
    try:
        with tempfile.NamedTemporaryFile(prefix=".mbq-", dir=folder, buffering=0) as file:
            written = file.write(values.flatten().view(torch.uint8).numpy().data)  # a full disk is an error here
            if written < values.nbytes:
                raise OSError(errno.ENOSPC, "No space left on device")
            mapped = torch.from_file(file.name, shared=True, size=values.numel(), dtype=values.dtype)
    except OSError as error:
        raise MBQError(
            f"Activations cannot be kept in {folder} ({error.strerror}); give an --offload-folder on another disk."
        ) from error
    except RuntimeError as error:  # mmap's
        raise MBQError(
            f"More files of activations in {folder} than a process may map; raise --batch-size, or lower "
            "--num-calibration-samples."
        ) from error
    return mapped.view(values.shape)
