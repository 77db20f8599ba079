"""The Triton kernels of attention; imported when the first of them runs, because importing Triton takes a while.

Positions are split over programs (flash decoding). A program has all rows of one key/value head, a row being one query
of one of its query heads, so that keys and values are read once. A second kernel adds up the splits, in their order.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

SPLITS = 64  # at most
WARPS = 4


@triton.jit
def _mask_of(mask, number, real, n, positions, m_query, m_position, QUERIES: tl.constexpr):  # type: ignore[no-untyped-def]
    """The mask of positions ``n``, for every row; one row that stands for all where they are one query's."""
    if QUERIES == 1:
        return tl.load(mask + n * m_position, mask=n < positions, other=0)[None, :]
    else:
        near = mask + number[:, None] * m_query + n[None, :] * m_position
        return tl.load(near, mask=(n < positions)[None, :] & real[:, None], other=0)


# A mask lies elsewhere, or otherwise, when a step is recorded: it shall not need another kernel then.
@triton.jit(do_not_specialize=["m_batch", "m_query"], do_not_specialize_on_alignment=["mask"])
def _split(  # type: ignore[no-untyped-def]
    query, key, value, mask, sums, peaks, totals, scale, kv_heads, positions, length,
    q_batch, q_head, q_query, k_batch, k_head, k_position, v_batch, v_head, v_position, m_batch, m_query, m_position,
    QUERIES: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """``length`` positions of one key/value head.

    sums    the weighted values of a row, relative to 2 ** its peak
    peaks   the largest score of a row, in powers of two; -inf where it sees none of these positions
    totals  the sum of a row's weights, relative to 2 ** its peak
    """
    if EARLY:
        gdc_launch_dependents()
    pair, split = tl.program_id(0), tl.program_id(1)
    batch, head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    row, d = tl.arange(0, ROWS), tl.arange(0, DIM)
    number, real = row % QUERIES, row < GROUPS * QUERIES
    mask += batch * m_batch
    n = split * length + tl.arange(0, BLOCK)
    ahead = _mask_of(mask, number, real, n, positions, m_query, m_position, QUERIES)
    at = query + batch * q_batch + (head * GROUPS + row // QUERIES) * q_head + number * q_query
    x = tl.load(at[:, None] + d[None, :], mask=real[:, None], other=0.0)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, DIM), tl.float32)
    for start in range(split * length, min((split + 1) * length, positions), BLOCK):
        n = start + tl.arange(0, BLOCK)
        there = n < positions
        k = tl.load(
            key + batch * k_batch + head * k_head + n[:, None] * k_position + d[None, :], mask=there[:, None], other=0.0
        )
        v = tl.load(
            value + batch * v_batch + head * v_head + n[:, None] * v_position + d[None, :], mask=there[:, None],
            other=0.0,
        )  # fmt: skip
        seen = (ahead != 0) & real[:, None]
        used = tl.max(ahead, 0) != 0
        ahead = _mask_of(mask, number, real, n + BLOCK, positions, m_query, m_position, QUERIES)
        # What the cache holds where no row looks may be anything, and zero times NaN is NaN.
        v = tl.where(used[:, None], v, 0.0)
        scores = tl.where(seen, tl.dot(x, tl.trans(k), input_precision=PRECISION) * scale, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        factor = tl.exp2(peak - base)
        total = total * factor + tl.sum(weights, 1)
        result = tl.dot(weights.to(v.dtype), v, result * factor[:, None], input_precision=PRECISION)
        peak = higher
    at = (pair.to(tl.int64) * tl.num_programs(1) + split) * (GROUPS * QUERIES) + row
    tl.store(peaks + at, peak, mask=real)
    tl.store(totals + at, total, mask=real)
    tl.store(sums + at[:, None] * DIM + d[None, :], result, mask=real[:, None])


@triton.jit
def _combine(  # type: ignore[no-untyped-def]
    sums, peaks, totals, out, kv_heads, splits,
    QUERIES: tl.constexpr, GROUPS: tl.constexpr, SPLITS: tl.constexpr, DIM: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One row: the splits' sums, brought to one peak, over their totals; zeros for a row that sees nothing."""
    pair, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    split, d = tl.arange(0, SPLITS), tl.arange(0, DIM)
    there = split < splits
    at = (pair * splits + split) * (GROUPS * QUERIES) + row
    if EARLY:
        gdc_wait()
    peak = tl.load(peaks + at, mask=there, other=float("-inf"))
    total = tl.load(totals + at, mask=there, other=0.0)
    parts = tl.load(sums + at[:, None] * DIM + d[None, :], mask=there[:, None], other=0.0)
    highest = tl.max(peak, 0)
    weights = tl.exp2(peak - tl.where(highest == float("-inf"), 0.0, highest))
    whole = tl.sum(total * weights, 0)
    result = tl.sum(parts * weights[:, None], 0) / tl.where(whole == 0.0, 1.0, whole)
    batch, head = pair // kv_heads, (pair % kv_heads) * GROUPS + row // QUERIES
    place = (batch * QUERIES + row % QUERIES) * (kv_heads * GROUPS) + head
    tl.store(out + place * DIM + d, result.to(out.dtype.element_ty))


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float, out: torch.Tensor
) -> None:
    """Of ``mbq.kernels.attention.attention``, into ``out`` [batch, queries, heads, dim]; last dimensions are dense."""
    (batch, heads, queries, dim), (kv_heads, positions) = query.shape, key.shape[1:3]
    groups, pairs = heads // kv_heads, batch * kv_heads
    rows, block = groups * queries, _block(dim, key.element_size())
    length = triton.cdiv(triton.cdiv(positions, SPLITS), block) * block
    splits = triton.cdiv(positions, length)
    sums = torch.empty(pairs, splits, rows, dim, dtype=torch.float32, device=query.device)
    peaks, totals = sums.new_empty(pairs, splits, rows), sums.new_empty(pairs, splits, rows)
    shape = {"QUERIES": queries, "GROUPS": groups, "DIM": dim, "EARLY": _early(query.device)}
    _split[(pairs, splits)](
        *(query, key, value, mask.view(torch.uint8), sums, peaks, totals),
        *(scale * math.log2(math.e), kv_heads, positions, length),
        *(*_strides(query)[:3], *_strides(key)[:3], *_strides(value)[:3]),
        *(_strides(mask)[0], *_strides(mask)[2:]),
        **shape, ROWS=max(16, triton.next_power_of_2(rows)), BLOCK=block, num_warps=WARPS,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
    )  # fmt: skip
    # The second kernel starts while the first runs, and waits for what it wrote.
    early = {"launch_pdl": True} if shape["EARLY"] else {}
    _combine[(pairs, rows)](
        *(sums, peaks, totals, out, kv_heads, splits),
        **shape, SPLITS=triton.next_power_of_2(splits), num_warps=WARPS, **early,
    )  # fmt: skip


def _block(dim: int, element_size: int) -> int:
    """Positions that a program has in hand at a time."""
    return 32 if dim * element_size <= 256 else 16


def _strides(x: torch.Tensor) -> list[int]:
    """Zero along dimensions of size one, where torch has any number; a mask of one row stands for the whole batch."""
    return [0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]


def _early(device: torch.device) -> bool:
    """Whether programmatic dependent launch is there: NVIDIA's compute capability 9.0 on."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
