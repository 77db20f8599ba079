"""NVIDIA GPUs from compute capability 7.5 on: ``decode.cu`` for few rows, ``prompt.cu`` or a dense weight for many.

The words of a unit, 32 rows x 128 inputs, lie in the order in which its 32 lanes read them (``decode.cu`` says why):

    unit      [BITS vectors][32 lanes][4 rows]  words of 32 bits: a lane reads 16 bytes a vector
    lane      4g + t: rows g, g + 8, g + 16, g + 24; of each of the unit's 4 runs of 32 inputs, inputs 8t .. 8t + 7
    row       16 pairs of codes of a lane, pair q = 4 run + p: inputs 32 run + 8t + 2p (low half) and + 1 (high half)

With 3 bits the three words of a row and lane have 16 slots, a half of 16 bits:

    word 0   bits 0-2 slot 0 | 3-5 slot 1 | 6-8 slot 2 | 9-11 slot 3 | 12-14 slot 4 | 15 bit 0 of slot 15
    word 1   bits 0-2 slot 5 | ...                                   | 12-14 slot 9 | 15 bit 1 of slot 15
    word 2   bits 0-2 slot 10 | ...                                  | 12-14 slot 14 | 15 bit 2 of slot 15

Where in the mantissa a slot is read depends on the type (``slots``); pairs fill the slots in the order of that bit, so
that the two pairs of an mma step are read at one bit. For float16: slots 0 3 5 8 10 13, 1 4 6 9 11 14, 2 7 12 15.

Scales and zeros of a unit are [groups, g, 4 rows, 2], in the dtype of the scales: a lane reads its rows' at once.
"""

from __future__ import annotations

import ctypes
import warnings
from functools import cache

import torch
import torch.nn.functional as F

from mbq.errors import MBQError, MBQWarning
from mbq.kernels import compiled, prompt
from mbq.kernels.packed import PackedWeight, Pointers, unpack_weight
from mbq.scheme import Scheme

TILE, UNIT, WARPS = 32, 128, 12
GROUPS = (32, 64, 128, None)
LAUNCH_ROWS = 16  # rows of x that a launch takes
PROMPT_ROWS, PACKED_ROWS = 64, 80  # more are a prompt's where prompt.cu runs; elsewhere, where it does not
SPLIT, SPLIT_UNITS = 2, 50  # blocks that share tiles where x has that many units: 16 rows of it are more than an L1


