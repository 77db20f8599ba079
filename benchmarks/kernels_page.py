"""docs/kernels.md from the stored measurements: nothing is measured here.

python -m benchmarks.kernels_page

benchmarks/results/kernels/*.json are runs of benchmarks/kernels.py with everything beside each other;
benchmarks/results/kernels/steps/*.json, in the order of their names, runs that measured one design step each;
benchmarks/results/prefill.json and decode_step.json what the scripts of these names wrote.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import kernels_sections as sections
from benchmarks.results_page import markdown
from mbq.bench_report import CUBLAS, DENSE, HEADER, READING, STACK, Report, Time, cells, duration, shape_name
from mbq.kernels import cuda, prompt_int8

ROOT = Path(__file__).parents[1]
STORED = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "kernels.md"
OURS = ("cuda", "triton", "reference")
STEP_ROWS = (1, 16)

HEAD = """# Kernels

Written by `python -m benchmarks.kernels_page` from the measurements in `benchmarks/results/`, each made by the command
above its tables. `mbq bench` measures the packed linears on your GPU.

- Shapes are the linears of a decoder layer, q, k, v and gate, up joined. "N layers" is a whole model's worth of them,
  every linear with a weight of its own: quote that one, since single shapes keep a few per cent in the L2.
- A time is the median of replays of a CUDA graph, in microseconds. Weights are used in turn, more of them than the L2
  holds.
- GB/s counts the bytes that hold the weight: codes, scales and zeros, as the contender keeps them. "Only reads" (and
  "read µs") is a kernel that reads these bytes and does nothing with them; "ceiling" is the share of what that kernel
  reads a second from memory much larger than the L2; "x cuBLAS" is how many times faster than cuBLAS on 16-bit weights.
- Each contender was checked against the dense product before it was timed. Marlin's weights are symmetric, without
  zeros; the others' are asymmetric. GemLite chooses among its kernels in the run, from shorter timings than by default.
"""

LAYOUT = """## What runs when

On an NVIDIA GPU from compute capability 7.5 on, weight-only schemes run in `kernels/decode.cu`, up to 16 rows of x a
launch. On Hopper (compute capability 9.0) more than {prompt_rows} rows run in `kernels/prompt.cu`, which unpacks
weights into the registers from which its tensor cores multiply; elsewhere, and where outputs are no multiple of 8, more
than {packed_rows} go through a dense weight in 16 bits, made anew in every call, and cuBLAS.
From compute capability 9.0 on, two blocks that form a cluster share the inputs of an x of more than 8 rows and {units}
inputs, which is more than an L1 holds.
Schemes with quantized activations run in Triton (`kernels/int8.py`): x is quantized a row, the products are int8,
their sums int32. On Hopper more than {int8_rows} rows of 16 bits are quantized in `kernels/quantize.cu` and
multiplied in `kernels/prompt_int8.cu`, to the same bits and from the same words, where outputs are a multiple of 8.
Other GPUs, float32 and other group sizes take a plain Triton kernel. With humming-kernels installed (`pip install
'mbq[humming]'`) `kernel="humming"` takes W4A8: faster than Triton in long prompts, slower in a decode step, so that
it is not chosen by itself. It is asked for sums that do not depend on the number of rows: otherwise its products of
few rows were further than three roundings from the exact ones.

Layers that read the same input (q, k, v; gate, up) are one call (`fuse.py`), and `mbq generate` replays its decode step
as a CUDA graph. Where `mbq.load` put a model on a GPU, decode steps over a static cache have the attention of
`kernels/attention.py`, and norms and the gates of MLPs are one kernel each (`kernels/elementwise.py`); what of these is
multiplied in 8 bits next is quantized as it is computed.

`make test` on a machine with a GPU tests all of this there, `python -m pytest -m gpu` only what needs one, and
`compute-sanitizer --report-api-errors no python -m pytest -m gpu tests/test_kernels.py tests/test_prompts.py
tests/test_prompt_int8.py` finds accesses out of bounds.

