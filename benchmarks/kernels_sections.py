"""The sections of docs/kernels.md about prompts and decode steps, of what prefill.py and decode_step.py wrote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.results_page import markdown
from mbq.bench import QWEN2_7B
from mbq.bench_report import duration

LAYER = tuple(QWEN2_7B.shapes)
# How many times faster than 16 bits: the bar and the stretch, on an H200. Prompts of 2,048 tokens, and a decode step.
PROMPT_ROWS = 2048
PROMPT_GOALS = {"W3A16": (0.95, 1.0), "W4A8": (1.5, 1.75), "W8A8": (1.3, 1.75)}
STEP_GOAL = (2.3, 3.2)
FAMILIES = {"llava_onevision": "LLaVA-OneVision-7B", "qwen2_vl": "Qwen2-VL-7B"}

PROMPT = """µs of a layer's four linears over many rows of x at once, and how many times faster than 16 bits that is.
W3A16 unpacks its weight as it multiplies; "through 16 bits" makes it a 16-bit weight in every call, for cuBLAS. W4A8
and W8A8 quantize x in the call; "quantization" is that part by itself. "In Triton" is what runs on other GPUs.
`_int_mm` is cuBLAS's int8 product without it. Humming is timed on one copy of a weight, which may stay in the L2.
"""

EARLIER = """An earlier run, with Humming. It timed one way after the other, and the GPU's power limit slows whoever is
late, so that its ratios are not comparable with those above; W3A16 still made a 16-bit weight in every call.
"""

STEP = """One token through the language model, random weights, bf16 activations, a static cache, as one CUDA graph:
recorded from transformers' code as it is, or from what torch.compile makes of it. The ratio is the time of bf16 with
transformers' own attention (sdpa) over the row's. Tokens a second are those of `generate`, prompt included. "Without
linears" launches none, lm_head included.
"""


def verdict(ratio: float, bar: float, stretch: float) -> str:
    return f"{ratio:.2f}x" + (" (stretch)" if ratio >= stretch else "" if ratio >= bar else " (missed)")


# ---- prompts ---------------------------------------------------------------------------------------------------------


def prompt(report: dict[str, Any]) -> str:
    """``report`` is what ``benchmarks.prefill --output`` wrote."""
    times = {(run["way"], run["shape"], run["rows"]): run["microseconds"] for run in report["runs"]}
    ways = [way for way in dict.fromkeys(run["way"] for run in report["runs"]) if (way, "qkv", PROMPT_ROWS) in times]
    counts = sorted({rows for _, _, rows in times if rows})
    lines = [
        "## A prompt\n",
        f"`{report['command']}` on {report['device']}, torch {report['torch']}, {report['dtype']}.\n",
        PROMPT,
        markdown(["rows of x", *ways], [_layer_row(times, ways, rows) for rows in counts]),
        f"\nBy shape, {PROMPT_ROWS:,} rows:\n",
        markdown(["µs", *ways], _shape_rows(times, ways)),
        "",
    ]
    if "H200" in report["device"]:
        lines += ["Against the bars:\n", _prompt_goals(times), ""]
    lines += [_dense(times), _takeover(report.get("takeover", [])), _int8_takeover(report.get("int8_takeover", []))]
    return "\n".join(lines)


def prompt_with_humming(report: dict[str, Any]) -> str:
    """``report`` is what an earlier ``benchmarks.prefill --peers humming --output`` wrote."""
    times = {(run["way"], run["shape"], run["rows"]): run["microseconds"] for run in report["runs"]}
    ways = [way for way in dict.fromkeys(run["way"] for run in report["runs"]) if (way, "qkv", PROMPT_ROWS) in times]
    counts = sorted({rows for _, _, rows in times if rows})
    made = f"`{report['command']}` at commit 854561c on {report['device']}, torch {report['torch']}.\n"
    return "\n".join([EARLIER, made, markdown(["rows of x", *ways], [_layer_row(times, ways, n) for n in counts]), ""])


def _layer(times: dict[Any, float], way: str, rows: int) -> float | None:
    found = [times.get((way, shape, rows)) for shape in LAYER]
    return None if None in found else sum(each for each in found if each is not None)


def _layer_row(times: dict[Any, float], ways: Sequence[str], rows: int) -> list[str]:
    dense, cells = _layer(times, "16 bit", rows), []
    for way in ways:
        own = _layer(times, way, rows)
        ratio = f" ({dense / own:.2f}x)" if own and dense and way not in ("16 bit", "quantization") else ""
        cells.append(f"{duration(own)}{ratio}" if own else "")
    return [f"{rows:,}", *cells]


def _shape_rows(times: dict[Any, float], ways: Sequence[str]) -> list[list[str]]:
    shapes = dict.fromkeys(shape for _, shape, rows in times if rows == PROMPT_ROWS)
    cell = {(way, shape): times.get((way, shape, PROMPT_ROWS)) for way in ways for shape in shapes}
    return [[shape, *(duration(t) if (t := cell[way, shape]) else "" for way in ways)] for shape in shapes]


def _prompt_goals(times: dict[Any, float]) -> str:
    rows, dense = [], _layer(times, "16 bit", PROMPT_ROWS)
    for way, (bar, stretch) in PROMPT_GOALS.items():
        own = _layer(times, way, PROMPT_ROWS)
        if own and dense:
            rows.append([f"{way}, {PROMPT_ROWS:,} rows", f"{bar}x", f"{stretch}x", verdict(dense / own, bar, stretch)])
    return markdown(["over 16 bits", "bar", "stretch", "measured"], rows)


def _dense(times: dict[Any, float]) -> str:
    """What making the 16-bit weights costs, which is what going through them adds to 16 bits."""
    alone, own, dense = (
        _layer(times, "its dense weight", 0),
        *(_layer(times, w, PROMPT_ROWS) for w in ("through 16 bits", "16 bit")),
    )
    if not (alone and own and dense):
        return ""
    written = 2 * sum(outputs * inputs for outputs, inputs in QWEN2_7B.shapes.values())
    return (
        f"Making the four 16-bit weights by itself takes {duration(alone)} µs, {written / 1e6:,.0f} MB written at "
        f"{written / alone / 1e3:,.0f} GB/s. In a prompt of {PROMPT_ROWS:,} rows going through them takes "
        f"{duration(own - dense)} µs longer than 16 bits.\n"
    )


def _takeover(found: Sequence[dict[str, Any]]) -> str:
    if not found:
        return ""
    rows = [[str(row["rows"]), *(duration(row[way]) for way in ("packed", "prompt", "16 bit"))] for row in found]
    later = [row["rows"] for row in found if row["prompt"] < row["packed"]]
    crossing = f"from {min(later)} rows on" if later else "at none of these numbers of rows"
    return (
        f"W3A16, launches of 16 rows or the kernel of prompts: µs of a layer's linears. The latter is faster "
        f"{crossing}.\n\n{markdown(['rows of x', 'launches of 16 rows', 'as a prompt', '16 bit'], rows)}\n"
    )


def _int8_takeover(found: Sequence[dict[str, Any]]) -> str:
    if not found:
        return ""
    ways = [way for way in found[0] if way != "rows"]
    rows = [[str(row["rows"]), *(duration(row[way]) for way in ways)] for row in found]
    return (
        "Quantized activations, quantization included, in Triton or by the kernel of prompts: µs of a layer's linears."
        f"\n\n{markdown(['rows of x', *ways], rows)}\n"
    )


# ---- the decode step -------------------------------------------------------------------------------------------------


def step(report: dict[str, Any]) -> str:
    """``report`` is what ``benchmarks.decode_step --output`` wrote."""
    lines = [
        "## A decode step\n",
        f"`{report['command']}` on {report['device']}, torch {report['torch']}, transformers {report['transformers']};",
        f"{report['positions']:,} positions.\n",
        STEP,
    ]
    if "note" in report:
        lines.append(f"{report['note']}\n")
    header = ["", "attention", "GB", "recorded, µs", "", "compiled, µs", "", "tokens/s recorded", "compiled", "plain"]
    rows, goals = [], []
    for family, found in report["families"].items():
        ships = found.get("bf16", {}).get("sdpa", {})
        for variant in (name for name in found if name not in ("attention", "lm_head")):
            row, name = found[variant], f"{FAMILIES.get(family, family)} {variant.replace('_', ' ')}"
            rows += [
                [name, attention, *_step_cells(row, row[attention], ships)]
                for attention in ("sdpa", "mbq")
                if attention in row
            ]
            ratio = row.get("ratios", {}).get("compiled", {}).get("over_bf16_sdpa")
            if ratio:
                goals.append([name, *(f"{each}x" for each in STEP_GOAL), verdict(ratio, *STEP_GOAL)])
    lines += [markdown(header, rows), ""]
    if "H200" in report["device"] and goals:
        lines += ["Against the bar:\n", markdown(["compiled, over bf16", "bar", "stretch", "measured"], goals), ""]
    return "\n".join([*lines, *_parts(report["families"])])


def _step_cells(row: dict[str, Any], found: dict[str, Any], ships: dict[str, Any]) -> list[str]:
    cells = [f"{row['gigabytes']:.1f}" if "gigabytes" in row else ""]
    for way in ("eager", "compiled"):
        took, other = found.get(way), ships.get(way)
        cells += [duration(took) if took else "", f"{other / took:.2f}x" if took and other else ""]
    speeds = found.get("generate", {})
    return cells + [
        f"{speeds[w]['tokens_a_second']:.0f}" if w in speeds else "" for w in ("recorded", "compiled", "plain")
    ]


def _parts(families: dict[str, Any]) -> list[str]:
    """What lm_head and attention take by themselves, and where the time of the first compiled W3A16 step goes."""
    lines = []
    for family, found in families.items():
        if "attention" in found and "lm_head" in found:
            head, (sdpa, ours) = found["lm_head"], (found["attention"][name] for name in ("sdpa", "mbq"))
            lines.append(
                f"- {FAMILIES.get(family, family)}: lm_head, in 16 bits, takes {duration(head)} µs; attention of all "
                f"layers {duration(sdpa)} as transformers does it, {duration(ours)} as mbq does."
            )
    for family, found in families.items():
        kernels = found.get("W3A16", {}).get("mbq", {}).get("kernels", [])
        if kernels:
            rows = [[f"`{k['name'][:60]}`", str(k["count"]), duration(k["microseconds"])] for k in kernels[:8]]
            title = f"\nThe longest of the {FAMILIES.get(family, family)} W3A16 compiled step; they overlap a little:\n"
            return [*lines, title, markdown(["kernel", "times", "µs in all"], rows), ""]
    return lines
