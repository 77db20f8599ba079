"""The Triton kernels; imported when the first of them runs, because importing Triton takes a while."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from mbq.kernels.packed import PackedWeight


@triton.jit
def _codes(words, base, stride, index, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes ``index`` of the rows of words that begin at ``base`` and step by ``stride``; packing.py draws the bits."""
    bit = index * BITS
    word, shift = bit // 32, (bit % 32).to(tl.uint32)
    code = tl.load(words + base + word * stride).to(tl.uint32, bitcast=True) >> shift
    if 32 % BITS != 0:  # a code may end in the next word
        across = (bit % 32) + BITS > 32
        rest = tl.load(words + base + (word + 1) * stride, mask=across, other=0).to(tl.uint32, bitcast=True)
        code = code | (rest << ((32 - shift) & 31))
    return (code & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def _weights(  # type: ignore[no-untyped-def]
    words, scale, zero, n, k, real, outputs, inputs, width, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, SYMMETRIC: tl.constexpr,
):  # fmt: skip
    """The weights of outputs ``n`` and inputs ``k``, which broadcast to a block, in float32; ``real`` are there."""
    n, k = tl.where(real, n, 0), tl.where(real, k, 0)
    code = _codes(words, n.to(tl.int64) * width, 1, k, BITS)
    group = k // GROUP
    if SYMMETRIC:
        code -= 1 << (BITS - 1)
    else:
        code -= _codes(zero, group, groups, n, BITS)
    return code.to(tl.float32) * tl.load(scale + n * groups + group).to(tl.float32)


@triton.jit
def _products(  # type: ignore[no-untyped-def]
    x, words, scale, zero, bias, y, rows, outputs, inputs, width, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, SYMMETRIC: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, inputs, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        here = (m[:, None] < rows) & (k[None, :] < inputs)
        block = tl.load(x + m[:, None].to(tl.int64) * inputs + k[None, :], mask=here, other=0.0)
        real = (n[None, :] < outputs) & (k[:, None] < inputs)
        weight = _weights(
            words, scale, zero, n[None, :], k[:, None], real, outputs, inputs, width, groups, BITS, GROUP, SYMMETRIC
        )
        total = tl.dot(block, tl.where(real, weight, 0.0).to(block.dtype), total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    inside = (m[:, None] < rows) & (n[None, :] < outputs)
    tl.store(y + m[:, None].to(tl.int64) * outputs + n[None, :], total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _dequantized(  # type: ignore[no-untyped-def]
    words, scale, zero, y, outputs, inputs, width, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, SYMMETRIC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    real = (n < outputs) & (k < inputs)
    weight = _weights(words, scale, zero, n, k, real, outputs, inputs, width, groups, BITS, GROUP, SYMMETRIC)
    tl.store(y + n.to(tl.int64) * inputs + k, weight.to(y.dtype.element_ty), mask=real)


def _rows_a_block(rows: int) -> int:
    return 16 if rows <= 16 else 32 if rows <= 32 else 64


def _packed_arguments(weight: PackedWeight) -> tuple[dict[str, Any], int]:
    """The macros that say how the weight is packed, and the number of groups of a row."""
    weights, groups = weight.scheme.weights, weight.scale.shape[-1]
    group = weights.group_size or weight.shape[1]
    return {"BITS": weights.bits, "GROUP": group, "SYMMETRIC": weight.zero_point is None}, groups


def products(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, y: torch.Tensor) -> None:
    """x [rows, inputs] times a packed weight into y [rows, outputs]."""
    (rows, inputs), outputs = x.shape, weight.shape[0]
    macros, groups = _packed_arguments(weight)
    block_m, block_n = _rows_a_block(rows), 64
    zero = weight.words if weight.zero_point is None else weight.zero_point  # something to point at
    _products[(triton.cdiv(outputs, block_n), triton.cdiv(rows, block_m))](
        *(x, weight.words, weight.scale, zero, weight.scale if bias is None else bias, y),
        *(rows, outputs, inputs, weight.words.shape[1], groups),
        **macros, BIAS=bias is not None, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=64,
    )  # fmt: skip


def dequantized(weight: PackedWeight, y: torch.Tensor) -> None:
    """A packed weight into y [outputs, inputs]."""
    outputs, inputs = weight.shape
    macros, groups = _packed_arguments(weight)
    zero = weight.words if weight.zero_point is None else weight.zero_point
    _dequantized[(triton.cdiv(inputs, 128), triton.cdiv(outputs, 16))](
        *(weight.words, weight.scale, zero, y, outputs, inputs, weight.words.shape[1], groups),
        **macros, BLOCK_N=16, BLOCK_K=128,
    )  # fmt: skip
