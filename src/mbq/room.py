"""What is free on this machine: on the device, in the CPU's memory and on a disk."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from mbq.errors import MBQError

CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Room:
    """Free bytes. ``device`` is the CPU's memory where that is the device; ``folder`` is where ``disk`` is."""

    device: int
    cpu: int
    disk: int
    folder: Path

    def free(self, place: str) -> int:
        return {"device": self.device, "cpu": self.cpu, "disk": self.disk}[place]


def room(device: torch.device, folder: Path) -> Room:
    cpu = cpu_free()
    return Room(device_free(device) if device.type == "cuda" else cpu, cpu, shutil.disk_usage(folder).free, folder)


def storing_folder(given: str | None, output: str | Path | None) -> Path:
    """Where activations are stored on disk: the folder that was given, or beside the output, where there is one."""
    if given is not None:
        if not Path(given).is_dir():
            raise MBQError(f"--offload-folder {given} is no folder; make it, or give another one.")
        return Path(given)
    if output is None:
        return Path(tempfile.gettempdir())
    return next(parent for parent in Path(output).expanduser().absolute().parents if parent.exists())


def device_free(device: torch.device) -> int:
    """With what torch holds but does not use, and not more than this process may take."""
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    free, total = torch.cuda.mem_get_info(device)
    used = torch.cuda.memory_allocated(device)
    free += torch.cuda.memory_reserved(device) - used
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # torch 2.6
    return free if fraction is None else min(free, int(fraction(device) * total) - used)


def cpu_free() -> int:
    """What the system can give, and not more than the control groups of a container allow."""
    return max(0, min([psutil.virtual_memory().available, *_allowed(_own_group(), CGROUPS)]))


def _own_group() -> Path:
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return CGROUPS
    paths = [line.removeprefix("0::/") for line in lines if line.startswith("0::/")]
    return CGROUPS / paths[0] if paths else CGROUPS


def _allowed(group: Path, top: Path) -> list[int]:
    """What a group and those around it leave free: the limit less what is in use, but for files that can be read again.

    A container sees its own group at the top.
    """
    found = []
    for each in [group, *group.parents]:
        if each != top and top not in each.parents:
            break
        try:
            limit = (each / "memory.max").read_text().strip()
            statistics = dict(line.split() for line in (each / "memory.stat").read_text().splitlines())
            if limit != "max":
                used = int((each / "memory.current").read_text())
                found.append(int(limit) - used + int(statistics.get("inactive_file", 0)))
        except (OSError, ValueError):
            continue
    return found
