"""The measurements at the end of docs/scaling.md, from what benchmarks/search.py wrote: nothing is measured here.

python -m benchmarks.scaling_page
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.results_page import markdown

ROOT = Path(__file__).parents[1]
STORED = ROOT / "benchmarks" / "results" / "search"
PAGE = ROOT / "docs" / "scaling.md"
BEGIN = "## Measured\n"
RUNS = {
    "7B": "7B, one GPU",
    "7B-2": "7B, two GPUs",
    "7B-24GB": "7B, 24 GB of a GPU",
    "72B": "72B, 24 GB of a GPU",
    "72B-disk": "72B, activations on disk",
}

HEAD = """
Written by `python -m benchmarks.scaling_page` from `benchmarks/results/search/`, each file made by its command. Shapes
are Qwen2-VL's, random weights whose channels spread as in trained models, W3A16 in groups of 128 by MBQ (MAE); no
vision tower runs. The process's memory is the highest of the whole run up to then, imports and CUDA's own included.
GPUs ran commit 5e9effd, the CPU 269e460. The 72B has three of its 80 blocks here: seconds a block and the memory of the
device are those of all 80, the memory of the process is not. "Planned" is what a run printed before its first block;
its time leaves out transfers and the rounding of weights.
"""

DEMO = """
On {threads} threads of a CPU, the reference models as `mbq quantize` calibrates them on {samples} questions. "Plain"
compares all candidates on all tokens, one after the other. Of {groups} groups {equal:.1%} have the same alpha; the
loss at the chosen one is {mean:.3f} % above the least on average, {most:.2f} % at most.
"""


def page() -> str:
    """The part of docs/scaling.md that begins with ``BEGIN``."""
    parts = [BEGIN, HEAD.lstrip()]
    found = {
        name: json.loads((STORED / f"{name}.json").read_text()) for name in RUNS if (STORED / f"{name}.json").exists()
    }
    parts += [steps(found), ""]
    parts += [f"- {RUNS[name]}: {told(run)}" for name, run in found.items()]
    compared, demo = STORED / "compare-7B.json", STORED / "demo.json"
    if compared.exists():
        parts += ["\n### The race beside an exhaustive search\n", races(json.loads(compared.read_text()))]
    if demo.exists():
        parts += ["\n### On a CPU\n", on_a_cpu(json.loads(demo.read_text()))]
    return "\n".join(parts) + "\n"


def told(run: dict[str, Any]) -> str:
    """How a run was made, and what it planned."""
    planned = [line for line in run["plan"] if line.startswith(("Needed", "Time"))]
    command = f"`{run['command']}`, {run['device']}, torch {run['torch']}"
    return f"{command}. Planned: {' '.join(planned)}"


def steps(found: dict[str, dict[str, Any]]) -> str:
    """A row a run and step: seconds, of a block too, and the highest memory."""
    rows = []
    for name, run in found.items():
        for step, own in run["steps"].items():
            blocks = f"{own['seconds'] / run['blocks']:.2f}" if step != "write" else ""
            device, process = f"{own['peak device GB']:.1f}", f"{own['peak process GB']:.1f}"
            rows.append([RUNS[name], str(run["blocks"]), step, f"{own['seconds']:.1f}", blocks, device, process])
        total = sum(own["seconds"] for own in run["steps"].values())
        rows.append([RUNS[name], str(run["blocks"]), "all", f"{total:.1f}", "", "", ""])
    header = ["run", "blocks", "step", "seconds", "a block", "GB on the device", "GB of the process"]
    return markdown(header, rows)


def races(report: dict[str, Any]) -> str:
    rows = []
    for first, row in report["summary"].items():
        rows.append(
            [
                "all" if first == "None" else first,
                f"{row['equal']:.0%}",
                f"{row['worse, mean %']:.3f}",
                f"{row['worse, most %']:.3f}",
                f"{row['seconds'] / report['blocks']:.2f}",
                f"{row['times faster']:.1f}x",
            ]
        )
    header = [
        "tokens of the first round",
        "equal alphas",
        "loss above the least, mean %",
        "most %",
        "seconds a block",
        "",
    ]
    told = f"`{report['command']}`, {report['device']}: {len(report['groups'])} groups of {report['blocks']} blocks.\n"
    return f"{told}\n{markdown(header, rows)}\n\nThe default is 512."


def on_a_cpu(report: dict[str, Any]) -> str:
    runs: Sequence[dict[str, Any]] = report["runs"]
    told = DEMO.strip().format(
        threads=report["threads"],
        samples=128,
        groups=sum(run["groups"] for run in runs),
        equal=report["equal"],
        mean=report["worse, mean %"],
        most=report["worse, most %"],
    )
    rows = [
        [
            run["family"],
            run["scheme"],
            str(run["batch size"]),
            f"{run['plain search, seconds']:.1f}",
            f"{run['search, seconds']:.1f}",
            f"{run['times faster']:.1f}x",
            f"{run['equal']} of {run['groups']}",
        ]
        for run in runs
    ]
    header = ["model", "scheme", "batch size", "plain, s", "search, s", "", "equal alphas"]
    return f"`{report['command']}`\n\n{told}\n\n{markdown(header, rows)}"


def main() -> None:
    before = PAGE.read_text(encoding="utf-8").partition(BEGIN)[0]
    PAGE.write_text(before + page(), encoding="utf-8")
    print(f"Wrote {PAGE.relative_to(ROOT)}.")


if __name__ == "__main__":
    main()
