"""Plain torch, any device: unpack, dequantize, multiply. Other kernels are tested against it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mbq.kernels.packed import PackedWeight, unpack_weight
from mbq.qtensor import dequantize, quantize_activations
from mbq.scheme import Scheme


def supports(scheme: Scheme, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def prepare(weight: PackedWeight) -> PackedWeight:
    return weight


def linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., in] to [..., out], in x's dtype. The float weight lives only during the call.

    With quantized activations the codes are multiplied as float32 numbers and scaled afterwards: the products are
    integers, exact up to 2^24, so that only sums of very wide layers are rounded, in float32.
    """
    q = unpack_weight(weight)
    if weight.scheme.activations is None:
        return F.linear(x, dequantize(q).to(x.dtype), bias)
    codes, scale = quantize_activations(x, weight.scheme.activations)
    if q.zero_point is None and q.scale.shape[-1] == 1:
        y = F.linear(codes.to(torch.float32), q.codes.to(torch.float32)) * scale * q.scale.squeeze(-1).to(torch.float32)
    else:
        y = F.linear(codes.to(torch.float32), dequantize(q).to(torch.float32)) * scale
    return (y if bias is None else y + bias).to(x.dtype)
