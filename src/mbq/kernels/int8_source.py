"""The Triton kernels of ``int8.py``; imported when the first of them runs, because importing Triton takes a while."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from mbq.kernels.elementwise_source import gate, normed
from mbq.kernels.int8 import CHUNK, Tiles

ZEROS = 16384  # words that a program of the quantization kernel clears
LEAST_SCALE = 1e-5


# ---- a token's codes and scale, in one pass ----


@triton.jit
def _nearest(value, scale, reciprocal):  # type: ignore[no-untyped-def]
    """The code nearest to value / scale, ties to even, of the *rounded* quotient, as torch computes it.

    The product with the reciprocal may miss the quotient by a unit in the last place or two. A correction takes the
    remainder, which fma computes exactly; after two the quotient is the rounded one, in five instructions where a
    division takes many. Adding 1.5 · 2^23 leaves the integer in the low bits, two's complement.
    """
    quotient = value * reciprocal
    quotient = tl.fma(tl.fma(-quotient, scale, value), reciprocal, quotient)
    quotient = tl.fma(tl.fma(-quotient, scale, value), reciprocal, quotient)
    return (quotient + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _loaded(x, k, inputs, GATED: tl.constexpr):  # type: ignore[no-untyped-def]
    value = tl.load(x + k, mask=k < inputs, other=0.0)
    if GATED:
        value = gate(value, tl.load(x + inputs + k, mask=k < inputs, other=0.0))
    return value.to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def _quantized_rows(  # type: ignore[no-untyped-def]
    x, codes, scales, cleared, rows, inputs, x_stride, codes_stride,
    MOST: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, ZEROS: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """Program i < rows: row i of x as int8 codes and its scale, absmax / MOST. The others clear ``cleared``.

    GATED: a row is silu(its first inputs) * the others. It is held in registers as two powers of two, BLOCK and REST,
    so that it is read once and few lanes idle.
    """
    program = tl.program_id(0)
    if program < rows:
        x += program.to(tl.int64) * x_stride
        codes += program.to(tl.int64) * codes_stride
        k = tl.arange(0, BLOCK)
        value = _loaded(x, k, inputs, GATED)
        most = tl.max(tl.abs(value), 0)
        if REST:
            l = BLOCK + tl.arange(0, REST)  # noqa: E741
            tail = _loaded(x, l, inputs, GATED)
            most = tl.maximum(most, tl.max(tl.abs(tail), 0))
        scale = tl.maximum(tl.div_rn(most, MOST * 1.0), LEAST)
        tl.store(scales + program, scale)
        reciprocal = tl.div_rn(1.0, scale)
        tl.store(codes + k, _nearest(value, scale, reciprocal), mask=k < inputs)
        if REST:
            tl.store(codes + l, _nearest(tail, scale, reciprocal), mask=l < inputs)
    else:
        at = (program - rows) * ZEROS + tl.arange(0, ZEROS)
        tl.store(cleared + at, tl.zeros((ZEROS,), tl.int32))


@triton.jit
def _normed_rows(  # type: ignore[no-untyped-def]
    x, weight, y, codes, scales, inputs, x_stride, codes_stride, eps,
    MOST: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row i of x normed, as 16 bits (y) and as ``_quantized_rows`` makes codes and a scale of these."""
    row, k = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    value = normed(x + row * x_stride, weight, k, inputs, eps)
    tl.store(y + row * inputs + k, value, mask=k < inputs)
    wide = value.to(tl.float32)
    scale = tl.maximum(tl.div_rn(tl.max(tl.abs(wide), 0), MOST * 1.0), LEAST)
    tl.store(scales + row, scale)
    tl.store(codes + row * codes_stride + k, _nearest(wide, scale, tl.div_rn(1.0, scale)), mask=k < inputs)


# ---- the products ----


