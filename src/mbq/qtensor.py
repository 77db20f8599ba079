"""Round-to-nearest quantizers for weights and activations; pure tensor code.

The quantizers are those of MBQ (arXiv 2412.19509) as released, which are AWQ's for weights (asymmetric, a group) and
SmoothQuant's for weight-activation schemes (symmetric, a row and a token).

What is stored decides the numbers. A scale is computed in float32, rounded to the weight's dtype (the checkpoint's),
and the codes come from the *rounded* scale. So ``fake_quantize`` equals ``dequantize(quantize(...))`` bit for bit, and
both equal the weights of a checkpoint after saving and loading. With float32 weights nothing is rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mbq.errors import MBQError
from mbq.scheme import ActivationScheme, WeightScheme

LEAST_SCALE = 1e-5


@dataclass(frozen=True)
class QTensor:
    """A quantized weight [out, in].

    codes       [out, in]: uint8 in 0 .. 2^b - 1 where asymmetric, int8 in -2^(b-1) .. 2^(b-1) - 1 where symmetric
    scale       [out, in / group_size], or [out, 1] for one scale a row; in the weight's dtype
    zero_point  uint8, of the scale's shape, in 0 .. 2^b - 1; None where symmetric
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    scheme: WeightScheme


@torch.no_grad()
def quantize(weight: torch.Tensor, scheme: WeightScheme) -> QTensor:
    """Codes, scales and zero points of ``weight`` [out, in].

    Minimum and maximum are those of the group alone; zero is not added to the range. Because the zero point is clamped
    to 0 .. 2^b - 1, a group that is all positive gets zero point 0 and saturates at max - min (and an all-negative one
    at min - max): such a group loses its offset, as in the released code.

    Raises MBQError where the width is no multiple of the group size, and for NaN or infinite weights.
    """
    grouped, scale, zero = _parameters(weight, scheme)
    if not torch.isfinite(scale).all():
        raise MBQError(f"A {list(weight.shape)} weight holds NaN, infinite or overflowing values; mend the checkpoint.")
    codes = _signed_codes(grouped, scale, zero, scheme)
    dtype = torch.int8
    if zero is not None:
        codes, dtype = codes.add_(zero), torch.uint8
    return QTensor(
        codes=codes.to(dtype).view_as(weight),
        scale=scale.squeeze(-1).to(weight.dtype),
        zero_point=None if zero is None else zero.squeeze(-1).to(torch.uint8),
        scheme=scheme,
    )


@torch.no_grad()
def dequantize(q: QTensor) -> torch.Tensor:
    """The weight [out, in] = (codes - zero_point) * scale, in the scale's dtype, rounded once."""
    codes = q.codes.to(torch.float32).unflatten(-1, (q.scale.shape[-1], -1))
    if q.zero_point is not None:
        codes -= q.zero_point.unsqueeze(-1)
    return codes.mul_(q.scale.unsqueeze(-1)).flatten(-2).to(q.scale.dtype)


@torch.no_grad()
def fake_quantize(weight: torch.Tensor, scheme: WeightScheme) -> torch.Tensor:
    """``dequantize(quantize(weight, scheme))`` bit for bit, without the codes; the hot loop of a search.

    NaN and infinite weights are not looked for (that would wait for the device); they come out as NaN.
    """
    grouped, scale, zero = _parameters(weight, scheme)
    return _signed_codes(grouped, scale, zero, scheme).mul_(scale).view_as(weight).to(weight.dtype)


@torch.no_grad()
def quantize_activations(x: torch.Tensor, scheme: ActivationScheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Dynamic symmetric codes of ``x`` [..., channels]: int8 codes of the same shape and a float32 scale [..., 1].

    The scale is absmax / (2^(b-1) - 1) of each token, at least 1e-5. It is never stored, so it stays in float32.
    """
    codes, scale = _activation_codes(x, scheme)
    return codes.to(torch.int8), scale


@torch.no_grad()
def fake_quantize_activations(x: torch.Tensor, scheme: ActivationScheme) -> torch.Tensor:
    """``x`` [..., channels] rounded to the values that ``quantize_activations`` stands for, in x's dtype."""
    codes, scale = _activation_codes(x, scheme)
    return codes.mul_(scale).to(x.dtype)


def _parameters(weight: torch.Tensor, scheme: WeightScheme) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """float32 weight [out, groups, size]; its scale, rounded as stored, and zero point, both [out, groups, 1]."""
    width = weight.shape[-1]
    size = scheme.group_size or width
    if width % size:
        raise MBQError(
            f"An input width of {width} is no multiple of the group size {size}; "
            "choose a --group-size that divides it, or leave the linear out with --ignore."
        )
    grouped = weight.to(torch.float32).unflatten(-1, (width // size, size))
    low, high = torch.aminmax(grouped, dim=-1, keepdim=True)
    if scheme.symmetric:
        absmax = torch.maximum(-low, high)
        return grouped, _stored(_divided(absmax, 2 ** (scheme.bits - 1) - 1), weight.dtype), None
    levels = 2**scheme.bits - 1
    scale = _stored(_divided(high - low, levels), weight.dtype)
    return grouped, scale, (-low / scale).round_().clamp_(0, levels)


def _divided(values: torch.Tensor, divisor: int) -> torch.Tensor:
    """By a tensor: a number torch would turn into its reciprocal on a GPU, where codes would differ from the CPU's."""
    return values / torch.full((), divisor, dtype=values.dtype, device=values.device)


def _stored(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return scale.clamp_(min=LEAST_SCALE).to(dtype).to(torch.float32)


def _signed_codes(
    grouped: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, scheme: WeightScheme
) -> torch.Tensor:
    """codes - zero_point in float32. Clamping between shifted bounds equals add, clamp, subtract: all are integers."""
    codes = (grouped / scale).round_()
    if zero is None:
        return codes.clamp_(-(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1)
    return codes.clamp_(-zero, (2**scheme.bits - 1) - zero)


def _activation_codes(x: torch.Tensor, scheme: ActivationScheme) -> tuple[torch.Tensor, torch.Tensor]:
    most = 2 ** (scheme.bits - 1) - 1
    x = x.to(torch.float32)
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    scale = _divided(torch.maximum(-low, high), most).clamp_(min=LEAST_SCALE)
    return (x / scale).round_().clamp_(-most - 1, most), scale
