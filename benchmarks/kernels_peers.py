"""Other people's weight-only products, as contenders of benchmarks/kernels.py; one that is missing is named.

A peer takes a checkpoint's weight and keeps it in its own layout. What a peer cannot do (a scheme, a dtype, more rows)
is left out; Marlin knows no zero points and gets symmetric weights of the same bits.

Two of them compile for many seconds, so ``warm`` runs before anything is timed: Humming's kernels in threads, GemLite's
candidates in processes that fill Triton's cache on disk; GemLite chooses among them itself, later, on a quiet GPU.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mbq.bench import Contender, dtype_named, random_weight
from mbq.bench_report import Decoder
from mbq.kernels.packed import PackedWeight, unpack_weight
from mbq.scheme import Scheme, scheme_named

ROOT = Path(__file__).parents[1]
TOLERANCE = 5e-2  # peers round weights to 16 bits, and some add 16-bit partial sums
WARM_SECONDS = 100


@dataclass(frozen=True)
class Peer:
    """What a peer can be asked for, and how.

    contender  of a dtype and the numbers of rows; may raise
    warm       compiles what the products will need; None where nothing has to be
    rows       the most rows of x
    """

    name: str
    schemes: tuple[str, ...]
    dtypes: tuple[str, ...]
    contender: Callable[[Scheme, str, Sequence[int]], Contender]
    package: str = ""  # that has to be importable
    warm: Callable[[Decoder, Scheme, str, Sequence[int]], None] | None = None
    rows: int = 16
    symmetric: bool = False

    def missing(self) -> str | None:
        """Why it cannot run here, as far as that is seen without trying."""
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        return None

    def scheme(self, name: str) -> Scheme:
        scheme = scheme_named(name)
        return replace(scheme, weights=replace(scheme.weights, symmetric=True)) if self.symmetric else scheme


def peers(marlin: Path | None) -> list[Peer]:
    """All of them, in the order in which they run: what is likeliest to break the process comes last."""
    both = ("float16", "bfloat16")
    found = [
        Peer("torch int4", ("W4A16",), ("bfloat16",), torch_int4),
        Peer("Humming", ("W3A16", "W4A16"), both, humming, "humming", warm_humming),
        Peer("GemLite", ("W4A16",), ("float16",), gemlite, "gemlite", warm_gemlite, rows=4),
    ]
    if marlin is not None:
        found.append(Peer("Marlin", ("W4A16",), ("float16",), partial(marlin_of, marlin), symmetric=True))
    return found


# ---- torch's own -----------------------------------------------------------------------------------------------------


def torch_int4(scheme: Scheme, dtype: str, rows: Sequence[int]) -> Contender:
    """A weight is (code - 8) * scale + zero; two codes a byte, the even one in the high half."""

    def prepare(weight: PackedWeight) -> tuple[torch.Tensor, torch.Tensor]:
        q = unpack_weight(weight)
        assert q.zero_point is not None
        halves = (q.codes[:, ::2] << 4 | q.codes[:, 1::2]).contiguous()
        zero = ((8 - q.zero_point.float()) * q.scale.float()).to(q.scale.dtype)
        both = torch.stack([q.scale, zero], dim=-1).transpose(0, 1).contiguous()
        return torch.ops.aten._convert_weight_to_int4pack(halves, 8), both

    def multiply(x: torch.Tensor, prepared: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return torch.ops.aten._weight_int4pack_mm(x, prepared[0], scheme.weights.group_size, prepared[1])

    return Contender("torch int4", prepare, multiply, TOLERANCE)


# ---- Marlin ----------------------------------------------------------------------------------------------------------


def marlin_of(library: Path, scheme: Scheme, dtype: str, rows: Sequence[int]) -> Contender:
    """Groups of 128, symmetric, float16. ``library`` is built as the docstring of benchmarks/kernels.py says."""
    function = ctypes.CDLL(str(library.resolve())).marlin
    pointer, number = ctypes.c_void_p, ctypes.c_int
    function.argtypes = [*[pointer] * 4, *[number] * 3, pointer, number, pointer]
    locks = torch.zeros(2**16, dtype=torch.int32, device="cuda")  # left at zero by every call

    def prepare(weight: PackedWeight) -> tuple[torch.Tensor, torch.Tensor]:
        return marlin_words(weight), marlin_scales(weight.scale)

    def multiply(x: torch.Tensor, prepared: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        words, scale = prepared
        (count, inputs), outputs = x.shape, scale.shape[1]
        y = x.new_empty(count, outputs)
        tensors = [each.data_ptr() for each in (x, words, y, scale)]
        stream = torch.cuda.current_stream().cuda_stream
        status = function(*tensors, count, outputs, inputs, locks.data_ptr(), x.device.index, stream)
        if status:
            raise RuntimeError(f"Marlin answers {status}")
        return y

    return Contender("Marlin", prepare, multiply, TOLERANCE)


def marlin_words(weight: PackedWeight) -> torch.Tensor:
    """int32 [inputs / 16, 2 outputs]: the order of mma fragments, as Marlin's own Layer.pack makes it."""
    outputs, inputs = weight.shape
    codes = unpack_weight(weight).codes.to(torch.int32) + 8
    tiles = codes.T.reshape(inputs // 16, 16, outputs // 16, 16).permute(0, 2, 1, 3)
    order = []
    for lane in range(32):
        column, row = lane // 4, 2 * (lane % 4)
        one = [16 * (row + r) + column + 8 * block for block in (0, 1) for r in (0, 1, 8, 9)]
        order += [place + 256 * tile for tile in range(4) for place in one]
    order = torch.tensor(order, device=codes.device).reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].flatten()
    codes = tiles.reshape(-1, 1024)[:, order].reshape(inputs // 16, 2 * outputs, 8)
    words = torch.zeros_like(codes[..., 0])
    for i in range(8):
        words |= codes[..., i] << 4 * i
    return words


def marlin_scales(scale: torch.Tensor) -> torch.Tensor:
    """[outputs, groups] to [groups, outputs], 64 of them transposed as 8 x 8."""
    outputs, groups = scale.shape
    return scale.T.reshape(groups, outputs // 64, 8, 8).transpose(2, 3).reshape(groups, outputs).contiguous()


# ---- Humming ---------------------------------------------------------------------------------------------------------


def humming(scheme: Scheme, dtype: str, rows: Sequence[int]) -> Contender:
    """It takes the checkpoint's words as they are. Only the kernels for ``rows`` are compiled, of its own choice."""
    from humming.forward import humming_forward
    from humming.layer import HummingLayer

    weights = scheme.weights
    numbers = {"dtype": f"uint{weights.bits}", "group_size": weights.group_size, "has_zero_point": True}

    def prepare(weight: PackedWeight) -> tuple[Any, ...]:
        with torch.device("cuda"):
            layer = HummingLayer(*weight.shape, weight_config=dict(numbers), torch_dtype=dtype_named(dtype))
        names = {"weight": weight.words, "weight_scale": weight.scale, "zero_point": weight.zero_point}
        layer.load_from_tensors(names)
        layer.transform()
        tuning = humming_choice(layer.humming_config, rows)
        call = partial(humming_forward, layer.humming_config, tuning_config=tuning, locks=layer.locks)
        return call, layer.weight.data, layer.weight_scale.data, layer.zero_point.data

    def multiply(x: torch.Tensor, prepared: tuple[Any, ...]) -> torch.Tensor:
        call, words, scale, zero_point = prepared
        return call(inputs=x, weight=words, weight_scale=scale, zero_point=zero_point)

    return Contender("Humming", prepare, multiply, TOLERANCE)


def humming_choice(config: Any, rows: Sequence[int]) -> str:
    """Of its list of kernels (from more than, up to so many rows), those that it would take for ``rows``."""
    from humming.tune import get_heuristics_config

    listed = get_heuristics_config(config, device=0)
    return json.dumps([entry for entry in listed if any(entry[0] < count <= entry[1] for count in rows)])


def warm_humming(decoder: Decoder, scheme: Scheme, dtype: str, rows: Sequence[int]) -> None:
    from humming import dtypes
    from humming.kernel.humming import HummingKernel
    from humming.schema import HummingInputSchema, HummingWeightSchema
    from humming.transform import prepare_layer_config

    weights = scheme.weights
    schema = HummingWeightSchema(
        b_dtype=dtypes.DataType.from_str(f"uint{weights.bits}"),
        weight_scale_group_size=weights.group_size,
        has_zero_point=True,
    )
    inputs_schema = HummingInputSchema(a_dtype=dtypes.DataType.from_torch_dtype(dtype_named(dtype)))

    def compile_one(shape: tuple[int, int]) -> None:
        config = prepare_layer_config(
            shape_n=shape[0],
            shape_k=shape[1],
            weight_schema=schema,
            input_schema=inputs_schema,
            num_experts=None,
            pad_n_to_multiple=1,
            pad_k_to_multiple=1,
            has_bias=False,
            torch_dtype=dtype_named(dtype),
            device=0,
            tensors=None,
        )
        HummingKernel.prepare_kernels(config.to_str(), None, humming_choice(config, rows), 0)

    _at_once(compile_one, decoder.shapes.values())


# ---- GemLite ---------------------------------------------------------------------------------------------------------


def gemlite(scheme: Scheme, dtype: str, rows: Sequence[int]) -> Contender:
    """It times its candidates at the first product of a shape and a number of rows; here a candidate gets less time."""
    import triton
    from gemlite import forward_functional
    from gemlite.helper import A16W4_HQQ_INT

    _bench_with(partial(triton.testing.do_bench, warmup=5, rep=25))

    def prepare(weight: PackedWeight) -> tuple[Any, ...]:
        q = unpack_weight(weight)
        assert q.zero_point is not None
        device = str(q.codes.device)
        zero = q.zero_point.to(q.scale.dtype)
        layer = A16W4_HQQ_INT(device=device, dtype=dtype_named(dtype)).from_weights(q.codes, q.scale, zero)
        return layer.get_tensor_args(), layer.get_meta_args()

    def multiply(x: torch.Tensor, prepared: tuple[Any, ...]) -> torch.Tensor:
        return forward_functional(x, None, *prepared)

    return Contender("GemLite", prepare, multiply, TOLERANCE)


def _bench_with(do_bench: Callable[..., Any]) -> None:
    """Let GemLite's autotuners, which are Triton's, time their candidates by ``do_bench``."""
    from gemlite.core import GEMLITE_TRITON_KERNELS

    for each in GEMLITE_TRITON_KERNELS:
        for kernel in each.kernel:
            kernel.do_bench = do_bench


def warm_gemlite(decoder: Decoder, scheme: Scheme, dtype: str, rows: Sequence[int]) -> None:
    def compile_one(job: tuple[tuple[int, int], int]) -> None:
        (outputs, inputs), count = job
        code = f"from benchmarks.kernels_peers import compile_gemlite as c; c({outputs}, {inputs}, {count}, {dtype!r})"
        path = os.pathsep.join([str(ROOT), *sys.path])
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": path},
            timeout=WARM_SECONDS,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    _at_once(compile_one, [(shape, count) for shape in decoder.shapes.values() for count in rows])


def compile_gemlite(outputs: int, inputs: int, rows: int, dtype: str) -> None:
    """Compile every candidate, by running each once; which is the fastest is not asked."""
    scheme, target = scheme_named("W4A16"), dtype_named(dtype)
    contender = gemlite(scheme, dtype, [rows])

    def once(call: Callable[[], Any], quantiles: Any = None, **rest: Any) -> list[float]:
        call()
        return [1.0, 1.0, 1.0]

    _bench_with(once)
    prepared = contender.prepare(random_weight(scheme, (outputs, inputs), target, torch.device("cuda", 0)))
    contender.multiply(torch.zeros(rows, inputs, dtype=target, device="cuda"), prepared)
    torch.cuda.synchronize()


def _at_once(run: Callable[[Any], None], jobs: Iterable[Any]) -> None:
    """Every job in a thread of its own. Raises the first error once all have ended."""
    listed = list(jobs)
    with ThreadPoolExecutor(len(listed)) as pool:
        list(pool.map(run, listed))
