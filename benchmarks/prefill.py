"""Time of the linears of a prompt, many rows at once, on this GPU, beside cuBLAS, in one process.

    python -m benchmarks.prefill --output benchmarks/results/prefill.json
    python -m benchmarks.prefill --tune --output tune.json     # which tiles mbq/kernels/int8.py should hold
    python -m benchmarks.prefill --peers humming               # pip install humming-kernels

Shapes are those of a Qwen2-7B decoder layer (qkv, o, gate_up, down) and of a vision tower's MLP. A time is the median
over replays of a CUDA graph that goes once round copies of the weight larger than the L2, the graphs of a shape and
number of rows in turns: under long loads the GPU's power limit lowers its clock. Humming's has one copy, which may stay
in the L2. "Layer" is the sum of the four. mbq's int8 products are compared with exact integers before they are
timed, those of W3A16 with float32; what fails is printed and left out. "Through 16 bits" is what W3A16 does in prompts
on other GPUs than Hopper's, and "in Triton" what W4A8 and W8A8 do there. Last, the two ways of a scheme, that of few
rows and that of prompts, are timed at the numbers of rows about which the second takes over.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mbq import bench
from mbq.bench import QWEN2_7B, microseconds
from mbq.kernels import cuda, humming, int8, prompt_int8
from mbq.kernels.packed import PackedWeight, pack_weight
from mbq.qtensor import QTensor, quantize_activations
from mbq.scheme import SCHEMES, ActivationScheme, Scheme

LAYER = QWEN2_7B.shapes
VISION = {"vision up": (4304, 1152), "vision down": (1152, 4304)}
SHAPES = {**LAYER, **VISION}
ROWS = (1, 16, 128, 512, 2048, 8192)
QUANTIZED = ("W4A8", "W8A8")
WEIGHT_ONLY = "W3A16"
TAKEOVER_ROWS = (16, 32, 48, 64, 80, 96, 112, 128)
INT8_TAKEOVER_ROWS = (17, 32, 33, 48, 64, 96, 128, 256)
ROTATE_BYTES = 160 * 2**20  # several times the L2

# ---- time ----


def each(calls: list[Callable[[], Any]]) -> float:
    """Microseconds of one of ``calls``, which run one after the other in a CUDA graph."""
    return microseconds(lambda: [call() for call in calls]) / len(calls)


def copies_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """``tensor`` and clones of it, together larger than the L2."""
    return [tensor, *(tensor.clone() for _ in range(min(31, ROTATE_BYTES // tensor.nbytes)))]


# ---- weights ----


def random_weight(
    scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, kernel: Any = int8
) -> tuple[QTensor, PackedWeight]:
    """int8 codes over their whole range with their scales, and the same as ``kernel`` prepares it."""

    half = 2 ** (scheme.weights.bits - 1)
    codes = torch.randint(-half, half, shape, dtype=torch.int8, device="cuda")
    scale = (torch.rand(shape[0], 1, device="cuda") * 0.01 + 0.001).to(dtype)
    q = QTensor(codes, scale, None, scheme.weights)
    return q, kernel.prepare(pack_weight(q, scheme))


def with_words(weight: PackedWeight, words: torch.Tensor) -> PackedWeight:
    return replace(weight, words=words)


def wrong(y: torch.Tensor, x: torch.Tensor, q: QTensor, roundings: int = 1) -> int:
    """How many of the first and last rows' products are further from the exact ones than ``roundings``."""
    some = torch.cat([torch.arange(min(len(x), 64)), torch.arange(max(0, len(x) - 64), len(x))]).to(x.device)
    x_codes, scale = quantize_activations(x[some], ActivationScheme(8))
    exact = x_codes.double() @ q.codes.double().T * scale.double() * q.scale.double().T
    kind = torch.finfo(y.dtype)
    bound = (roundings * kind.eps / 2 * 1.001 + 1e-6) * exact.abs() + kind.eps * kind.tiny
    return int((~((y[some].double() - exact).abs() <= bound)).sum())


# ---- the comparison ----


Calls = list[Callable[[], Any]]  # of one way of multiplying, by one copy of the weight after the other


