"""The Triton kernel of ``candidates.py``; imported when it first runs, because importing Triton takes a while."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mbq.scheme import WeightScheme

ELEMENTS = 4096  # of a program, unless a single group has more
ROUNDING: tl.constexpr = tl.constexpr(1.5 * 2**23)  # added and taken away again, it leaves a float32 an integer


@triton.jit
def _nearest(value):  # type: ignore[no-untyped-def]
    """Ties to even. Values of 2^22 and more, which have no place for halves, are beyond every bound here."""
    return (value + ROUNDING) - ROUNDING


@triton.jit
def _within(value, low, high):  # type: ignore[no-untyped-def]
    bounded = tl.maximum(value, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(bounded, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _stored(scale, LEAST: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.maximum(scale, LEAST, propagate_nan=tl.PropagateNan.ALL).to(DTYPE).to(tl.float32)


@triton.jit
def _candidates(  # type: ignore[no-untyped-def]
    weight, vectors, made, groups, inputs, size,
    LEVELS: tl.constexpr, SYMMETRIC: tl.constexpr, LEAST: tl.constexpr, DIVIDED: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """GROUPS groups of ``weight`` under the candidate of the program's second number.

    The operations and roundings are those of ``qtensor.py``, one for one.
    """
    candidate = tl.program_id(1).to(tl.int64)
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    k = tl.arange(0, BLOCK)
    inside = (group < groups)[:, None] & (k < size)[None, :]
    at = group.to(tl.int64)[:, None] * size + k[None, :]
    channel = (group % (inputs // size))[:, None] * size + k[None, :]
    e = tl.load(vectors + candidate * inputs + channel, mask=inside, other=1.0)
    stored = tl.load(weight + at, mask=inside, other=0.0)
    x = (stored.to(tl.float32) * e).to(stored.dtype).to(tl.float32)
    own = (k < size)[None, :]
    low = tl.min(tl.where(own, x, float("inf")), 1, keep_dims=True)
    high = tl.max(tl.where(own, x, float("-inf")), 1, keep_dims=True)
    if SYMMETRIC:
        scale = _stored(tl.div_rn(tl.maximum(-low, high), LEVELS // 2 * 1.0), LEAST, stored.dtype)
        zero = tl.full(scale.shape, LEVELS // 2 + 1, tl.float32)
    else:
        scale = _stored(tl.div_rn(high - low, LEVELS * 1.0), LEAST, stored.dtype)
        zero = _within(_nearest(tl.div_rn(-low, scale)), 0.0, LEVELS * 1.0)
    y = (_within(_nearest(tl.div_rn(x, scale)), -zero, LEVELS - zero) * scale).to(stored.dtype)
    if DIVIDED:
        y = tl.div_rn(y.to(tl.float32), e).to(stored.dtype)
    tl.store(made + candidate * groups * size + at, y, mask=inside)


def launch(
    weight: torch.Tensor, vectors: torch.Tensor, made: torch.Tensor, scheme: WeightScheme, least: float, divided: bool
) -> None:
    """weight [out, in], vectors [candidate, in] in float32, made [candidate, out, in]; all contiguous."""
    outputs, inputs = weight.shape
    size = scheme.group_size or inputs
    block, groups = triton.next_power_of_2(size), outputs * inputs // size
    several = max(1, ELEMENTS // block)
    _candidates[(triton.cdiv(groups, several), len(vectors))](
        weight,
        vectors,
        made,
        groups,
        inputs,
        size,
        LEVELS=2**scheme.bits - 1,
        SYMMETRIC=scheme.symmetric,
        LEAST=least,
        DIVIDED=divided,
        GROUPS=several,
        BLOCK=block,
        num_warps=min(16, max(4, block // 512)),
    )
