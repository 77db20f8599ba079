"""Every method at every scheme on the three reference models: measure, store, and write docs/results.md.

python -m benchmarks.results            measure what benchmarks/results/ does not hold yet, then write docs/results.md
python -m benchmarks.results --write    only write

A stored run is taken again if the model's weights, the recipe or the questions are others. Right and wrong answers are
stored a bit a question (mbq.evaluation.Results), so every interval in the page is computed from them.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

import mbq
from benchmarks.results_page import folder_of, page
from mbq.evaluation import Questions, Results, evaluate, prepare
from mbq.evaluation.run import PER_TASK, world_questions
from mbq.fuse import use_kernel
from mbq.progress import shown
from mbq.rows import Row, read_rows
from mbq.world import TASKS, write

ROOT = Path(__file__).parents[1]
STORED = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"
FAMILIES = ("llava_onevision", "internvl", "qwen2_vl")
SCHEMES = ("W3A16", "W2A16", "W4A8", "W3A8", "W4A4")
# name -> what mbq.quantize is told beside the scheme
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "smoothquant": {"method": "smoothquant"},
    "awq": {"method": "awq"},
    "fixed": {"method": "fixed"},
    "mbq-mae": {"method": "mbq", "norm": "mae"},
    "mbq-mse": {"method": "mbq", "norm": "mse"},
    "mbq-paper": {"method": "mbq", "objective": "paper"},
    "mbq-gqa": {"method": "mbq", "norm": "mae", "gqa_fold": True},
    "mbq-distorted": {"method": "mbq", "norm": "mae", "distorted_input": True},
}
# name -> the tasks whose rows calibrate; questions have answers of a few tokens, captions of a hundred
CALIBRATIONS = {"captions": ("caption",), "questions": tuple(task.name for task in TASKS.values() if task.needs_image)}
MAIN_METHODS = ("rtn", "smoothquant", "awq", "fixed", "mbq-mae", "mbq-mse")
SAMPLES = 128


@dataclass(frozen=True)
class Run:
    """One quantized model, or the float one (method "float", no scheme)."""

    family: str
    method: str
    scheme: str = ""
    seed: int = 0
    calibration: str = "captions"

    @property
    def path(self) -> Path:
        name = f"{self.scheme}-{self.method}-{self.seed}" if self.scheme else self.method
        return folder_of(STORED, self.family, self.calibration) / f"{name}.json"

    @property
    def options(self) -> dict[str, Any]:
        if not self.scheme:
            return {}
        return {"scheme": self.scheme, **METHODS[self.method], "num_calibration_samples": SAMPLES, "seed": self.seed}


def runs(
    family: str, schemes: list[str], methods: list[str], seeds: list[int], calibrations: list[str]
) -> Iterator[Run]:
    """The float model, then every scheme and method; rounding to nearest looks at no sample and is run once."""
    yield Run(family, "float")
    for scheme in schemes:
        for method in methods:
            if method == "rtn":
                yield Run(family, method, scheme)
                continue
            for calibration in calibrations:
                for seed in seeds:
                    yield Run(family, method, scheme, seed, calibration)


def weights_hash(folder: Path) -> str:
    """SHA-256 of a model's weight files."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def recipe_of(run: Run, weights: str) -> dict[str, Any]:
    """What a stored run must agree with to be taken as it is."""
    if not run.scheme:
        return {"weights": weights}
    tasks = "+".join(CALIBRATIONS[run.calibration]) if run.method != "rtn" else None
    return {"weights": weights, "calibration": tasks, **run.options}


def is_stored(run: Run, recipe: dict[str, Any], questions: str) -> bool:
    if not run.path.is_file():
        return False
    stored = Results.load(run.path)
    return stored.recipe == recipe and stored.questions == questions


def measure(
    run: Run, model: Any, processor: Any, calibration: list[Row], questions: Questions, recipe: dict[str, Any]
) -> Results:
    """Quantize in memory, evaluate, store."""
    quantized = model
    if run.scheme:
        made = mbq.quantize(model, processor, data=calibration, batch_size=32, search_tokens=0, **run.options)
        quantized = made.model
        use_kernel(quantized, "auto")
    results = evaluate(quantized, questions, f"{run.family} {run.scheme} {run.method}", recipe)
    run.path.parent.mkdir(parents=True, exist_ok=True)
    results.save(run.path)
    return results


def measure_all(args: argparse.Namespace, console: Console) -> None:
    with tempfile.TemporaryDirectory(prefix="mbq-results-") as folder, shown(console) as progress:
        rows = world_questions(Path(folder) / "test", limit=args.per_task)
        # twice as many as are drawn, so that seeds draw different ones
        calibration = {
            name: read_rows(write(Path(folder) / name, split="calibration", tasks=tasks, per_task=2 * SAMPLES))
            for name, tasks in CALIBRATIONS.items()
            if name in args.calibrations
        }
        for family in args.families:
            source = args.models / family
            if not (source / "config.json").is_file():
                console.print(f"{source} holds no model, so {family} is left out.")
                continue
            weights = weights_hash(source)
            model, processor = mbq.load(source, device=args.device), mbq.load_processor(source)
            questions = prepare(rows, processor, args.batch_size, progress)
            todo = list(runs(family, args.schemes, args.methods, args.seeds, args.calibrations))
            for done, run in enumerate(todo):
                progress(family, done, len(todo), f"{run.scheme} {run.method}")
                recipe = recipe_of(run, weights)
                if not is_stored(run, recipe, questions.digest):
                    measure(run, model, processor, calibration.get(run.calibration, []), questions, recipe)
            progress(family, len(todo), len(todo), "")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure every method on the reference models; write docs/results.md.")
    parser.add_argument("--write", action="store_true", help="only write the page from what is stored")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=list(mbq.SCHEMES))
    parser.add_argument("--methods", nargs="+", default=list(MAIN_METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the draw of calibration samples")
    parser.add_argument("--calibrations", nargs="+", default=list(CALIBRATIONS), choices=list(CALIBRATIONS))
    parser.add_argument("--models", type=Path, default=ROOT / "models", help="the folder of the families' folders")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=2048, help="questions that go through a model at once")
    parser.add_argument("--per-task", type=int, default=PER_TASK, help="questions a task")
    args = parser.parse_args(arguments)
    console = Console(stderr=True)
    started = time.monotonic()
    if not args.write:
        measure_all(args, console)
    PAGE.write_text(page(STORED, FAMILIES, SCHEMES))
    console.print(f"Wrote {PAGE.relative_to(ROOT)} after {time.monotonic() - started:.0f} s.", highlight=False)


if __name__ == "__main__":
    main()
