"""Any GPU that Triton compiles for (NVIDIA, AMD, Intel); on the CPU in its interpreter, for tests.

The portable kernel: with 16-bit activations it takes the checkpoint's own layout, reads a word for every code, and
leaves the rest to Triton and the caches. Quantized activations are the matter of ``int8.py``.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F

from mbq.kernels import int8
from mbq.kernels.packed import PackedWeight, is_packed
from mbq.scheme import Scheme

FUSED_ROWS = 64  # more rows of x go through a dense weight


def supports(scheme: Scheme, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError:
        return "Triton is not installed"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it needs a GPU (or TRITON_INTERPRET=1, which is slow)"
    if device.type == "cpu" and dtype == torch.bfloat16:
        return "Triton's interpreter truncates where a GPU rounds to bfloat16"
    if device.type not in ("cuda", "xpu", "cpu"):
        return f"it does not run on {device.type}"
    return None if scheme.activations is None else int8.supports(scheme, shape)


def prepare(weight: PackedWeight) -> PackedWeight:
    return weight if weight.scheme.activations is None else int8.prepare(weight)


def linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., inputs] to [..., outputs] in x's dtype.

    Weights are dequantized as the reference does it, products are summed in float32. With quantized activations the
    codes' products are summed in int32, exactly, and scaled afterwards.
    """
    if weight.scheme.activations is not None:
        return int8.linear(x, weight, bias)
    from mbq.kernels import triton_source as source

    outputs, inputs = weight.shape
    flat = x.reshape(-1, inputs)
    rows = flat.shape[0]
    y = x.new_empty(rows, outputs)
    shaped = y.view(*x.shape[:-1], outputs)
    if rows == 0:
        return shaped
    if rows > FUSED_ROWS:
        return F.linear(x, dense(weight, x.dtype), bias)
    source.products(flat.contiguous(), weight, bias, y)
    return shaped


def dense(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """The weight [outputs, inputs], rounded to ``dtype``."""
    from mbq.kernels import triton_source as source

    assert is_packed(weight.scheme)
    made = torch.empty(weight.shape, dtype=dtype, device=weight.words.device)
    source.dequantized(weight, made)
    return made
