"""Time of the quantized linears of a decoder on this GPU, beside cuBLAS, in one process.

python -m benchmarks.kernels --output benchmarks/kernels/h200.json

Shapes are those of a Qwen2-7B backbone: qkv, o, gate_up, down. Every time is that of a CUDA graph. "Stack" is 28 layers
of the four with weights of their own, so that nothing but activations stays in the L2; single shapes go round enough
copies to be larger than it. Beside each stands cuBLAS on 16-bit weights.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mbq.kernels import cuda
from mbq.kernels.operator import linear
from mbq.kernels.packed import PackedWeight
from mbq.scheme import Scheme, WeightScheme

SHAPES = {"qkv": (4608, 3584), "o": (3584, 3584), "gate_up": (37888, 3584), "down": (3584, 18944)}
LAYERS = 28
ROTATE_BYTES = 512 * 2**20  # many times the L2


def microseconds(run: Callable[[], Any], repeats: int) -> float:
    """The fastest of ``repeats`` replays of ``run`` as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    best = float("inf")
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(repeats):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, 1e3 * start.elapsed_time(end))
    return best


def random_packed(bits: int, group_size: int, shape: tuple[int, int], dtype: torch.dtype) -> PackedWeight:
    """Random words in the kernel's own layout: timing needs no codes that mean anything."""
    (outputs, inputs), scheme = shape, Scheme(f"W{bits}A16", WeightScheme(bits, False, group_size))
    tiles, units = -(-outputs // cuda.TILE), -(-inputs // cuda.UNIT)
    words = torch.randint(-(2**31), 2**31, (tiles, units, bits, 32, 4), dtype=torch.int32, device="cuda")
    sets = (tiles, units, cuda.UNIT // group_size, 8, 4)
    scale = torch.rand(sets, device="cuda").mul(0.01).to(dtype)
    zero = torch.randint(0, 2**bits, sets, dtype=torch.uint8, device="cuda")
    return PackedWeight(words, scale, zero, shape, scheme)


def bytes_of(weight: PackedWeight) -> int:
    return sum(each.nbytes for each in (weight.words, weight.scale, weight.zero_point) if each is not None)


def measure(bits: int, rows: int, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    found: dict[str, Any] = {"bits": bits, "rows": rows, "dtype": str(dtype).removeprefix("torch."), "shapes": {}}
    for name, shape in SHAPES.items():
        x = torch.randn(rows, shape[1], dtype=dtype, device="cuda")
        weight = random_packed(bits, 128, shape, dtype)
        copies = [random_packed(bits, 128, shape, dtype) for _ in range(ROTATE_BYTES // bytes_of(weight) + 1)]
        dense = [
            torch.randn(shape, dtype=dtype, device="cuda")
            for _ in range(max(2, ROTATE_BYTES // (2 * shape[0] * shape[1])))
        ]
        ours = microseconds(lambda c=copies, x=x: [linear(x, each, None, "cuda") for each in c], repeats) / len(copies)
        cublas = microseconds(lambda c=dense, x=x: [F.linear(x, each) for each in c], repeats) / len(dense)
        found["shapes"][name] = {
            "microseconds": ours,
            "cublas": cublas,
            "bytes": bytes_of(weight),
            "gigabytes_a_second": bytes_of(weight) / ours / 1e3,
        }
        del copies, dense
    layers = [{name: random_packed(bits, 128, shape, dtype) for name, shape in SHAPES.items()} for _ in range(LAYERS)]
    inputs = {name: torch.randn(rows, shape[1], dtype=dtype, device="cuda") for name, shape in SHAPES.items()}
    found["stack"] = microseconds(
        lambda: [linear(inputs[name], each, None, "cuda") for layer in layers for name, each in layer.items()], repeats
    )
    found["stack_bytes"] = sum(bytes_of(each) for layer in layers for each in layer.values())
    return found


def stack_of_cublas(rows: int, dtype: torch.dtype, repeats: int) -> float:
    layers = [
        {name: torch.randn(shape, dtype=dtype, device="cuda") for name, shape in SHAPES.items()} for _ in range(LAYERS)
    ]
    inputs = {name: torch.randn(rows, shape[1], dtype=dtype, device="cuda") for name, shape in SHAPES.items()}
    return microseconds(lambda: [F.linear(inputs[name], w) for layer in layers for name, w in layer.items()], repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", nargs="+", type=int, default=[3, 4])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--dtypes", nargs="+", default=["float16", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "runs": [],
        "cublas": [],
    }
    for dtype in (getattr(torch, name) for name in args.dtypes):
        for rows in args.rows:
            report["cublas"].append(
                {"rows": rows, "dtype": str(dtype), "stack": stack_of_cublas(rows, dtype, args.repeats)}
            )
            for bits in args.bits:
                run = measure(bits, rows, dtype, args.repeats)
                report["runs"].append(run)
                shapes = " ".join(f"{name} {each['microseconds']:.1f}" for name, each in run["shapes"].items())
                print(f"W{bits} {run['dtype']} M={rows}: {shapes} | stack {run['stack']:.0f}", flush=True)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