## The packed layout

What `prepare` makes of a checkpoint's words for the CUDA kernel (the docstring of `mbq/kernels/cuda.py`):

{layout}
"""

PROMPT_STEPS = """## What was tried for prompts

W3A16, bfloat16, 2,048 rows, one H200. What stands in one line was timed in turns, except for the second; cuBLAS
multiplies in 16 bits. A *stage* is 64 inputs of a tile of 128 outputs; the tensor cores need 4 cycles of it a row.

- One warpgroup unpacks into shared memory, two multiply from there. Predicted: 1,024 cycles a stage of 256 rows, since
  unpacking takes 150 of a warp. Measured: a layer 1,569 µs, cuBLAS 1,356. In gate_up a stage took 747 ns with 256 rows
  and 716 with 192: one warp's chain of loads, stores and fence sets the pace.
- Two warpgroups unpack. 512 threads leave 128 registers each, and the wgmma of 256 columns does not compile; with 192
  gate_up took 895 µs instead of 1,003.
- The weight stays in registers; lanes exchange 16-bit weights, by 16 shuffles and 48 selections a stage: a layer 1,462
  µs, cuBLAS 1,356.
- Unpacking between a stage's four wgmmas, so that a warp overlaps its own: gate_up 826 µs, and 867 where the compiler
  has to keep that order, instead of 820. Left out.
- The second warpgroup starts a unit later, so that one multiplies while the other writes: gate_up 814 µs instead of
  820.
- Codes change lanes instead of weights, four in a register, by 4 shuffles. Predicted: 110 instead of 136 instructions
  a stage. Measured: gate_up 791 µs instead of 810 (cuBLAS 754), o 78.0 instead of 84.2 (cuBLAS 78.9).
- The same through 16 bytes of shared memory a lane, without selections: gate_up 787 µs, o 77.6. This is the kernel.

From 64 to 80 rows of x the kernel overtakes launches of 16 rows: 236 µs a layer against 212, then 241 against 264.

What is left: gate_up takes 1,133 cycles a stage of 256 rows, ends of tiles included, at the 1.45 GHz that the power
limit leaves it. qkv, three rounds of tiles of 192 rows, is slower than through 16 bits. At 128 rows, where down is 14
pairs of tiles for 66 clusters, cuBLAS on 16-bit weights is 1.8 times faster: inputs would have to be divided.
"""

INT8_STEPS = """## What was tried for prompts with quantized activations

2,048 rows, bfloat16, one H200, a layer's four linears; products alone where nothing else is said. Each line was timed
in turns with cuBLAS in 16 bits, lines are of several runs, in which cuBLAS took 1,241 to 1,330 µs.

Counted first: 955 G operations, of which the tensor cores do 8,192 a cycle and multiprocessor. In tiles of 256, 192,
240 and 240 rows (gate_up, qkv, o, down), with their last rounds not full, that is 918,000 cycles: 519 µs at the 1.77
GHz that the GPU has at first, 612 at 1.5 GHz. With 6 % for ends of tiles at 1.5 GHz and 80 µs of quantization,
predicted for W4A8 was 729 µs. In Triton it took 847, quantization included, W8A8 821.

- The warpgroups, clusters and copy engine of `prompt.cu`, and the weight by loads of its lanes, two stages ahead,
  from the words as they lie for Triton. A lane's 16 bytes of a row fit wgmma only if x's codes are turned over in the
  same way. Measured: W4A8 644 µs, but W8A8 778, slower than Triton's products (741): a stage of gate_up took 918 ns
  instead of 750. Writing turned codes made quantization take 99 µs instead of 80. W4A8 in all 739, 1.68 times as fast
  as 16 bits.
- The weight comes by the copy engine too, swizzled, and ldmatrix hands lanes what wgmma wants: x's codes stay in
  order. Predicted: W8A8 as fast as W4A8. Measured: W4A8 653 µs, W8A8 659.