def measure(args: argparse.Namespace, dtype: torch.dtype) -> list[dict[str, Any]]:
    """A row a way of multiplying, shape and number of rows; the ways of a shape and number are timed in turns."""
    found: list[dict[str, Any]] = []

    def left_out(way: str, where: str, error: Exception) -> None:
        first = str(error).splitlines()[0][:200] if str(error) else ""
        print(f"left out: {way} {where}: {type(error).__name__} {first}", flush=True)

    for name, shape in SHAPES.items():
        ways: dict[str, Callable[[torch.Tensor], Calls]] = {}
        for way, make in makers(name, args.peers).items():
            try:
                ways[way] = make(shape, dtype)
            except Exception as error:
                left_out(way, name, error)
        for rows in args.rows:
            x, calls = torch.randn(rows, shape[1], dtype=dtype, device="cuda"), {}
            for way, calls_of in ways.items():
                try:
                    made = calls_of(x)
                    made[0]()
                    calls[way] = made
                except Exception as error:
                    left_out(way, f"{name} M={rows}", error)
            runs = {way: lambda several=several: [call() for call in several] for way, several in calls.items()}
            for way, took in bench.in_turns(runs).items():
                found.append({"way": way, "shape": name, "rows": rows, "microseconds": took / len(calls[way])})
        if name in LAYER:
            took = each([lambda w=w: cuda.dense(w) for w in weight_only(shape, dtype)])
            found.append({"way": "its dense weight", "shape": name, "rows": 0, "microseconds": took})
    return found


def makers(name: str, peers: list[str]) -> dict[str, Callable[..., Callable[[torch.Tensor], Calls]]]:
    """way -> what makes the weights of a shape and dtype and returns the calls of an x. Groups are whole in LAYER."""
    made: dict[str, Callable[..., Callable[[torch.Tensor], Calls]]] = {"16 bit": sixteen_bits}
    if name in LAYER:
        made |= {WEIGHT_ONLY: packed, "through 16 bits": partial(packed, dense=True)}
    made |= {scheme: partial(quantized, scheme) for scheme in QUANTIZED}
    made |= {f"{scheme} in Triton": partial(quantized, scheme, multiply=in_triton) for scheme in QUANTIZED}
    made |= {"quantization": quantization, "_int_mm": int_mm}
    if "humming" in peers:
        if name in LAYER:
            made["W4A8 by humming"] = partial(quantized, "W4A8", kernel=humming, roundings=3)
        made |= {f"Humming W{bits}A8": partial(humming_layer, bits) for bits in (4, 8)}
    return made


def sixteen_bits(shape: tuple[int, int], dtype: torch.dtype) -> Callable[[torch.Tensor], Calls]:
    weights = copies_of(torch.randn(shape, dtype=dtype, device="cuda"))
    return lambda x: [partial(F.linear, x, w) for w in weights]


def packed(shape: tuple[int, int], dtype: torch.dtype, dense: bool = False) -> Callable[[torch.Tensor], Calls]:
    weights = weight_only(shape, dtype)
    if dense:
        return lambda x: [lambda w=w: F.linear(x, cuda.dense(w)) for w in weights]  # type: ignore[misc]
    return lambda x: [partial(cuda.linear, x, w, None) for w in weights]


def quantized(
    scheme: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    kernel: Any = int8,
    roundings: int = 1,
    multiply: Callable[..., torch.Tensor] | None = None,
) -> Callable[[torch.Tensor], Calls]:
    """The whole linear, quantization included. The calls raise ValueError where a product is wrong."""
    q, weight = random_weight(SCHEMES[scheme], shape, dtype, kernel)
    weights = [with_words(weight, words) for words in copies_of(weight.words)]
    linear = multiply or kernel.linear

    def calls(x: torch.Tensor) -> Calls:
        bad = wrong(linear(x, weights[0], None), x, q, roundings)
        if bad:
            raise ValueError(f"{bad} products are wrong")
        return [partial(linear, x, w, None) for w in weights]

    return calls


