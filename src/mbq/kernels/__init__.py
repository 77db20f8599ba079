"""What multiplies by a packed weight. A kernel is a module with the four names of ``Kernel``; ``KERNELS`` lists them.

A layer asks every kernel in order and keeps the first that supports it: once, when the model is loaded.
"""

from __future__ import annotations

from typing import Protocol

import torch

from mbq.errors import MBQError
from mbq.kernels import cuda, humming, reference, triton
from mbq.kernels.packed import PackedWeight
from mbq.scheme import Scheme


class Kernel(Protocol):
    """``supports`` answers None for yes and the reason for no; ``prepare`` may rearrange the words at load."""

    def supports(
        self, scheme: Scheme, shape: tuple[int, int], device: torch.device, dtype: torch.dtype
    ) -> str | None: ...

    def prepare(self, weight: PackedWeight) -> PackedWeight: ...

    def linear(self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor: ...


# In the order of their speed in a decode step. At W4A8 humming is slower there than Triton.
KERNELS: dict[str, Kernel] = {"cuda": cuda, "triton": triton, "humming": humming, "reference": reference}


def choose(name: str, scheme: Scheme, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> str:
    """The name of the kernel for a weight of ``shape`` [out, in] with scales and activations of ``dtype``.

    "auto" is the first of ``KERNELS`` that supports it; on the CPU the reference, Triton's interpreter being slower.

    Raises MBQError for an unknown name, and with the kernel's own reason where a named one does not support the layer.
    """
    if name == "auto" and device.type == "cpu":
        return "reference"
    if name == "auto":
        return next(name for name, kernel in KERNELS.items() if kernel.supports(scheme, shape, device, dtype) is None)
    if name not in KERNELS:
        raise MBQError(f"Unknown kernel {name!r}; choose auto or one of {', '.join(KERNELS)}.")
    reason = KERNELS[name].supports(scheme, shape, device, dtype)
    if reason is not None:
        raise MBQError(f"The kernel {name!r} cannot run this model: {reason}; load it with kernel='auto'.")
    return name
