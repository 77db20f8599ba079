"""Many rows of x by int8 codes on Hopper GPUs: ``quantize.cu`` and ``prompt_int8.cu``, with the bits of ``int8.py``."""

from __future__ import annotations

import ctypes
import warnings
from functools import cache

import torch

from mbq.errors import MBQWarning
from mbq.kernels import compiled
from mbq.kernels.packed import PackedWeight
from mbq.kernels.prompt import BLOCKS, OUTPUTS, SHARED_BYTES, THREADS, WARPGROUPS, order_of

INPUTS = 128  # of a stage, as in prompt_int8.cu
PROMPT_ROWS = 32  # more are a prompt's: from there on it is faster than Triton's kernel
ROWS = (64, 96, 128, 160, 192, 224, 240, 256)  # of a tile
LEAST_BUFFERS = {64: 4, 128: 3}  # of y, a warpgroup, by the bytes of a stage in a row of the weight
MOST_VECTORS = 8  # of a thread of quantize.cu: more do not fit its registers
TILE_COST = 32  # of a tile's time, what does not depend on its rows, in rows


def takes(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> bool:
    """Whether x [rows, inputs or more] is multiplied here: many rows of 16 bits, on Hopper, if the kernel compiles.

    Outputs are a multiple of 8, since the copy engine writes y.
    """
    dtype = weight.scale.dtype
    return (
        len(x) > PROMPT_ROWS
        and x.is_cuda
        and torch.version.hip is None
        and torch.cuda.get_device_capability(x.device) == (9, 0)
        and dtype in (torch.float16, torch.bfloat16)
        and x.dtype == dtype
        and (bias is None or bias.dtype == dtype)
        and weight.shape[0] % 8 == 0
        and _function_for(len(x), weight, dtype, x.device.index or 0) is not None
    )


def quantize(x: torch.Tensor, bits: int, gated: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``int8_source.quantize``, by ``quantize.cu`` where rows of x lie at multiples of 16 bytes and fit a block."""
    rows, inputs = x.shape[0], x.shape[1] // 2 if gated else x.shape[1]
    threads, vectors = block_of(inputs)
    function = None
    if inputs % 8 == 0 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 and vectors <= MOST_VECTORS:
        function = _quantizer(bits, x.dtype, gated, threads, vectors)
    if function is None:
        from mbq.kernels import int8_source as source

        return source.quantize(x, bits, gated=gated)
    codes = torch.empty(rows, -(-inputs // 16) * 16, dtype=torch.int8, device=x.device)[:, :inputs]
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    arguments = [
        *(ctypes.c_void_p(each.data_ptr()) for each in (x, codes, scales)),
        *(ctypes.c_uint(inputs), ctypes.c_ulonglong(x.stride(0)), ctypes.c_uint(codes.stride(0))),
    ]
    function.launch(x.device, rows, threads, arguments, early=True)
    return codes, scales


def block_of(inputs: int) -> tuple[int, int]:
    """(threads, vectors of 8 inputs that each has) of a block that quantizes a row; about four vectors a thread."""
    count = -(-inputs // 8)
    threads = min(-(-count // 128) * 32, 1024)
    return threads, -(-count // threads)


def products(
    codes: torch.Tensor, scales: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, y: torch.Tensor
) -> None:
    """``codes`` and ``scales`` as ``int8_source.quantize`` gives them, times a weight into y [rows, outputs]."""
    (rows, outputs), index = y.shape, y.device.index or 0
    function = _function_for(rows, weight, y.dtype, index)
    assert function is not None, "takes() says that it does not compile"
    clusters = _clusters(index)
    tile = rows_of_tile(rows, outputs, clusters)
    order = order_of(rows, outputs, tile)
    arguments = [
        compiled.TensorMap.of(codes, (tile // BLOCKS, INPUTS)),
        compiled.TensorMap.of(weight.words, (OUTPUTS, weight_row(weight))),
        compiled.TensorMap.of(y, (chunk_of(tile), OUTPUTS // WARPGROUPS)),
        *(ctypes.c_void_p(each.data_ptr()) for each in (scales, weight.scale)),
        ctypes.c_void_p(bias.data_ptr() if bias is not None else None),
        *(ctypes.c_uint(each) for each in (rows, outputs, -(-weight.shape[1] // INPUTS))),
        order,
    ]
    function.launch(y.device, BLOCKS * min(clusters, order.total), THREADS, arguments, early=True, cluster=BLOCKS)


@cache
def _clusters(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count // BLOCKS


def _function_for(rows: int, weight: PackedWeight, dtype: torch.dtype, index: int) -> compiled.Function | None:
    tile = rows_of_tile(rows, weight.shape[0], _clusters(index))
    return _function(options(weight, dtype, tile), index)


def rows_of_tile(rows: int, outputs: int, clusters: int) -> int:
    """Of ROWS, what keeps the GPU for the shortest time: its clusters take pairs of tiles, one after the other."""
    pairs = -(-outputs // (OUTPUTS * BLOCKS))
    return min(reversed(ROWS), key=lambda tile: -(-pairs * -(-rows // tile) // clusters) * (tile + TILE_COST))


def weight_row(weight: PackedWeight) -> int:
    """Bytes of a stage's inputs in a row of the weight."""
    return INPUTS if weight.scheme.weights.bits > 4 else INPUTS // 2


def chunk_of(tile: int) -> int:
    """CHUNK of ``prompt_int8.cu``."""
    return 32 if tile % 32 == 0 else 48


def shared_bytes(tile: int, row: int, stages: int, buffers: int) -> int:
    """What ``prompt_int8.cu`` has in shared memory: x, weight and two barriers a stage; chunks of y, scales of x."""
    return stages * (tile * INPUTS + OUTPUTS * row + 16) + WARPGROUPS * (buffers * chunk_of(tile) * 128 + tile * 4)


def rings(tile: int, row: int) -> tuple[int, int]:
    """(stages, buffers of y): the most stages that leave room for LEAST_BUFFERS, then as many as are of use."""
    least = LEAST_BUFFERS[row]
    stages = max(n for n in range(2, 9) if shared_bytes(tile, row, n, least) <= SHARED_BYTES)
    most = max(least, tile // chunk_of(tile))
    return stages, max(n for n in range(least, most + 1) if shared_bytes(tile, row, stages, n) <= SHARED_BYTES)


def options(weight: PackedWeight, dtype: torch.dtype, tile: int) -> tuple[tuple[str, int], ...]:
    """The macros of ``prompt_int8.cu``."""
    row = weight_row(weight)
    stages, buffers = rings(tile, row)
    return (
        ("BITS", 8 if row == INPUTS else 4),
        ("GROUP", 0),
        ("BF16", int(dtype == torch.bfloat16)),
        ("ROWS", tile),
        ("STAGES", stages),
        ("BUFFERS", buffers),
    )


def _function(options: tuple[tuple[str, int], ...], index: int) -> compiled.Function | None:
    chosen = dict(options)
    shared = shared_bytes(chosen["ROWS"], 16 * chosen["BITS"], chosen["STAGES"], chosen["BUFFERS"])
    return _compiled("prompt_int8", options, shared, index)


def _quantizer(bits: int, dtype: torch.dtype, gated: bool, threads: int, vectors: int) -> compiled.Function | None:
    options = {"BITS": 8, "GROUP": 0, "BF16": int(dtype == torch.bfloat16), "MOST": 2 ** (bits - 1) - 1}
    options |= {"GATED": int(gated), "THREADS": threads, "VECTORS": vectors}
    return _compiled("quantize", tuple(options.items()))


@cache
def _compiled(
    name: str, options: tuple[tuple[str, int], ...], shared: int = 0, index: int = 0
) -> compiled.Function | None:
    try:
        library = compiled.library(compiled.read_source(f"{name}.cu"), f"{name}.cu", "90a", options)
        return compiled.Function(library, name, shared, index)
    except compiled.CompilationError as error:
        warnings.warn(f"Prompts with quantized activations run in Triton, slower: {error}.", MBQWarning, stacklevel=2)
        return None
