"""measurements.json of a quantized folder: what the run that made it took."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from mbq import ranks


def measurements(
    seconds: Mapping[str, float], before: int, after: int, device: torch.device, resumed: bool
) -> dict[str, Any]:
    """Seconds a step up to the writing of the folder, bytes of the tensors, the most memory held, and on what.

    device   that computed
    resumed  whether blocks had been done by an earlier run, whose seconds are not among these
    """
    gpu = device.type == "cuda"
    return {
        "format": 1,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if gpu else str(device),
        "processes": ranks.count(),
        "resumed": resumed,
        "seconds": {step: round(taken, 4) for step, taken in seconds.items()},
        "bytes": {"before": before, "after": after},
        "peak_memory": {
            "process": peak_resident(),
            "device": torch.cuda.max_memory_allocated(device) if gpu else None,
        },
    }


def peak_resident() -> int | None:
    """The most resident memory, in bytes, that this process ever had; None where the system does not say."""
    if sys.platform == "win32":
        return None
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts what the process was forked from, too
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