- Quantization in CUDA, a row in registers in 16 bits instead of 32, so that more rows share a multiprocessor. The
  bytes of down's x and codes take 28 µs. Predicted: 33 instead of 50. Measured: 33, and a layer 55 instead of 80. In
  all, W4A8 705 µs (1.77 times), W8A8 710 (1.76); the table above is of a longer run, on a warmer GPU.
- The second warpgroup starts three stages after the first instead of one, and shared memory that is left holds more
  of y. Predicted: of gate_up's 1,154 cycles a stage 130 are ends of tiles; half of these, 5 %. Measured: gate_up 397
  µs instead of 406 at W4A8, 387 instead of 399 at W8A8, the others unchanged. More room for y made `prompt.cu` slower
  (gate_up 754 instead of 738) and was left out there.

The rows from which it takes over were expected at several hundred; it is faster than Triton from 33 on.

What is left: the power limit. Not yet warm, a stage of gate_up takes 1,154 cycles at 1.78 GHz, 647 ns; in turns with
the others it takes 766. At 8,192 rows, loaded for longer, W4A8 is 1.51 times as fast as 16 bits and W8A8 1.57. down
and o fill 90 % of their last rounds. Tiles divided along the inputs, as in Triton, are not there.
"""

STEPS = """## What each step of the design brought

The stack of W3A16, float16, in microseconds; beside it what was expected at one row before it was measured, where a
number was written down. A step's kernel is `src/mbq/kernels/` of the commit in brackets, without one today's.

