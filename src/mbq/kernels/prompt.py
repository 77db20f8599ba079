"""Many rows of x by a packed weight on Hopper GPUs: the kernel of ``prompt.cu``, which unpacks weights as it goes."""

from __future__ import annotations

import ctypes
import warnings
from functools import cache

import torch

from mbq.errors import MBQWarning
from mbq.kernels import compiled
from mbq.kernels.packed import PackedWeight, Pointers

OUTPUTS, INPUTS, BLOCKS, WARPGROUPS = 128, 64, 2, 2  # as in prompt.cu
TURN_BYTES = 512
THREADS = 128 * (WARPGROUPS + 1)
SHARED_BYTES = 227 * 1024  # what a block can have
ROWS = (64, 96, 128, 160, 192, 224, 240, 256)  # of a tile
TILE_COST = 230  # of a tile's time, what does not depend on its rows, in rows: measured on an H200
BAND = 12  # row tiles, at most, that share words in the L2


def linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor | None:
    """x [..., inputs], contiguous and at a multiple of 16 bytes, to [..., outputs]; None where something else has to.

    That is on other GPUs than Hopper's, for outputs that are no multiple of 8, and where the kernel cannot be compiled.
    """
    (outputs, inputs), (tiles, units) = weight.shape, weight.words.shape[:2]
    if not x.is_cuda or torch.cuda.get_device_capability(x.device) != (9, 0) or outputs % 8:
        return None
    index, rows = x.device.index or 0, x.numel() // inputs
    clusters = torch.cuda.get_device_properties(index).multi_processor_count // BLOCKS
    tile = rows_of_tile(rows, outputs, clusters)
    function = _function(options(weight, x.dtype, tile), index)
    if function is None:
        return None
    y, order = x.new_empty(*x.shape[:-1], outputs), order_of(rows, outputs, tile)
    arguments = [
        compiled.TensorMap.of(x.view(rows, inputs), (tile // BLOCKS, INPUTS)),
        compiled.TensorMap.of(y.view(rows, outputs), (chunk_of(tile), OUTPUTS // WARPGROUPS)),
        Pointers.of(weight),
        ctypes.c_void_p(bias.data_ptr() if bias is not None else None),
        *(ctypes.c_uint(each) for each in (outputs, tiles, units)),
        order,
    ]
    function.launch(x.device, BLOCKS * min(clusters, order.total), THREADS, arguments, early=True, cluster=BLOCKS)
    return y


class Order(ctypes.Structure):
    """``struct Order`` of ``prompt.cu``."""

    _fields_ = [(name, ctypes.c_uint) for name in ("row_tiles", "band", "pairs", "total")]


def rows_of_tile(rows: int, outputs: int, clusters: int) -> int:
    """Of ROWS, what keeps the GPU for the shortest time: its clusters take pairs of tiles, one after the other."""
    pairs = -(-outputs // (OUTPUTS * BLOCKS))
    return min(reversed(ROWS), key=lambda tile: -(-pairs * -(-rows // tile) // clusters) * (tile + TILE_COST))


def order_of(rows: int, outputs: int, tile: int) -> Order:
    """Bands of row tiles are as equal as they can be."""
    row_tiles, pairs = -(-rows // tile), -(-outputs // (OUTPUTS * BLOCKS))
    return Order(row_tiles, -(-row_tiles // -(-row_tiles // BAND)), pairs, pairs * row_tiles)


def chunk_of(tile: int) -> int:
    """CHUNK of ``prompt.cu``."""
    return next(rows for rows in (64, 48, 32) if tile % rows == 0)


def shared_bytes(tile: int, stages: int) -> int:
    """What ``prompt.cu`` has in shared memory: x, chunks of y, codes that change lanes, two barriers a stage."""
    return stages * (tile * INPUTS * 2 + 16) + WARPGROUPS * (2 * chunk_of(tile) * 128 + 4 * TURN_BYTES)


def options(weight: PackedWeight, dtype: torch.dtype, tile: int) -> tuple[tuple[str, int], ...]:
    """The macros of ``prompt.cu``."""
    weights = weight.scheme.weights
    return (
        ("BITS", weights.bits),
        ("GROUP", weights.group_size or 0),
        ("BF16", int(dtype == torch.bfloat16)),
        ("ROWS", tile),
        ("STAGES", max(stages for stages in range(2, 9) if shared_bytes(tile, stages) <= SHARED_BYTES)),
    )


@cache
def _function(options: tuple[tuple[str, int], ...], index: int) -> compiled.Function | None:
    chosen = dict(options)
    try:
        library = compiled.library(compiled.read_source("prompt.cu"), "prompt.cu", "90a", options)
        return compiled.Function(library, "prompt", shared_bytes(chosen["ROWS"], chosen["STAGES"]), index)
    except compiled.CompilationError as error:
        warnings.warn(f"Prompts run through a 16-bit weight, slower: {error}.", MBQWarning, stacklevel=2)
        return None
