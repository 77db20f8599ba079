"""The Triton kernels of ``elementwise.py``; imported when the first runs, because importing Triton takes a while."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def gate(x, up):  # type: ignore[no-untyped-def]
    """silu(x) * up, with the roundings of two operations, as torch makes them."""
    wide = x.to(tl.float32)
    return ((wide / (1.0 + tl.exp(-wide))).to(x.dtype).to(tl.float32) * up.to(tl.float32)).to(x.dtype)


@triton.jit
def _gated(x, y, inputs, x_stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row, k = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x += row * x_stride
    inside = k < inputs
    first = tl.load(x + k, mask=inside, other=0.0)
    tl.store(y + row * inputs + k, gate(first, tl.load(x + inputs + k, mask=inside, other=0.0)), mask=inside)


@triton.jit
def normed(x, weight, k, inputs, eps):  # type: ignore[no-untyped-def]
    """Inputs k, all of them, of the row at x, over their root mean square, times weight; 0 beyond the row."""
    inside = k < inputs
    value = tl.load(x + k, mask=inside, other=0.0)
    wide = value.to(tl.float32)
    rounded = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / inputs + eps)).to(value.dtype).to(tl.float32)
    return (rounded * tl.load(weight + k, mask=inside, other=0.0).to(tl.float32)).to(value.dtype)


@triton.jit
def _rms_norm(x, weight, y, inputs, x_stride, eps, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row, k = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    tl.store(y + row * inputs + k, normed(x + row * x_stride, weight, k, inputs, eps), mask=k < inputs)


# ---- launches ----


def gated(x: torch.Tensor, y: torch.Tensor) -> None:
    """x [rows, 2 inputs], y [rows, inputs]; the rows of both are contiguous."""
    rows, inputs = y.shape
    _gated[(rows, triton.cdiv(inputs, BLOCK))](x, y, inputs, x.stride(0), BLOCK=BLOCK, num_warps=4)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, y: torch.Tensor) -> None:
    """x, y [rows, inputs]; the rows of both are contiguous."""
    rows, inputs = y.shape
    block = triton.next_power_of_2(inputs)
    _rms_norm[(rows,)](x, weight, y, inputs, x.stride(0), eps, BLOCK=block, num_warps=min(16, max(1, block // 512)))
