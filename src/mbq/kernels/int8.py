"""Quantized activations in Triton: int8 codes a token, times int8 codes, or codes of up to 4 bits, an output row.

Sums are int32 and exact; they are scaled once. Two kernels run: one reads x and writes codes and scales, the other
multiplies. On Hopper the products are wgmma instructions, and weights of up to 4 bits are unpacked in registers; more
than a few rows of 16 bits are multiplied there in CUDA, of the same words, to the same bits (``prompt_int8.py``).

A prepared weight of up to 4 bits holds two codes in a byte, runs of 128 inputs in 64 bytes: byte j has input j in its
low half and input 64 + j in its high half, two's complement. One and-instruction makes four int8 codes of four high
halves, a shift and an and those of the low ones, each code times 16, which the scale takes back.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

from mbq.kernels import prompt_int8
from mbq.kernels.packed import PackedWeight, unpack_weight
from mbq.scheme import Scheme

CHUNK = 128  # inputs that lie together in a prepared weight of up to 4 bits
MOST_INPUTS = 2**17 - 1  # 128 · 128 · inputs stays below 2^31


@dataclass(frozen=True)
class Tiles:
    """How the products are cut up: a tile of y is ``rows`` x ``outputs``, a step along the inputs ``depth`` long.

    warps, stages  of a program: Triton's num_warps and num_stages
    programs       that share a multiprocessor
    weight_first   the weight is the first operand of the matrix instruction: it may come from registers, and few rows
                   of x fill it; weights of up to 4 bits need it
    group          tiles of x that are computed together, for the sake of the L2
    """

    rows: int
    outputs: int
    depth: int
    warps: int = 4
    stages: int = 3
    programs: int = 1
    weight_first: bool = True
    group: int = 16


# (rows at most, tiles), for 8-bit weights and for narrower ones. From 64 rows on, most of which are prompt_int8.py's,
# what is fastest on an H200 for a 7B layer's linears together (``benchmarks/prefill.py --tune``); below, by what the
# compiler made of them, without spills.
HOPPER: dict[bool, tuple[tuple[float, Tiles], ...]] = {
    False: (
        (16, Tiles(16, 128, 128, stages=6, programs=2)),
        (32, Tiles(32, 128, 128, stages=5, programs=2)),
        (512, Tiles(64, 128, 128, stages=4, programs=2)),
        (float("inf"), Tiles(128, 128, 128, stages=3, programs=2, weight_first=False)),
    ),
    True: (
        (16, Tiles(16, 128, 128, stages=8, programs=2)),
        (32, Tiles(32, 128, 128, stages=7, programs=2)),
        (128, Tiles(64, 64, 128, stages=4, programs=4)),
        (256, Tiles(64, 128, 128, stages=4, programs=3)),
        (float("inf"), Tiles(128, 128, 128, stages=3, programs=2)),
    ),
}
# Small enough for the shared memory of any GPU.
PORTABLE: tuple[tuple[float, Tiles], ...] = (
    (16, Tiles(16, 64, 128, stages=3, programs=2)),
    (32, Tiles(32, 64, 128, stages=3, programs=2)),
    (float("inf"), Tiles(64, 64, 128, stages=3, programs=2)),
)
SPLIT_GAIN = 48 * 128  # sharing tiles pays if it saves a program the products of this many inputs, as measured


def supports(scheme: Scheme, shape: tuple[int, int]) -> str | None:
    """None, or why the weight cannot be multiplied by quantized activations here."""
    if not (scheme.weights.symmetric and scheme.weights.group_size is None):
        return "with quantized activations it knows one symmetric scale a row only"
    if shape[1] > MOST_INPUTS:
        return f"the sums of {shape[1]} inputs do not fit 32 bits; it takes up to {MOST_INPUTS}"
    return None


def has_nibbles(scheme: Scheme) -> bool:
    """Whether a prepared weight holds two codes in a byte."""
    return scheme.weights.bits <= 4


def prepare(weight: PackedWeight) -> PackedWeight:
    """Words int8 [outputs, inputs], or [outputs, 64 a run of 128 inputs] with up to 4 bits; rows of whole 16 bytes."""
    codes = unpack_weight(weight).codes
    if not has_nibbles(weight.scheme):
        words = F.pad(codes, (0, -codes.shape[1] % 16)).contiguous()
        if words.data_ptr() % 16:
            words = words.clone()
    else:
        low, high = F.pad(codes, (0, -codes.shape[1] % CHUNK)).unflatten(1, (-1, 2, CHUNK // 2)).unbind(2)
        words = ((low & 15) | (high << 4)).flatten(1)
    return PackedWeight(words, weight.scale.contiguous(), None, weight.shape, weight.scheme)


Codes = tuple[torch.Tensor, torch.Tensor]  # int8 [rows, inputs], float32 scales [rows]


def linear(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    gated: bool = False,
    quantized: Codes | None = None,
) -> torch.Tensor:
    """x [..., inputs] to [..., outputs] in x's dtype.

    gated      x is [..., 2 inputs]; silu(first half) * second half is what is multiplied, and is nowhere in 16 bits
    quantized  x's codes, where a norm made them (``rms_norm``)
    """
    outputs = weight.shape[0]
    flat = x.reshape(-1, x.shape[-1])
    y = x.new_empty(flat.shape[0], outputs)
    if y.numel() and prompt_int8.takes(flat, weight, bias):
        prompt_products(flat, weight, bias, y, gated, quantized)
    elif y.numel():
        products(flat, weight, bias, y, tiles_for(len(flat), has_nibbles(weight.scheme), x.device), gated, quantized)
    return y.view(*x.shape[:-1], outputs)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, bits: int) -> tuple[torch.Tensor, Codes]:
    """``elementwise.rms_norm`` of x [..., inputs], at least one row, and the same as codes: one kernel."""
    from mbq.kernels import int8_source as source

    flat = x.reshape(-1, x.shape[-1])
    y, codes, scales = source.rms_norm(flat if flat.stride(1) == 1 else flat.contiguous(), weight, eps, bits)
    return y.view(x.shape), (codes, scales)


def products(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    tiles: Tiles,
    gated: bool = False,
    quantized: Codes | None = None,
) -> None:
    """x [rows, inputs], or [rows, 2 inputs] if ``gated``, quantized a row, times a weight into y [rows, outputs]."""
    from mbq.kernels import int8_source as source

    assert weight.scheme.activations is not None
    programs, whole, shared = plan(len(x), *weight.shape, tiles, multiprocessors(x.device))
    partial = None
    if shared:
        words = -(-shared * (tiles.rows * tiles.outputs + 1) // source.ZEROS) * source.ZEROS
        empty = torch.empty if quantized is None else torch.zeros
        partial = empty(words, dtype=torch.int32, device=x.device)
    if quantized is None:
        rows = x if x.stride(1) == 1 else x.contiguous()
        quantized = source.quantize(rows, weight.scheme.activations.bits, partial, gated)
    codes, scales = quantized
    source.products(
        codes,
        scales,
        weight.words,
        has_nibbles(weight.scheme),
        weight.scale,
        bias,
        y,
        tiles,
        programs,
        whole,
        partial,
    )


def prompt_products(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    gated: bool = False,
    quantized: Codes | None = None,
) -> None:
    """As ``products``, and the same bits, by ``prompt_int8.cu``, which ``prompt_int8.takes`` x."""
    assert weight.scheme.activations is not None
    if quantized is None:
        rows = x if x.stride(1) == 1 else x.contiguous()
        quantized = prompt_int8.quantize(rows, weight.scheme.activations.bits, gated)
    prompt_int8.products(*quantized, weight, bias, y)


def plan(rows: int, outputs: int, inputs: int, tiles: Tiles, processors: int) -> tuple[int, int, int]:
    """(programs, tiles that one program computes from end to end, tiles whose steps programs share).

    The last round of tiles rarely fills the GPU; where that costs more than adding sums up, it is shared.
    """
    count = -(-rows // tiles.rows) * -(-outputs // tiles.outputs)
    steps = -(-inputs // tiles.depth)
    places = processors * tiles.programs
    left = count % places
    saved = (steps - left * steps / places) * tiles.depth
    if not left or saved < SPLIT_GAIN:
        return min(count, places), count, 0
    return min(places, left * steps) if count == left else places, count - left, left


def tiles_for(rows: int, nibbles: bool, device: torch.device) -> Tiles:
    """The choice."""
    table = HOPPER[nibbles] if _is_hopper(device) else PORTABLE
    return next(tiles for most, tiles in table if rows <= most)


@cache
def multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 3  # in the interpreter: any number that makes programs share tiles
    properties = torch.get_device_module(device).get_device_properties(device)
    return getattr(properties, "multi_processor_count", None) or properties.gpu_subslice_count


@cache
def _is_hopper(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] == 9
