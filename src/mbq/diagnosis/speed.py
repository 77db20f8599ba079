"""How long a decode step takes, and whether reading the weights is what takes the time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from mbq.architecture import Binding
from mbq.cost import weight_bytes
from mbq.evaluation.packed import on_device
from mbq.evaluation.questions import encode, prompt_of
from mbq.generation import cuda_graph
from mbq.kernels import KERNELS
from mbq.qlinear import QuantLinear
from mbq.room import room
from mbq.rows import Row

STEPS = 32  # tokens that are written
WARM_UP = 4  # of them, which set up caches, compile kernels and record the step
COPIED_BYTES = {"cuda": 2**30, "cpu": 2**28}  # far beyond any cache; less where a quarter of the room is less
COPIES = 5


@dataclass(frozen=True)
class Decode:
    """Decode steps of one sequence. ``seconds`` is their median, ``low`` and ``high`` its 95 % interval.

    bytes  of the weights that a step reads: the decoder blocks and the head
    """

    seconds: float
    low: float
    high: float
    bytes: int

    @property
    def bandwidth(self) -> float:
        """Bytes of weights a second."""
        return self.bytes / self.seconds


@dataclass(frozen=True)
class Speed:
    """What a token costs on this machine.

    device     its name
    kernels    that multiply by the packed weights, and how many layers each has
    refused    why the kernels that come before them do not run here, by name
    quantized, reference  the decode steps; None where the float model is not on the device as a whole
    bandwidth  bytes a second that a plain copy on the device reads and writes
    """

    device: str
    kernels: dict[str, int]
    refused: dict[str, str]
    quantized: Decode
    reference: Decode | None
    bandwidth: float

    @property
    def reading(self) -> float:
        """The part of a step that reading the packed weights takes at the copy's speed, from 0 to 1."""
        return min(1.0, self.quantized.bandwidth / self.bandwidth)


def decode_steps(binding: Binding, processor: Any, row: Row) -> Decode:
    """Let the model go on writing after ``row``'s question, as ``mbq generate`` does, and time its steps."""
    model: Any = binding.model
    inputs = on_device(encode([prompt_of(row, processor)], [row], processor), model)
    static = model.device.type == "cuda" and getattr(model, "_can_compile_fullgraph", False)
    options: dict[str, Any] = {"cache_implementation": "static"} if static else {}
    clock = _Clock()
    with cuda_graph(model) if static else nullcontext():
        model.generate(
            **inputs,
            **options,
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            min_new_tokens=STEPS,
            max_new_tokens=STEPS,
            streamer=clock,
        )
    head = model.get_output_embeddings()
    read = weight_bytes(binding.blocks) + (0 if head is None else weight_bytes(head))
    return Decode(*_median(np.diff(clock.times[WARM_UP:])), read)


def kernels_of(model: Any) -> tuple[dict[str, int], dict[str, str]]:
    """The kernels in use with their numbers of layers, and why those before them in ``KERNELS`` are not."""
    layers = [layer for layer in model.modules() if isinstance(layer, QuantLinear)]
    counts = Counter(layer.kernel for layer in layers)
    refused = {}
    for name, kernel in KERNELS.items():
        if name in counts:
            break
        why = (
            kernel.supports(x.scheme, (x.out_features, x.in_features), x.weight_scale.device, x.weight_scale.dtype)
            for x in layers
        )
        reason = next((each for each in why if each is not None), None)
        if reason is not None:
            refused[name] = reason
    return dict(counts), refused


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second of a plain copy on the device, both those that are read and those that are written; the best."""
    size = min(COPIED_BYTES[device.type], room(device, Path()).device // 4)
    source = torch.ones(max(1, size // 4), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    found = 0.0
    for _ in range(COPIES):
        started = _now(device)
        target.copy_(source)
        found = max(found, 2 * source.nbytes / (_now(device) - started))
    return found


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _median(seconds: np.ndarray) -> tuple[float, float, float]:
    """The median and its 95 % interval between order statistics: how many lie below it is binomial."""
    ordered: Sequence[float] = np.sort(seconds).tolist()
    rank = int(stats.binom.ppf(0.025, len(ordered), 0.5))
    return float(np.median(ordered)), ordered[max(0, rank - 1)], ordered[min(len(ordered) - 1, len(ordered) - rank)]


class _Clock:
    """A streamer of transformers' ``generate``: notes when each token has reached the CPU."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass
