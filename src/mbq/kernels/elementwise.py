"""What lies between the linears of a decoder block, one kernel each: the root-mean-square norm, and the gate of an MLP.

transformers writes them as six and two operations, and a decode step pays for launches.
"""

from __future__ import annotations

import torch

from mbq.kernels.operator import current_device

MOST_INPUTS = 2**15  # of a norm: a row stays in the registers of one program


def gated(x: torch.Tensor) -> torch.Tensor:
    """silu(first half) * second half of x [..., 2 inputs], as [..., inputs]; rounded after each, as torch does it."""
    from mbq.kernels import elementwise_source as source

    flat = _rows(x)
    y = x.new_empty(flat.shape[0], flat.shape[1] // 2)
    if y.numel():
        with current_device(x.device):
            source.gated(flat, y)
    return y.view(*x.shape[:-1], y.shape[1])


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean of x^2 + eps) in float32, rounded to x's dtype, times ``weight`` [inputs]; x is [..., inputs]."""
    from mbq.kernels import elementwise_source as source

    flat = _rows(x)
    y = torch.empty_like(flat, memory_format=torch.contiguous_format)
    if y.numel():
        with current_device(x.device):
            source.rms_norm(flat, weight, eps, y)
    return y.view(x.shape)


def _rows(x: torch.Tensor) -> torch.Tensor:
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()