{steps}
"""

# Measured before these kernels were written: one H200, one run each, microseconds, one row of x.
QUOTED_SHAPES = ("qkv", "o", "gate_up", "down", STACK)
QUOTED: tuple[tuple[str, tuple[float | None, ...]], ...] = (
    ("cuBLAS, 16 bits", (10.8, 11.7, 70.5, 39.8, 3719)),
    ("W3: Humming (what vLLM runs for W3A16)", (10.2, 11.2, 34.9, 22.0, 2145)),
    ("W3: vLLM's GPTQ (exllama) kernel", (6.6, 6.8, 22.5, 14.4, 1338)),
    ("W3: any-precision bit planes", (7.6, 6.2, 39.1, 22.1, None)),
    ("W3: FLUTE", (11.5, 10.4, 44.2, 27.4, None)),
    ("W3: llama.cpp Q3_K (activation quantization in the 28 layers)", (11.0, 9.3, 77.8, 32.8, 3816)),
    ("W4: Marlin", (10.5, 11.2, 31.3, 23.3, 2048)),
    ("W4: GemLite", (8.0, 7.1, 41.2, 23.3, 2341)),
    ("W4: vLLM's GPTQ (exllama) kernel", (None, None, None, None, 1775)),
    ("W4: Humming", (None, None, None, None, 2155)),
)


@dataclass(frozen=True)
class Goal:
    """The bars that were set, in microseconds on an H200, of one scheme, number of rows and shape."""

    scheme: str
    rows: int
    shape: str
    bar: float
    stretch: float


GOALS = (
    Goal("W3A16", 1, "qkv", 4.5, 3.7),
    Goal("W3A16", 1, "o", 3.4, 2.8),
    Goal("W3A16", 1, "gate_up", 18, 16),
    Goal("W3A16", 1, "down", 11, 9),
    Goal("W3A16", 1, STACK, 1050, 850),
    Goal("W3A16", 4, STACK, 1100, 900),
    Goal("W3A16", 16, STACK, 1500, 1150),
    Goal("W4A16", 1, STACK, 1400, 1100),
    Goal("W4A16", 16, STACK, 1700, 1300),
)


def page(stored: Path) -> str:
    """The page of the runs in ``stored``."""
    runs = [Report.from_json(read(path)) for path in sorted((stored / "kernels").glob("*.json"))]
    steps = [read(path) for path in sorted((stored / "kernels" / "steps").glob("*.json"))]
    parts = [HEAD]
    for run in runs:
        parts += [_run(run), _goals(run)]
    if not runs:
        parts.append("No run is stored here yet.\n")
    parts += [_quoted()]
    stored_sections = (
        ("prefill", sections.prompt),
        ("prefill-humming", sections.prompt_with_humming),
        ("decode_step", sections.step),
    )
    for name, section in stored_sections:
        path = stored / f"{name}.json"
        if path.exists():
            parts.append(section(read(path)))
    parts += [
        LAYOUT.format(
            layout=layout(),
            prompt_rows=cuda.PROMPT_ROWS,
            int8_rows=prompt_int8.PROMPT_ROWS,
            packed_rows=cuda.PACKED_ROWS,
            units=cuda.SPLIT_UNITS * cuda.UNIT,
        ),
        PROMPT_STEPS,
        INT8_STEPS,
        STEPS.format(steps=_steps(steps)),
    ]
    return "\n".join(parts).rstrip() + "\n"


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def layout() -> str:
    """The drawing in the docstring of the CUDA kernel, without the sentence that heads it."""
    return inspect.cleandoc(cuda.__doc__ or "").split("\n\n", 1)[1]


def kinds(times: Sequence[Time], name: str) -> list[Any]:
    """The different values of a field, in the order of the times."""
    return list(dict.fromkeys(getattr(time, name) for time in times))


def _run(run: Report) -> str:
    ceiling = f" It reads {run.ceiling:,.0f} GB/s." if run.ceiling else ""
    lines = [f"## {run.device}\n", f"`{run.command}`, {run.software}.{ceiling}\n"]
    measured = [time for time in run.times if time.by not in (CUBLAS, READING)]
    for scheme in kinds(measured, "scheme"):
        for dtype in kinds([time for time in measured if time.scheme == scheme], "dtype"):
            lines += [f"### {scheme}, {dtype}\n", _summary(run, scheme, dtype), ""]
            lines += [_detail(run, scheme, dtype), ""]
    if run.failures:
        lines.append("Not measured:\n")
        lines += [
            f"- {' '.join(filter(None, (each.by, each.scheme, each.dtype)))}: {each.why}" for each in run.failures
        ]
        lines.append("")
    lines.append(_against_peers(run))
    return "\n".join(lines)


def _summary(run: Report, scheme: str, dtype: str) -> str:
    """Everybody beside each other: a row a contender and number of rows, a column a shape."""
    shapes = [*run.decoder.shapes, STACK]
    rows = []
    counts = kinds([time for time in run.times if time.scheme == scheme and time.dtype == dtype and time.rows], "rows")
    for count in counts:
        for by, told in [(CUBLAS, DENSE), *((name, scheme) for name in _contenders(run, scheme, dtype, count))]:
            found = [run.find(by, told, dtype, count, shape) for shape in shapes]
            if any(found):
                rows.append([str(count), by, *(duration(time.microseconds) if time else "" for time in found)])
    reading = [run.find(READING, scheme, dtype, 0, shape) for shape in shapes]
    if any(reading):
        rows.append(["", READING, *(duration(time.microseconds) if time else "" for time in reading)])
    return markdown(["rows of x", "µs", *(shape_name(run.decoder, shape) for shape in shapes)], rows)


def _contenders(run: Report, scheme: str, dtype: str, rows: int) -> list[str]:
    """The fastest stack first."""
    stacks = [t for t in run.times if (t.scheme, t.dtype, t.rows, t.shape) == (scheme, dtype, rows, STACK)]
    return [time.by for time in sorted(stacks, key=lambda time: time.microseconds)]


def _detail(run: Report, scheme: str, dtype: str) -> str:
    """mbq's own kernels by shape, as ``mbq bench`` prints them."""
    rows = [
        [str(time.rows), time.by, shape_name(run.decoder, time.shape), *cells(run, time)]
        for time in run.times
        if time.scheme == scheme and time.dtype == dtype and is_own(time.by)
    ]
    return markdown(["rows of x", "by", "shape", *HEADER], rows)


