"""Gradients a block for language and vision tokens, of the reference models and of models that differ in their tower.

python -m benchmarks.sensitivity              measure what models/ holds and benchmarks/results/sensitivity/ does not,
                                              then write docs/sensitivity.md and its pictures
python -m benchmarks.sensitivity --runs RUNS  the same for the folders in RUNS, as training/train.py wrote them, under
                                              the names of sensitivity_means.MODELS
python -m benchmarks.sensitivity --write      only write

Means are stored a sample, so every interval in the page is computed from them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import mbq
from benchmarks.results import ROOT, SAMPLES, weights_hash
from benchmarks.results_page import FAMILY_NAMES
from benchmarks.sensitivity_means import MODELS, QUESTIONS, Means, sensitivity_of
from benchmarks.sensitivity_page import page
from mbq.architecture import bind
from mbq.calibration import calibration_batches
from mbq.figures import save_sensitivity_picture
from mbq.rows import Row, read_rows
from mbq.sensitivity import sample_means, token_gradients
from mbq.world import write

STORED = ROOT / "benchmarks" / "results" / "sensitivity"


def calibration_rows(folder: Path) -> dict[str, list[Row]]:
    """Rows by calibration, a row a picture: its caption, or one question, each task in turn."""
    captions = read_rows(write(folder / "caption", "calibration", ["caption"], SAMPLES))
    every = read_rows(write(folder / "questions", "calibration", QUESTIONS, SAMPLES))
    questions = [every[index % len(QUESTIONS) * SAMPLES + index] for index in range(SAMPLES)]
    return {"caption": captions, "questions": questions}


def measure(model: Any, processor: Any, rows: list[Row]) -> Means:
    """Means of every sample, in the model's own dtype, as ``mbq sensitivity`` takes them."""
    binding = bind(model)
    batches = calibration_batches(rows, processor, binding.vision_tokens, num_samples=len(rows), batch_size=32)
    vision, language = sample_means(batches, token_gradients(binding, batches))
    return Means(vision.numpy(), language.numpy())


def training_of(folder: Path) -> dict[str, Any]:
    """What the log says: the steps of all runs, what the tower had learned before them, what the model knows."""
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    scored = [entry for entry in log if entry.get("scheme") == "float"]
    steps = sum(entry["step"] for entry in scored)
    return {"steps": steps, "first": log[0]["accuracy"], "accuracy": scored[-1]["accuracy"]}


def store(path: Path, content: Mapping[str, Any], means: Mapping[str, Means]) -> None:
    """A JSON file with a line a sample, four significant digits a number, parts side by side within a block."""
    lines = [json.dumps(content)[:-1]]
    for name, found in means.items():
        for side in ("vision", "language"):
            samples = getattr(found, side).reshape(SAMPLES, -1).tolist()
            rows = ",\n".join(f"[{','.join(f'{value:.3e}' for value in sample)}]" for sample in samples)
            lines.append(f'"{name} {side}": [\n{rows}]')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(",\n".join(lines) + "}\n")


def stored(folder: Path = STORED) -> dict[str, tuple[dict[str, Any], dict[str, Means]]]:
    """What is stored of each of MODELS, in their order."""
    found = {}
    for name in MODELS:
        if not (path := folder / f"{name}.json").is_file():
            continue
        content = json.loads(path.read_text())
        means = {
            task: Means.of(content.pop(f"{task} vision"), content.pop(f"{task} language"))
            for task in ("caption", "questions")
        }
        found[name] = (content, means)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=ROOT / "models", help="the folder of the families' folders")
    parser.add_argument("--runs", type=Path, help="a folder of further trained models")
    parser.add_argument("--output", type=Path, default=ROOT / "docs")
    parser.add_argument("--write", action="store_true", help="measure nothing")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(arguments)
    known = stored()
    folders = [folder / name for folder in (args.models, args.runs) if folder for name in MODELS]
    with tempfile.TemporaryDirectory(prefix="mbq-sensitivity-") as data:
        rows: dict[str, list[Row]] = {}
        for folder in folders:
            name = folder.name
            if args.write or not folder.is_dir():
                continue
            content = {"weights": weights_hash(folder), **training_of(folder)}
            if name in known and known[name][0] == content:
                continue
            rows = rows or calibration_rows(Path(data))
            torch.manual_seed(0)
            model, processor = mbq.load(folder, device=args.device), mbq.load_processor(folder)
            store(STORED / f"{name}.json", content, {task: measure(model, processor, rows[task]) for task in rows})
    for name, (_, means) in stored().items():
        if name in FAMILY_NAMES:
            title = f"{FAMILY_NAMES[name]}: language and vision tokens"
            save_sensitivity_picture(sensitivity_of(means["caption"]), args.output / f"sensitivity-{name}.png", title)
    (args.output / "sensitivity.md").write_text(page(stored()))


if __name__ == "__main__":
    main()
