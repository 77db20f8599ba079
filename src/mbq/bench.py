"""How fast the packed linears of a decoder run on this GPU: ``mbq bench``.

Three times stand side by side, from one run: a kernel's, cuBLAS's on 16-bit weights, and that of a kernel that only
reads the packed bytes (``kernels/read.cu``), which no kernel can beat. Each is the median of replays of a CUDA graph.
No weight is used again before others, more than the L2 holds, have passed: a shape goes round many copies of its
weight, and "stack" is all layers of the model, every linear with a weight of its own.

A contender is checked against the dense product before it is timed; one that is wrong or fails is reported, not timed.
"""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mbq.bench_report import CUBLAS, DENSE, READING, STACK, Decoder, Failure, Report, Time
from mbq.errors import MBQError
from mbq.kernels import KERNELS, choose, compiled, reference
from mbq.kernels.operator import linear
from mbq.kernels.packed import PackedWeight, is_packed, unpack_weight
from mbq.loading import read_config, transformers_config
from mbq.progress import Progress, silent
from mbq.qtensor import dequantize
from mbq.scheme import Scheme, scheme_named

REPEATS = 15  # timings, of which the median is taken
REPLAYS = 5  # of the graph in a timing, one after the other, so that starting a graph is not what is measured
POOL_BYTES = 4 * 2**30  # what the read ceiling is measured on
L2_TIMES = 4  # the copies of a weight are this many times the L2 at least
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2}  # of a kernel here, |y - dense| / |dense|


QWEN2_7B = Decoder({"qkv": (4608, 3584), "o": (3584, 3584), "gate_up": (37888, 3584), "down": (3584, 18944)}, 28)


@dataclass(frozen=True)
class Contender:
    """A way to multiply by a quantized weight. Both functions may raise; the reason is reported.

    prepare    what ``multiply`` takes, made of a checkpoint's weight
    multiply   x [rows, inputs] and that, to [rows, outputs]
    tolerance  |y - dense| / |dense| at most; None: ``TOLERANCE`` of the dtype
    """

    name: str
    prepare: Callable[[PackedWeight], Any]
    multiply: Callable[[torch.Tensor, Any], torch.Tensor]
    tolerance: float | None = None


# ---- what is measured ------------------------------------------------------------------------------------------------


def decoder_of(config: Any) -> Decoder:
    """The linears of a transformers configuration's language model, q, k, v and gate, up joined.

    Raises MBQError where it has no attention and gated MLP of the usual names.
    """
    text = getattr(config, "llm_config", None) or config.get_text_config()
    try:
        hidden, heads, middle, layers = (
            getattr(text, name)
            for name in ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers")
        )
    except AttributeError as error:
        raise MBQError(
            f"The configuration has no decoder that mbq bench knows ({error}); leave --model out."
        ) from error
    head = getattr(text, "head_dim", None) or hidden // heads
    pairs = getattr(text, "num_key_value_heads", None) or heads
    shapes = {
        "qkv": ((heads + 2 * pairs) * head, hidden),
        "o": (hidden, heads * head),
        "gate_up": (2 * middle, hidden),
        "down": (hidden, middle),
    }
    return Decoder(shapes, layers)