def supports(scheme: Scheme, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"it needs an NVIDIA GPU, and the weight is on {device}"
    if torch.version.hip is not None:
        return "it needs an NVIDIA GPU"
    if scheme.activations is not None:
        return f"it keeps activations in 16 bits, and {scheme.name} quantizes them"
    capability = torch.cuda.get_device_capability(device)
    if capability < (7, 5):
        return f"it needs compute capability 7.5, and this GPU has {capability[0]}.{capability[1]}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 or bfloat16, not in {dtype}".replace("torch.", "")
    if dtype == torch.bfloat16 and capability < (8, 0):
        return "bfloat16 needs compute capability 8.0; load with dtype float16"
    if dtype == torch.bfloat16 and scheme.weights.bits == 8:
        return "8-bit codes do not fit the mantissa of bfloat16; load with dtype float16"
    if scheme.weights.group_size not in GROUPS:
        return f"it knows groups of 32, 64, 128 and whole rows, not of {scheme.weights.group_size}"
    if shape[1] % 8:
        return f"it needs a multiple of 8 inputs, not {shape[1]}"
    try:
        index, (tiles, units) = device.index or 0, (-(-shape[0] // TILE), -(-shape[1] // UNIT))
        for columns in (8, 16):
            split = split_of(tiles, units, columns, index)
            _function("linear", _options(scheme, dtype, columns, shape[1], split), index)
    except compiled.CompilationError as error:
        _warn(str(error))
        return str(error)
    return None


@cache
def _warn(reason: str) -> None:
    """Once a reason: the GPU could run the kernel, and its installation cannot make it."""
    warnings.warn(f"Packed weights run without the CUDA kernel, slower: {reason}.", MBQWarning, stacklevel=2)


def prepare(weight: PackedWeight) -> PackedWeight:
    """Words [tiles, units, bits, 32, 4]; scales beside zeros [tiles, units, groups a unit, 8, 4, 2].

    With one scale a row they are [tiles, 8, 4, 2]. ``zero_point`` is None then, also where the scheme has zero points.
    """
    q, bits, size = unpack_weight(weight), weight.scheme.weights.bits, weight.scheme.weights.group_size
    codes = q.codes if q.zero_point is not None else q.codes.to(torch.int16) + 2 ** (bits - 1)
    words = pack_units(codes.to(torch.uint8), bits, q.scale.dtype)
    zero = torch.full_like(q.scale, 2 ** (bits - 1)) if q.zero_point is None else q.zero_point
    scale, zero = (_in_units(each, size) for each in (q.scale, zero.to(q.scale.dtype)))
    return PackedWeight(words, torch.stack([scale, zero], dim=-1), None, weight.shape, weight.scheme)


def slots(bits: int, dtype: torch.dtype) -> list[int]:
    """The slot of each of a lane's 16 pairs: by the bit of the mantissa of ``dtype`` where the slot is read."""
    mantissa = 7 if dtype == torch.bfloat16 else 10
    per_word, in_place = 16 // bits, (mantissa - bits) // bits + 1
    read_at = [slot % per_word % in_place * bits for slot in range(16)]
    if bits == 3:
        read_at[15] = 0 if dtype == torch.bfloat16 else 6
    return sorted(range(16), key=lambda slot: (read_at[slot], slot))


def pack_units(codes: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """uint8 codes [outputs, inputs] to int32 words [tiles, units, bits, 32, 4]; what is added to fill units is 0."""
    outputs, inputs = codes.shape
    codes = F.pad(codes, (0, -inputs % UNIT, 0, -outputs % TILE))
    tiles, units = codes.shape[0] // TILE, codes.shape[1] // UNIT
    # [tile, row, g, unit, run, t, p, even or odd] -> [tile, unit, lane, row, pair, even or odd]
    pairs = (
        codes.view(tiles, 4, 8, units, 4, 4, 4, 2).permute(0, 3, 2, 5, 1, 4, 6, 7).reshape(tiles, units, 32, 4, 16, 2)
    )
    halves = torch.zeros(tiles, units, bits, 32, 4, 2, dtype=torch.int32, device=codes.device)
    per_word = 16 // bits
    for q, slot in enumerate(slots(bits, dtype)):
        code = pairs[..., q, :].to(torch.int32)
        if bits == 3 and slot == 15:
            for bit in range(3):
                halves[:, :, bit] |= (code >> bit & 1) << 15
        else:
            halves[:, :, slot // per_word] |= code << slot % per_word * bits
    return halves[..., 0] | halves[..., 1] << 16


def _in_units(values: torch.Tensor, group_size: int | None) -> torch.Tensor:
    """[outputs, groups] to [tiles, units, groups a unit, 8, 4], or [outputs, 1] to [tiles, 8, 4]."""
    outputs, groups = values.shape
    per_unit = UNIT // group_size if group_size else 1
    values = F.pad(values, (0, -groups % per_unit, 0, -outputs % TILE))
    values = values.view(-1, 4, 8, values.shape[1] // per_unit, per_unit).permute(0, 3, 4, 2, 1)
    return (values if group_size else values[:, 0, 0]).contiguous()


def linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., inputs] to [..., outputs] in x's dtype. Sums are float32.

    Raises MBQError where x or the bias is of another dtype than the scales.
    """
    outputs, inputs = weight.shape
    for what, tensor in (("x", x), ("The bias", bias)):
        if tensor is not None and tensor.dtype != weight.scale.dtype:
            kinds = f"{what} is {tensor.dtype}, and the weight's scales are {weight.scale.dtype}".replace("torch.", "")
            raise MBQError(f"{kinds}; load the model with one dtype.")
    rows = x.numel() // inputs
    x = x.contiguous()
    if x.data_ptr() % 16:
        x = x.clone()
    product = prompt.linear(x, weight, bias) if rows > PROMPT_ROWS else None
    if product is not None:
        return product
    if rows > PACKED_ROWS:
        return F.linear(x, dense(weight), bias)
    y = x.new_empty(*x.shape[:-1], outputs)
    for first in range(0, rows, LAUNCH_ROWS):
        _multiply(x, weight, bias, y, first, min(rows - first, LAUNCH_ROWS))
    return y


def _multiply(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, y: torch.Tensor, first: int, rows: int
) -> None:
    """Rows ``first`` .. ``first + rows`` of x into those of y; at most LAUNCH_ROWS, since a launch reads all words."""
    (outputs, inputs), (tiles, units) = weight.shape, weight.words.shape[:2]
    index, size = x.device.index or 0, x.element_size()
    columns = 8 if rows <= 8 else 16
    split = split_of(tiles, units, columns, index)
    clusters = min(_processors(index) // split, tiles)
    clusters = max(clusters, -(-tiles // WARPS))  # a warp's run of units meets two tiles at most
    arguments = [
        ctypes.c_void_p(x.data_ptr() + first * inputs * size),
        Pointers.of(weight),
        ctypes.c_void_p(bias.data_ptr() if bias is not None else None),
        ctypes.c_void_p(y.data_ptr() + first * outputs * size),
        *(ctypes.c_uint(each) for each in (rows, outputs, inputs)),
        plan(tiles, units, clusters, rows, split),
    ]
    function = _function("linear", _options(weight.scheme, x.dtype, columns, inputs, split), index)
    early = _architecture(index) >= 90
    function.launch(x.device, clusters * split, 32 * WARPS, arguments, early, cluster=split)


def dense(weight: PackedWeight) -> torch.Tensor:
    """The weight [outputs, inputs], in the dtype of its scales."""
    (outputs, inputs), (tiles, units) = weight.shape, weight.words.shape[:2]
    device = weight.words.device
    y = torch.empty(outputs, inputs, dtype=weight.scale.dtype, device=device)
    function = _function("dense", _options(weight.scheme, y.dtype, 8, inputs), device.index or 0)
    arguments = [
        Pointers.of(weight),
        ctypes.c_void_p(y.data_ptr()),
        *(ctypes.c_uint(each) for each in (outputs, inputs, tiles, units)),
    ]
    function.launch(device, -(-tiles * units // 8), 256, arguments, early=_architecture(device.index or 0) >= 90)
    return y


class _Plan(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint) for name in ("units", "tiles", "more", "inverse", "log_rows")]


def plan(tiles: int, units: int, clusters: int, rows: int, split: int = 1) -> _Plan:
    """What ``decode.cu`` would have to divide for; ``inverse`` is exact for units of 16 tiles of 2 million inputs.

    A cluster is ``split`` blocks, which divide the ``units`` of a tile.
    """
    inverse = (2**32 // (units // split) + 1) % 2**32
    return _Plan(units, tiles // clusters, tiles % clusters, inverse, (rows - 1).bit_length())


def split_of(tiles: int, units: int, columns: int, index: int) -> int:
    """How many blocks share their tiles, so that each reads a part of x.

    One where x is small, where the GPU has no clusters, where the units cannot be divided, and where there are so many
    tiles that fewer clusters than blocks would give a warp units of more than two.
    """
    large = columns == 16 and units >= SPLIT_UNITS and units % SPLIT == 0
    fits = tiles <= _processors(index) // SPLIT * WARPS
    return SPLIT if large and fits and _architecture(index) >= 90 else 1


def _options(
    scheme: Scheme, dtype: torch.dtype, columns: int, inputs: int, split: int = 1
) -> tuple[tuple[str, int], ...]:
    """The macros of ``decode.cu``."""
    bits = scheme.weights.bits
    return (
        ("BITS", bits),
        ("GROUP", scheme.weights.group_size or 0),
        ("BF16", int(dtype == torch.bfloat16)),
        ("COLUMNS", columns),
        ("WARPS", WARPS),
        ("DEPTH", 1 if bits == 8 or columns == 16 else 2),
        ("EXACT", int(inputs % UNIT == 0)),
        ("SPLIT", split),
    )


@cache
def _function(name: str, options: tuple[tuple[str, int], ...], index: int) -> compiled.Function:
    library = compiled.library(compiled.read_source("decode.cu"), "decode.cu", _architecture(index), options)
    shared = WARPS * 2 * dict(options)["COLUMNS"] * TILE * 4 if name == "linear" else 0
    return compiled.Function(library, name, shared)


@cache
def _architecture(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count