def in_triton(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``int8.linear`` without the kernel of prompts."""
    y = x.new_empty(len(x), weight.shape[0])
    int8.products(x, weight, bias, y, int8.tiles_for(len(x), int8.has_nibbles(weight.scheme), x.device))
    return y


def as_prompt(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``int8.linear`` with the kernel of prompts, however few the rows."""
    y = x.new_empty(len(x), weight.shape[0])
    int8.prompt_products(x, weight, bias, y)
    return y


def quantization(shape: tuple[int, int], dtype: torch.dtype) -> Callable[[torch.Tensor], Calls]:
    """What W8A8 does first."""
    from mbq.kernels import int8_source as source

    _, weight = random_weight(SCHEMES["W8A8"], (shape[0], shape[1]), dtype)

    def calls(x: torch.Tensor) -> Calls:
        quantize = prompt_int8.quantize if prompt_int8.takes(x, weight, None) else source.quantize
        return [partial(quantize, each, 8) for each in copies_of(x)]

    return calls


def int_mm(shape: tuple[int, int], dtype: torch.dtype) -> Callable[[torch.Tensor], Calls]:
    """cuBLAS's int8 products, neither quantized before nor scaled after."""
    weights = copies_of(torch.randint(-128, 128, shape, dtype=torch.int8, device="cuda"))

    def calls(x: torch.Tensor) -> Calls:
        codes = torch.randint(-128, 128, x.shape, dtype=torch.int8, device="cuda")
        return [partial(torch._int_mm, codes, w.T) for w in weights]

    return calls


def weight_only(shape: tuple[int, int], dtype: torch.dtype) -> list[PackedWeight]:
    """Prepared W3A16 weights, one and copies of it. Raises MBQError where their products are wrong."""
    device, scheme = torch.device("cuda", 0), SCHEMES[WEIGHT_ONLY]
    packed = bench.random_weight(scheme, shape, dtype, device)
    weight = cuda.prepare(packed)
    contender = bench.Contender(WEIGHT_ONLY, cuda.prepare, lambda x, w: cuda.linear(x, w, None))
    bench.check(contender, packed, weight, (cuda.PROMPT_ROWS, cuda.PACKED_ROWS + 1, 2048), dtype)
    return [with_words(weight, words) for words in copies_of(weight.words)]


def takeover(dtype: torch.dtype) -> list[dict[str, Any]]:
    """Microseconds of a layer's four linears at W3A16, as for few rows and as for prompts, and in 16 bits."""
    found: list[dict[str, Any]] = [
        {"rows": rows, "packed": 0.0, "prompt": 0.0, "16 bit": 0.0} for rows in TAKEOVER_ROWS
    ]
    for shape in LAYER.values():
        weights = weight_only(shape, dtype)
        sixteen = copies_of(torch.randn(shape, dtype=dtype, device="cuda"))
        for row in found:
            x = torch.randn(row["rows"], shape[1], dtype=dtype, device="cuda")
            row["packed"] += with_packed_rows(TAKEOVER_ROWS[-1], x, weights)
            row["prompt"] += with_packed_rows(0, x, weights)
            row["16 bit"] += each([lambda w=w, x=x: F.linear(x, w) for w in sixteen])  # type: ignore[misc]
    return found


def with_each(multiply: Callable[..., torch.Tensor], x: torch.Tensor, weights: list[PackedWeight]) -> None:
    for weight in weights:
        multiply(x, weight)


def int8_takeover(dtype: torch.dtype) -> list[dict[str, Any]]:
    """Microseconds of a layer's four linears at W4A8 and W8A8, in Triton and as a prompt."""
    found: list[dict[str, Any]] = [{"rows": rows} for rows in INT8_TAKEOVER_ROWS]
    for shape, scheme in itertools.product(LAYER.values(), QUANTIZED):
        _, weight = random_weight(SCHEMES[scheme], shape, dtype)
        weights = [with_words(weight, words) for words in copies_of(weight.words)]
        for row in found:
            x = torch.randn(row["rows"], shape[1], dtype=dtype, device="cuda")
            runs = {
                f"{scheme} in Triton": partial(with_each, in_triton, x, weights),
                f"{scheme} as a prompt": partial(with_each, as_prompt, x, weights),
            }
            for way, took in bench.in_turns(runs).items():
                row[way] = row.get(way, 0.0) + took / len(weights)
    return found


def with_packed_rows(most: int, x: torch.Tensor, weights: list[PackedWeight]) -> float:
    """Microseconds, where packed words are read for up to ``most`` rows."""
    usual = cuda.PROMPT_ROWS, cuda.PACKED_ROWS
    cuda.PROMPT_ROWS = cuda.PACKED_ROWS = most
    try:
        return each([lambda w=w: cuda.linear(x, w, None) for w in weights])  # type: ignore[misc]
    finally:
        cuda.PROMPT_ROWS, cuda.PACKED_ROWS = usual


def humming_layer(bits: int, shape: tuple[int, int], dtype: torch.dtype) -> Callable[[torch.Tensor], Calls]:
    """humming-kernels' linear, quantization of activations included, found to be near the dense product; one copy."""
    from humming.layer import HummingLayer

    layer = HummingLayer(
        shape_n=shape[0],
        shape_k=shape[1],
        weight_config={"dtype": f"int{bits}"},
        input_config={"dtype": "int8"},
        torch_dtype=dtype,
    ).cuda()
    weight = torch.randn(shape, dtype=dtype, device="cuda") * 0.02
    layer.load_from_unquantized(weight)
    layer.transform()
    x = torch.randn(64, shape[1], dtype=dtype, device="cuda")
    expected = F.linear(x, weight).float()
    distance = (layer(x).float() - expected).norm() / expected.norm()
    if not distance < (0.2 if bits == 4 else 0.05):
        raise ValueError(f"it is {distance:.2f} away from the dense product")
    return lambda x: [partial(layer, x)]


def table(found: list[dict[str, Any]]) -> list[str]:
    """A line a number of rows and shape, and the layer's sum with ratios to 16 bit."""
    ways = list(dict.fromkeys(row["way"] for row in found))
    times = {(row["way"], row["shape"], row["rows"]): row["microseconds"] for row in found}
    lines = ["microseconds".ljust(24) + "".join(way.rjust(16) for way in ways)]
    for rows in sorted({row["rows"] for row in found} - {0}):
        for shape in SHAPES:
            cells = "".join(f"{times.get((way, shape, rows), float('nan')):16.1f}" for way in ways)
            lines.append(f"M={rows} {shape}".ljust(24) + cells)
        sums = {way: sum(times.get((way, shape, rows), float("nan")) for shape in LAYER) for way in ways}
        lines.append(f"M={rows} layer".ljust(24) + "".join(f"{sums[way]:16.1f}" for way in ways))
        dense = sums.get("16 bit", float("nan"))
        lines.append(f"M={rows} 16 bit / it".ljust(24) + "".join(f"{dense / sums[way]:16.2f}" for way in ways))
    return lines


def command_of(args: argparse.Namespace) -> str:
    """What to type to measure it again."""
    peers = f" --peers {' '.join(args.peers)}" if args.peers else ""
    rows = f" --rows {' '.join(map(str, args.rows))}" if tuple(args.rows) != ROWS else ""
    return f"python -m benchmarks.prefill{' --tune' if args.tune else ''} --dtype {args.dtype}{rows}{peers}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="time the candidates instead of the comparison")
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--patience", type=float, default=90, help="seconds until a candidate counts as hung")
    parser.add_argument("--peers", nargs="*", default=[], choices=["humming"])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("It measures a GPU, and torch sees none.")
    dtype = getattr(torch, args.dtype)

    more: dict[str, Any] = {}

    def save(found: list[dict[str, Any]]) -> None:
        if args.output is None:
            return
        report: dict[str, Any] = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "dtype": args.dtype,
            "command": command_of(args),
        }
        report["tune" if args.tune else "runs"] = found
        report.update(more)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n")

    if args.tune:
        from benchmarks.prefill_tuning import tune  # which imports this file

        save(tune(args, dtype, save))
    else:
        found = measure(args, dtype)
        save(found)
        print("\n".join(table(found)))
        more["takeover"] = takeover(dtype)
        save(found)
        if torch.cuda.get_device_capability() == (9, 0):
            more["int8_takeover"] = int8_takeover(dtype)
            save(found)
        for row in [*more["takeover"], *more.get("int8_takeover", [])]:
            print("  ".join(f"{name} {value:.0f}" for name, value in row.items()))


if __name__ == "__main__":
    main()