def random_weight(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> PackedWeight:
    """Random codes, scales and zeros of ``shape`` [outputs, inputs] in the checkpoint's layout; the same every time.

    Raises MBQError where the inputs are no multiple of the group size.
    """
    (outputs, inputs), weights = shape, scheme.weights
    size = weights.group_size or inputs
    if inputs % size:
        raise MBQError(f"{inputs} inputs are no multiple of {scheme.name}'s groups of {size}; leave {scheme.name} out.")
    generator = torch.Generator(device).manual_seed(outputs + inputs)

    def words(rows: int, columns: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, (rows, columns), generator=generator, device=device, dtype=torch.int32)

    scale = torch.rand(outputs, inputs // size, generator=generator, device=device).add_(0.5).div_(math.sqrt(inputs))
    scale = scale.to(dtype)
    if not is_packed(scheme):
        codes = torch.randint(-128, 128, shape, generator=generator, device=device, dtype=torch.int8)
        return PackedWeight(codes, scale, None, shape, scheme)
    zero_point = None if weights.symmetric else words(-(-outputs * weights.bits // 32), inputs // size)
    return PackedWeight(words(outputs, -(-inputs * weights.bits // 32)), scale, zero_point, shape, scheme)


def bytes_of(prepared: Any) -> int:
    """Of the tensors in what ``Contender.prepare`` made: a tensor, a dataclass, or a tuple or list of such."""
    if isinstance(prepared, torch.Tensor):
        return prepared.nbytes
    return sum(bytes_of(part) for part in _parts(prepared).values())


def copy_of(prepared: Any) -> Any:
    """The same with tensors of its own; what is no tensor is shared."""
    if isinstance(prepared, torch.Tensor):
        return prepared.clone()
    parts = {name: copy_of(part) for name, part in _parts(prepared).items()}
    if is_dataclass(prepared) and not isinstance(prepared, type):
        return replace(prepared, **parts)
    return type(prepared)(parts.values()) if isinstance(prepared, list | tuple) else prepared


def _parts(prepared: Any) -> dict[str, Any]:
    if is_dataclass(prepared):
        return {each.name: getattr(prepared, each.name) for each in fields(prepared)}
    return {str(i): part for i, part in enumerate(prepared)} if isinstance(prepared, list | tuple) else {}


def expected(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """The product in float32 of the dequantized weight, which is not rounded to 16 bits."""
    return reference.linear(x.float(), replace(weight, scale=weight.scale.float()), None)


def relative_error(y: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((y.double() - wanted.double()).norm() / wanted.double().norm())


# ---- contenders ------------------------------------------------------------------------------------------------------


def ours(kernel: str, decoder: Decoder, scheme: Scheme, dtype: torch.dtype, device: torch.device) -> Contender:
    """mbq's own product through the operator, by the kernel that ``kernel`` ("auto" or a name) stands for.

    Raises MBQError where the named kernel does not support a shape.
    """
    names = {shape: choose(kernel, scheme, shape, device, dtype) for shape in decoder.shapes.values()}

    def prepare(weight: PackedWeight) -> tuple[str, PackedWeight]:
        name = names[weight.shape]
        return name, KERNELS[name].prepare(weight)

    def multiply(x: torch.Tensor, prepared: tuple[str, PackedWeight]) -> torch.Tensor:
        return linear(x, prepared[1], None, prepared[0])

    return Contender(" and ".join(dict.fromkeys(names.values())), prepare, multiply)


def cublas() -> Contender:
    """16-bit weights, of the scales' dtype: the weight is rounded to it, so the tolerance is wider."""
    return Contender(CUBLAS, lambda weight: dequantize(unpack_weight(weight)), F.linear, 2e-2)


class Reader:
    """``kernels/read.cu`` on one device. Raises compiled.CompilationError where it cannot be compiled."""

    threads, vectors, blocks_a_processor = 256, 4, (4, 8)

    def __init__(self, device: torch.device) -> None:
        major, minor = torch.cuda.get_device_capability(device)
        source = resources.files("mbq.kernels").joinpath("read.cu").read_text()
        options = (("THREADS", self.threads), ("VECTORS", self.vectors))
        library = compiled.library(source, "read.cu", 10 * major + minor, options)
        self.function = compiled.Function(library, "read")
        self.early = major >= 9
        self.device = torch.device("cuda", device.index if device.index is not None else torch.cuda.current_device())
        self.processors = torch.cuda.get_device_properties(device).multi_processor_count
        self.sums = torch.empty(max(self.blocks_a_processor) * self.processors, dtype=torch.int32, device=device)

    def read(self, data: torch.Tensor, blocks_a_processor: int) -> torch.Tensor:
        """Read ``data``, a multiple of 16 bytes. Returns int32 sums, one a block, of its 32-bit words."""
        blocks = blocks_a_processor * self.processors
        arguments = (
            ctypes.c_void_p(data.data_ptr()),
            ctypes.c_longlong(data.nbytes // 16),
            ctypes.c_void_p(self.sums.data_ptr()),
        )
        self.function.launch(self.device, blocks, self.threads, arguments, early=self.early)
        return self.sums[:blocks]

    def microseconds(self, parts: Sequence[torch.Tensor]) -> float:
        """What reading ``parts``, a launch each, takes at the best number of blocks."""
        return min(microseconds(partial(self.read_all, parts, each)) for each in self.blocks_a_processor)

    def read_all(self, parts: Sequence[torch.Tensor], blocks_a_processor: int) -> None:
        for part in parts:
            self.read(part, blocks_a_processor)


# ---- time ------------------------------------------------------------------------------------------------------------


def microseconds(run: Callable[[], Any]) -> float:
    """What ``run`` takes as a CUDA graph: the median of ``REPEATS`` timings of ``REPLAYS`` replays each."""
    return in_turns({"": run})[""]


def in_turns(runs: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """``microseconds`` of each, timed in turns: at its power limit a GPU is slower the longer it has been busy."""
    graphs = {name: _recorded(run) for name, run in runs.items()}
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(REPEATS + 1):
        for name, graph in graphs.items():
            start.record()
            for _ in range(REPLAYS):
                graph.replay()
            end.record()
            end.synchronize()
            if turn:  # the first one warms up
                found[name].append(1e3 * start.elapsed_time(end) / REPLAYS)
    return {name: statistics.median(times) for name, times in found.items()}


def _recorded(run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        run()  # compiles, tunes and allocates what a capture must not
        torch.cuda.synchronize()
        graph.capture_begin()  # torch.cuda.graph would collect garbage first, which takes longer than the measurement
        try:
            run()
        finally:
            graph.capture_end()
    return graph


def measure(
    contender: Contender,
    scheme: Scheme,
    decoder: Decoder,
    rows: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    label: str = "",
) -> list[Time]:
    """Check the contender, then time each shape and the stack at each number of ``rows``.

    ``label`` stands for the scheme in the times. Raises MBQError where a product is wrong, and whatever the contender
    raises.
    """
    made: dict[str, list[Any]] = {}
    errors = dict.fromkeys(rows, 0.0)
    for name, shape in decoder.shapes.items():
        weight = random_weight(scheme, shape, dtype, device)
        first = contender.prepare(weight)
        for count, error in check(contender, weight, first, rows, dtype).items():
            errors[count] = max(errors[count], error)
        others = max(decoder.layers, copies_beyond_cache(bytes_of(first), device)) - 1
        made[name] = [first, *(copy_of(first) for _ in range(others))]
    sizes = {name: bytes_of(copies[0]) for name, copies in made.items()}

    def multiply(x: Mapping[str, torch.Tensor], products: Sequence[tuple[str, int]]) -> None:
        for name, copy_number in products:
            contender.multiply(x[name], made[name][copy_number])

    times = []
    for count in rows:
        x = {name: torch.randn(count, shape[1], device=device).to(dtype) for name, shape in decoder.shapes.items()}
        description = (contender.name, label or scheme.name, dtype_name(dtype), count)
        for name, copies in made.items():
            took = microseconds(partial(multiply, x, [(name, number) for number in range(len(copies))]))
            times.append(Time(*description, name, took / len(copies), sizes[name], errors[count]))
        took = microseconds(partial(multiply, x, [(name, layer) for layer in range(decoder.layers) for name in made]))
        times.append(Time(*description, STACK, took, decoder.layers * sum(sizes.values()), errors[count]))
    return times


def check(
    contender: Contender, weight: PackedWeight, prepared: Any, rows: Sequence[int], dtype: torch.dtype
) -> dict[int, float]:
    """rows -> relative error of one product. Raises MBQError where it is beyond the tolerance."""
    x = torch.randn(max(rows), weight.shape[1], device=weight.scale.device).to(dtype)
    wanted = expected(x, weight)
    tolerance = contender.tolerance or TOLERANCE[dtype]
    found = {}
    for count in rows:
        found[count] = relative_error(contender.multiply(x[:count], prepared), wanted[:count])
        if not found[count] <= tolerance:  # NaN is beyond it, too
            outputs, inputs = weight.shape
            raise MBQError(f"wrong at {outputs} x {inputs}, {count} rows: a relative error of {found[count]:.2g}")
    return found


def copies_beyond_cache(size: int, device: torch.device) -> int:
    """How many weights of ``size`` bytes are enough that the first has left the L2 when its turn comes again."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return -(-L2_TIMES * cache // size)


def times_of_reading(
    reader: Reader, pool: torch.Tensor, decoder: Decoder, scheme: str, dtype: torch.dtype, sizes: Mapping[str, int]
) -> list[Time]:
    """The floor: reading ``sizes`` [name -> bytes of a weight] out of ``pool``, each shape and the stack."""

    def parts(wanted: Iterable[int]) -> list[torch.Tensor]:
        """Slices of the pool, one after the other, from its start again when it ends."""
        found, at = [], 0
        for size in wanted:
            at = at if at + size + 16 <= pool.nbytes else 0
            found.append(pool[at : at + -(-size // 16) * 16])
            at += -(-size // 128) * 128
        return found

    times = []
    for name, size in sizes.items():
        each = parts([size] * max(decoder.layers, copies_beyond_cache(size, pool.device)))
        took = reader.microseconds(each) / len(each)
        times.append(Time(READING, scheme, dtype_name(dtype), 0, name, took, size))
    took = reader.microseconds(parts(list(sizes.values()) * decoder.layers))
    total = decoder.layers * sum(sizes.values())
    return [*times, Time(READING, scheme, dtype_name(dtype), 0, STACK, took, total)]


def check_device() -> torch.device:
    """The current GPU. Raises MBQError where there is none."""
    if not torch.cuda.is_available():
        raise MBQError("mbq bench times kernels on a GPU, and torch sees none here; run it on a machine that has one.")
    return torch.device("cuda", torch.cuda.current_device())


class Bench:
    """A run, step by step; ``report`` holds what it has found so far. Raises MBQError where there is no GPU.

    ``command`` is what the report says it was measured by.
    """

    def __init__(self, decoder: Decoder, command: str) -> None:
        self.device = check_device()
        platform = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        software = f"torch {torch.__version__}, {platform}"
        self.report = Report(torch.cuda.get_device_name(self.device), software, command, decoder)
        self.reader: Reader | None = None
        self.pool = torch.empty(0, dtype=torch.uint8)

    def read_ceiling(self) -> None:
        """Time reading a few GB (or what fits), which also wakes the clocks."""
        size = min(POOL_BYTES, torch.cuda.mem_get_info(self.device)[0] // 8) // 16 * 16
        words = torch.randint(-(2**31), 2**31, (size // 4,), dtype=torch.int32, device=self.device)
        try:
            self.reader = Reader(self.device)
        except compiled.CompilationError as error:
            self.report.failures.append(Failure(READING, "", "", str(error)))
            return
        for blocks in self.reader.blocks_a_processor:
            difference = int(self.reader.read(words, blocks).sum(dtype=torch.int64)) - int(words.sum(dtype=torch.int64))
            if difference % 2**32:
                raise MBQError("The kernel that only reads has read other bytes; please report this GPU.")
        self.pool = words.view(torch.uint8)
        self.report.ceiling = size / self.reader.microseconds([self.pool]) / 1e3

    def dense(self, scheme: Scheme, rows: Sequence[int], dtype: torch.dtype) -> None:
        """cuBLAS, on the dense weights of any ``scheme``."""
        self.contend(cublas(), scheme, rows, dtype, DENSE)

    def own(self, kernel: str, scheme: Scheme, rows: Sequence[int], dtype: torch.dtype) -> None:
        """mbq's kernel, and reading the bytes it reads. Raises MBQError where the named kernel does not run here."""
        decoder = self.report.decoder
        contender = ours(kernel, decoder, scheme, dtype, self.device)
        self.contend(contender, scheme, rows, dtype)
        sizes = {
            name: found.bytes
            for name in decoder.shapes
            if (found := self.report.find(contender.name, scheme.name, dtype_name(dtype), rows[0], name))
        }
        if self.reader is not None and sizes:
            self.report.times += times_of_reading(self.reader, self.pool, decoder, scheme.name, dtype, sizes)

    def contend(
        self, contender: Contender, scheme: Scheme, rows: Sequence[int], dtype: torch.dtype, label: str = ""
    ) -> None:
        """Measure the contender; what it raises goes to the report, a full memory too."""
        try:
            self.report.times += measure(contender, scheme, self.report.decoder, rows, dtype, self.device, label)
        except Exception as error:  # whatever a peer raises: the others still run
            why = str(error) if isinstance(error, MBQError) else f"{type(error).__name__}: {_first_line(error)}"
            if isinstance(error, torch.OutOfMemoryError):
                why = "the GPU's memory is full; take fewer --layers"
            self.report.failures.append(Failure(contender.name, label or scheme.name, dtype_name(dtype), why))
            gc.collect()  # what the traceback held
        torch.cuda.empty_cache()


def bench(
    model: str | Path | None = None,
    schemes: Sequence[str] = ("W3A16", "W4A16"),
    rows: Sequence[int | str] = (1, 4, 16),
    dtype: str = "float16",
    layers: int | None = None,
    kernel: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Report:
    """Time cuBLAS and mbq's kernels on this GPU.

    model    a folder, or a name on the Hub, whose configuration gives the shapes; a Qwen2-7B backbone's
    schemes  of the packed weights
    rows     of x: 1 is a decode step of one sequence
    dtype    "float16" or "bfloat16", of x, scales and cuBLAS's weights
    layers   of the stack; the model's
    kernel   "auto" or a name of ``KERNELS``

    Raises MBQError where there is no GPU, for a wrong option, and where the named kernel does not run here.
    """
    device, target, counts = check_device(), dtype_named(dtype), row_counts(rows)
    wanted = [scheme_named(name) for name in schemes]
    decoder = QWEN2_7B if model is None else decoder_in(model, trust_remote_code)
    decoder = replace(decoder, layers=layers or decoder.layers)
    for scheme in wanted:  # an unsupported kernel is told before anything is measured
        ours(kernel, decoder, scheme, target, device)
    listed = f"--schemes {','.join(scheme.name for scheme in wanted)} --rows {','.join(map(str, counts))}"
    listed += "" if model is None else f" --model {Path(model).name}"
    run = Bench(decoder, f"mbq bench {listed} --dtype {dtype} --layers {decoder.layers} --kernel {kernel}")
    steps: list[tuple[str, Callable[[], None]]] = [
        ("the read ceiling", run.read_ceiling),
        (CUBLAS, partial(run.dense, wanted[0], counts, target)),
        *((scheme.name, partial(run.own, kernel, scheme, counts, target)) for scheme in wanted),
    ]
    for done, (what, step) in enumerate(steps):
        progress("bench", done, len(steps), what)
        step()
    progress("bench", len(steps), len(steps), "")
    return run.report


def decoder_in(model: str | Path, trust_remote_code: bool = False) -> Decoder:
    """``decoder_of`` the configuration in a folder or on the Hub. Raises MBQError as that does, and without one."""
    read_config(model)  # says in a sentence what is wrong with it
    config = transformers_config(model, trust_remote_code)
    return decoder_of(config)


# ---- words and tables ------------------------------------------------------------------------------------------------


def dtype_named(name: str) -> torch.dtype:
    """Raises MBQError for a name that is neither float16 nor bfloat16."""
    if name not in ("float16", "bfloat16"):
        raise MBQError(f"--dtype is {name}; mbq bench knows float16 and bfloat16.")
    return {"float16": torch.float16, "bfloat16": torch.bfloat16}[name]


def row_counts(rows: Sequence[int | str]) -> list[int]:
    """Raises MBQError for what is no positive number."""
    try:
        counts = [int(count) for count in rows]
    except ValueError as error:
        raise MBQError(f"--rows is {','.join(map(str, rows))}; give numbers, such as 1,4,16.") from error
    if not counts or min(counts) < 1:
        raise MBQError(f"--rows is {','.join(map(str, rows))}; give positive numbers, such as 1,4,16.")
    return counts


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
