"""Processes started by torchrun that share the samples of one run: every one makes the same choices, rank 0 writes.

What they exchange are sums of kilobytes, so gloo carries them from the CPU's memory, between GPUs too: an exchange with
a process that has died is an error at once. A process alone exchanges nothing.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from mbq.errors import MBQError

if TYPE_CHECKING:
    import torch

Value = TypeVar("Value")

# Nothing but a host that vanishes is found by waiting; rank 0 may need long to write a large model.
TIMEOUT = timedelta(hours=1)

_meetings = itertools.count()
_met = False
_claimed: bool | None = None  # whether this process was the first to fail; None where it did not fail


class LostRank(MBQError):
    """Another process of the run is gone."""

    def __init__(self, sentence: str = "A process of this run died, or all were told to end; start it again.") -> None:
        super().__init__(sentence)


def count() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    return int(os.environ.get("RANK", 0)) if count() > 1 else 0


def neighbours() -> int:
    """The processes of the run on this host, which share its memory and disk."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if count() > 1 else 1


@contextmanager
def joined() -> Iterator[None]:
    """Inside, the processes of the run exchange tensors. A group that the caller has made must take those of the CPU.

    Raises MBQError where they do not meet.
    """
    if count() == 1:
        yield
        return
    import torch.distributed as dist

    if dist.is_initialized():
        yield
        return
    global _met, _claimed
    _claimed = None
    try:
        # torchrun keeps the store, which outlives the processes.
        store = dist.PrefixStore(f"mbq {next(_meetings)}", next(dist.rendezvous("env://"))[0])
        dist.init_process_group("gloo", store=store, rank=rank(), world_size=count(), timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        said = " ".join(str(error).split())
        raise MBQError(f"The {count()} processes of this run do not meet ({said}); start them by torchrun.") from error
    _met = True
    try:
        yield
    except BaseException:
        _claimed = _first_to_fail(store)  # before the others feel that this process leaves
        raise
    finally:
        _met = False
        dist.destroy_process_group()


def met() -> bool:
    """Whether others wait for what this process has."""
    return _met


def own_device(device: str) -> str:
    """``device`` for this process: "auto" and "cuda" are the GPU that has its number on the host."""
    import torch

    if count() == 1 or device not in ("auto", "cuda") or not torch.cuda.is_available():
        return device
    local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local >= gpus:
        raise MBQError(f"There are {gpus} GPUs for more processes on a host; start --nproc-per-node {gpus} of them.")
    torch.cuda.set_device(local)
    return f"cuda:{local}"


def part(batches: int) -> slice:
    """Which of the run's batches this process has. Raises MBQError where there are too few for all processes."""
    if 1 < count() > batches:
        raise MBQError(
            f"The calibration data make {batches} batches for {count()} processes; start at most {batches}, or give "
            "more --num-calibration-samples or a smaller --batch-size."
        )
    return slice(rank() * batches // count(), (rank() + 1) * batches // count())


def total(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of the processes' tensors, the same bits in each."""
    return _reduced(tensor, "SUM")


def largest(tensor: torch.Tensor) -> torch.Tensor:
    """The elementwise maximum of the processes' tensors."""
    return _reduced(tensor, "MAX")


def from_first(value: Value) -> Value:
    """What rank 0 has."""
    if count() == 1:
        return value
    import torch.distributed as dist

    shared = [value]
    _exchange(dist.broadcast_object_list, shared)
    return shared[0]


def agree(own: Mapping[str, Any]) -> None:
    """Raise MBQError, with the names of what differs, unless rank 0 has the same."""
    first = from_first(own)
    other = sorted(name for name in own if own[name] != first[name])
    if other:
        raise MBQError(
            f"Rank {rank()} has another {', '.join(other)} than rank 0; give every host the same files and the same "
            "command."
        )


def tells() -> bool:
    """Whether this process tells the user why the run ends: the first that failed, rank 0 where all fail alike."""
    return rank() == 0 if _claimed is None else _claimed


def _first_to_fail(store: Any) -> bool:
    try:
        return store.add("failed", 1) == 1
    except RuntimeError:  # the store is gone: better told twice than not at all
        return True


def _reduced(tensor: torch.Tensor, operation: str) -> torch.Tensor:
    if count() == 1:
        return tensor
    import torch.distributed as dist

    found = tensor.to("cpu", copy=True)
    _exchange(dist.all_reduce, found, getattr(dist.ReduceOp, operation))
    return found.to(tensor.device)


def _exchange(operation: Callable[..., Any], *args: Any) -> None:
    try:
        operation(*args)
    except RuntimeError as error:
        raise LostRank from error