@triton.jit
def _low(packed, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """16 times the signed code in the low half of each byte."""
    if PTX:  # four at a time, which the compiler does not find by itself
        return tl.inline_asm_elementwise(
            "{.reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0;}",
            "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return packed << 4


@triton.jit
def _high(packed, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """16 times the signed code in the high half of each byte."""
    if PTX:
        return tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0xF0F0F0F0;", "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4
        )
    else:
        return packed & -16


@triton.jit
def _store(total, m, n, x_scale, w_scale, bias, y, rows, outputs, UNIT: tl.constexpr, BIAS: tl.constexpr):  # type: ignore[no-untyped-def]
    """int32 sums [m, n], in units of UNIT, to y."""
    result = total.to(tl.float32) * UNIT * tl.load(x_scale + m, mask=m < rows, other=0.0)[:, None]
    scale = tl.load(w_scale + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    if BIAS:  # rounded once, as prompt_int8.cu does it
        result = tl.fma(result, scale, tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :])
    else:
        result *= scale
    inside = (m[:, None] < rows) & (n[None, :] < outputs)
    tl.store(y + m[:, None].to(tl.int64) * outputs + n[None, :], result.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "inputs", "whole"])
def _products(  # type: ignore[no-untyped-def]
    x, w, x_scale, w_scale, bias, y, partial, rows, outputs, inputs, whole,
    NIBBLES: tl.constexpr, CHUNK: tl.constexpr, PTX: tl.constexpr, BIAS: tl.constexpr,
    SPLIT: tl.constexpr, WEIGHT_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y = x wᵀ, scaled; x and w are descriptors of codes [rows, inputs] and [outputs, inputs], or bytes of two codes.

    As many programs as fit on the GPU walk over the tiles of y. The first ``whole`` tiles are computed by one program
    each, from end to end. The steps along K of the others are dealt out evenly: programs add their sums, which are
    integers and so exact in any order, to ``partial``, and the one that adds the last of a tile's steps stores it.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    tiles_m, tiles_n, steps = tl.cdiv(rows, BLOCK_M), tl.cdiv(outputs, BLOCK_N), tl.cdiv(inputs, BLOCK_K)
    mine = tl.cdiv(whole - program, programs)  # whole tiles of this program
    items, first, last = mine, 0, 0
    if SPLIT:
        shared = (tiles_m * tiles_n - whole).to(tl.int64) * steps
        first = (program * shared // programs).to(tl.int32)
        last = ((program + 1) * shared // programs).to(tl.int32)
        items = mine + tl.where(last > first, (last - 1) // steps - first // steps + 1, 0)
    for item in range(0, items):
        tile, begin, end = program + item * programs, 0, steps
        if SPLIT:
            part = first // steps + item - mine
            tile = tl.where(item < mine, tile, whole + part)
            begin = tl.where(item < mine, 0, tl.maximum(first - part * steps, 0))
            end = tl.where(item < mine, steps, tl.minimum(last - part * steps, steps))
        # Programs that run together take GROUP tiles of x by a run of tiles of w, so that both stay in the L2.
        band = tile // (GROUP * tiles_n) * GROUP
        height = tl.minimum(tiles_m - band, GROUP)
        place = tile % (GROUP * tiles_n)
        m0, n0 = (band + place % height) * BLOCK_M, place // height * BLOCK_N
        total = tl.zeros((BLOCK_N, BLOCK_M) if WEIGHT_FIRST else (BLOCK_M, BLOCK_N), tl.int32)
        for step in range(begin, end):
            k = step * BLOCK_K
            codes = x.load([m0, k])
            if NIBBLES:
                packed = w.load([n0, k // 2]).reshape(BLOCK_N, BLOCK_K // CHUNK, CHUNK // 2)
                weight = tl.join(_low(packed, PTX), _high(packed, PTX)).permute(0, 1, 3, 2).reshape(BLOCK_N, BLOCK_K)
            else:
                weight = w.load([n0, k])
            if WEIGHT_FIRST:
                total = tl.dot(weight, codes.T, total, out_dtype=tl.int32)
            else:
                total = tl.dot(codes, weight.T, total, out_dtype=tl.int32)
        if WEIGHT_FIRST:
            total = total.T
        m, n = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
        UNIT: tl.constexpr = 0.0625 if NIBBLES else 1.0
        if SPLIT:
            if end - begin == steps:
                _store(total, m, n, x_scale, w_scale, bias, y, rows, outputs, UNIT, BIAS)
            else:
                area: tl.constexpr = BLOCK_M * BLOCK_N
                at = partial + (tile - whole).to(tl.int64) * area
                done = partial + (tiles_m * tiles_n - whole).to(tl.int64) * area + tile - whole
                column = tl.arange(0, BLOCK_N)[None, :]
                tl.atomic_add(at + tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + column, total, sem="relaxed")
                tl.debug_barrier()  # every thread's sums come before the count
                before = tl.atomic_add(done, end - begin, sem="acq_rel")
                if before + end - begin == steps:
                    for row in range(0, BLOCK_M, 16):
                        r = row + tl.arange(0, 16)
                        sums = tl.load(at + r[:, None] * BLOCK_N + column, cache_modifier=".cg")
                        _store(sums, m0 + r, n, x_scale, w_scale, bias, y, rows, outputs, UNIT, BIAS)
        else:
            _store(total, m, n, x_scale, w_scale, bias, y, rows, outputs, UNIT, BIAS)


# ---- launches ----


def quantize(
    x: torch.Tensor, bits: int, cleared: torch.Tensor | None = None, gated: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes [rows, inputs] of x, whose rows are contiguous, and float32 scales [rows].

    If ``gated``, of silu(first half) * second half of x [rows, 2 inputs].

    ``cleared``, int32, becomes zeros; it has a multiple of ZEROS words.
    """
    rows, inputs = x.shape[0], x.shape[1] // 2 if gated else x.shape[1]
    codes, scales = _empty(rows, inputs, x.device)
    clearing = 0 if cleared is None else cleared.numel() // ZEROS
    block = max(16, 1 << (inputs.bit_length() - 1))
    rest = triton.next_power_of_2(inputs - block) if inputs > block else 0
    _quantized_rows[(rows + clearing,)](
        *(x, codes, scales, scales if cleared is None else cleared),
        *(rows, inputs, x.stride(0), codes.stride(0)),
        MOST=2 ** (bits - 1) - 1, LEAST=LEAST_SCALE, BLOCK=block, REST=rest, ZEROS=ZEROS, GATED=gated,
        num_warps=4 if block <= 4096 else 8 if block <= 8192 else 16,
    )  # fmt: skip
    return codes, scales


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [rows, inputs] normed, and codes and scales of that, as ``quantize`` makes them; the rows are contiguous."""
    rows, inputs = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    codes, scales = _empty(rows, inputs, x.device)
    block = triton.next_power_of_2(inputs)
    _normed_rows[(rows,)](
        *(x, weight, y, codes, scales, inputs, x.stride(0), codes.stride(0), eps),
        MOST=2 ** (bits - 1) - 1, LEAST=LEAST_SCALE, BLOCK=block, num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
    return y, codes, scales


def _empty(rows: int, inputs: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, whose rows begin at multiples of 16 bytes, as descriptors want them, and scales."""
    codes = torch.empty(rows, -(-inputs // 16) * 16, dtype=torch.int8, device=device)[:, :inputs]
    return codes, torch.empty(rows, dtype=torch.float32, device=device)


def products(
    codes: torch.Tensor,
    scales: torch.Tensor,
    words: torch.Tensor,
    nibbles: bool,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    tiles: Tiles,
    programs: int,
    whole: int,
    partial: torch.Tensor | None,
) -> None:
    """Codes [rows, inputs] times ``words`` as ``int8.prepare`` leaves them, scaled, into y [rows, outputs].

    nibbles  two codes in a byte of ``words``
    partial  zeros, int32: the sums of the tiles from ``whole`` on, and the steps done of each; None if all are whole
    """
    (rows, inputs), outputs = codes.shape, y.shape[1]
    x_block = [tiles.rows, tiles.depth]
    w_block = [tiles.outputs, tiles.depth // 2 if nibbles else tiles.depth]
    columns = words.shape[1] if nibbles else inputs
    _products[(programs,)](
        TensorDescriptor(codes, [rows, inputs], [codes.stride(0), 1], x_block),
        TensorDescriptor(words, [outputs, columns], [words.stride(0), 1], w_block),
        *(scales, w_scale, w_scale if bias is None else bias, y, scales if partial is None else partial),
        *(rows, outputs, inputs, whole),
        NIBBLES=nibbles, CHUNK=CHUNK, PTX=y.is_cuda and torch.version.hip is None, BIAS=bias is not None,
        SPLIT=partial is not None, WEIGHT_FIRST=tiles.weight_first,
        BLOCK_M=tiles.rows, BLOCK_N=tiles.outputs, BLOCK_K=tiles.depth, GROUP=tiles.group,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