def is_own(by: str) -> bool:
    return set(by.split(" and ")) <= set(OURS)


def _goals(run: Report) -> str:
    """The bars, where the run is on the GPU and the shapes that they are meant for."""
    dtypes = kinds(run.times, "dtype")
    rows = []
    for goal in GOALS:
        found = [_own(run, goal, dtype) for dtype in dtypes]
        if any(found):
            cells = [f"{_exactly(time.microseconds)}{_verdict(time, goal)}" if time else "" for time in found]
            shape = shape_name(run.decoder, goal.shape)
            rows.append([goal.scheme, str(goal.rows), shape, duration(goal.bar), duration(goal.stretch), *cells])
    if "H200" not in run.device or not rows:
        return ""
    return (
        f"### Against the bars\n\n{markdown(['scheme', 'rows of x', 'shape', 'bar, µs', 'stretch', *dtypes], rows)}\n"
    )


def _own(run: Report, goal: Goal, dtype: str) -> Time | None:
    wanted = (goal.scheme, dtype, goal.rows, goal.shape)
    found = [t for t in run.times if is_own(t.by) and (t.scheme, t.dtype, t.rows, t.shape) == wanted]
    return min(found, key=lambda time: time.microseconds, default=None)


def _exactly(microseconds: float) -> str:
    return f"{microseconds:.2f}" if microseconds < 10 else duration(microseconds)


def _verdict(time: Time, goal: Goal) -> str:
    if time.microseconds <= goal.stretch:
        return " (stretch)"
    return "" if time.microseconds <= goal.bar else " (missed)"


def _against_peers(run: Report) -> str:
    """A sentence for every peer's stack: by how much mbq's fastest kernel is ahead."""
    lines = []
    for time in run.times:
        if time.shape != STACK or time.by in (CUBLAS, READING) or is_own(time.by):
            continue
        own = _own(run, Goal(time.scheme, time.rows, STACK, 0, 0), time.dtype)
        if own is not None:
            lines.append(
                f"- {time.scheme}, {time.dtype}, {time.rows} row{'s' * (time.rows > 1)}, {run.decoder.layers} layers: "
                f"{own.by} takes {duration(own.microseconds)} µs, {time.by} {duration(time.microseconds)}: "
                f"{time.microseconds / own.microseconds:.2f}x."
            )
    return "\n".join([*lines, ""]) if lines else ""


def _quoted() -> str:
    header = ["as quoted, another run; one row of x, µs", *(s if s != STACK else "28 layers" for s in QUOTED_SHAPES)]
    rows = [[name, *("" if value is None else duration(value) for value in values)] for name, values in QUOTED]
    return (
        "## Other kernels, as quoted\n\nMeasured before these kernels were written: one H200, one run each, reproduced "
        f"by nothing here.\n\n{markdown(header, rows)}\n"
    )


def _steps(steps: Sequence[dict[str, Any]]) -> str:
    """A row a step: the stack of W3A16, in the dtype that was measured first."""
    rows = []
    for step in steps:
        run = Report.from_json(step)
        measured = []
        for count in STEP_ROWS:
            own = [t for t in run.times if is_own(t.by) and (t.scheme, t.rows, t.shape) == ("W3A16", count, STACK)]
            measured.append(duration(own[0].microseconds) if own else "")
        predicted = duration(step["predicted"]) if step.get("predicted") else ""
        rows.append([step["step"], predicted, *measured])
    header = ["step", "predicted, 1 row", *(f"measured, {count} row{'s' * (count > 1)}" for count in STEP_ROWS)]
    return markdown(header, rows) if rows else "No run is stored here yet."


def main() -> None:
    PAGE.write_text(page(STORED), encoding="utf-8")
    print(f"Wrote {PAGE.relative_to(ROOT)}.")


if __name__ == "__main__":
    main()
