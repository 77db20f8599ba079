"""Runs and quantized folders with known content for the tests of the report: no model, and names that mean harm."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mbq.evaluation.results import Results
from mbq.evaluation.runs import Answer, write_run
from mbq.recipe import Recipe, recipe_yaml

HOSTILE = "<script>window.harmed = 1</script><img src=x onerror='window.harmed = 1'>\"'&</script>"
SENSITIVITY = {
    "vision": {"attn": [1e-5, 3e-5, 2e-6, 0.0], "mlp": [2e-5, 2.5e-5, 1e-6, 0.0]},
    "language": {"attn": [2e-3, 1e-3, 8e-4, 4e-4], "mlp": [1e-3, 9e-4, 7e-4, 2e-4]},
    "released": False,
}
GROUPS = ("qkv", "o", "gate_up", "down")
TASKS = {"shapes": 12, "colours": 10, "sums": 8}
IMAGE_TASKS = ("shapes", "colours")


def search_rows() -> list[dict[str, Any]]:
    """A bowl a group, its least loss at another alpha in each; every block's "o" is left alone."""
    rows: list[dict[str, Any]] = []
    for block in range(4):
        for place, group in enumerate(GROUPS):
            best = (3 * block + place) % 20
            losses = [1 + (step - best) ** 2 / 100 for step in range(20)]
            if group == "o":
                rows.append({"block": block, "group": group, "alpha": None, "losses": [], "skipped": HOSTILE})
            else:
                alpha = best / 20
                rows.append({"block": block, "group": group, "alpha": alpha, "losses": losses, "skipped": None})
    return rows


def write_records(folder: Path, **options: Any) -> Path:
    """What a quantized folder holds beside its weights, and a diagnosis."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(**{"scheme": "W3A16", "method": "mbq", "data": "calib.jsonl", **options})
    (folder / "recipe.yaml").write_text(recipe_yaml(recipe, "owner/float-model", "0" * 64), encoding="utf-8")
    put(folder / "sensitivity.json", SENSITIVITY)
    put(folder / "search.json", search_rows())
    seconds = {"read": 0.5, "load": 1.5, "sensitivity": 4.0, "search": 10.0}
    put(
        folder / "measurements.json",
        {
            "format": 1,
            "created": "2026-01-02T03:04:05+00:00",
            "seconds": seconds,
            "bytes": {"before": 16_000_000, "after": 4_000_000},
            "peak_memory": {"process": 2_000_000_000, "device": None},
        },
    )
    put(
        folder / "diagnosis.json",
        {
            "format": 1,
            "blocks": [
                {
                    "block": i,
                    "attn": {"language": 0.01 * (i + 1), "vision": 0.02},
                    "mlp": {"language": 0.03, "vision": None},
                    "own": {"attn": {"language": 0.005, "vision": 0.01}, "mlp": {"language": None, "vision": 0.004}},
                }
                for i in range(4)
            ],
            "answered": 64,
            "answers": {"repetition": 2, "no output": 0},
            "answers_float": {"repetition": 1},
            "definitions": {"repetition": "one n-gram over and over"},
            "findings": [{"rule": "jump", "title": "Block 2 jumps", "evidence": HOSTILE, "advice": "Keep it."}],
        },
    )
    return folder


def put(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def answered(name: str, wrong: Mapping[str, set[int]]) -> Results:
    """Results with these questions wrong; every second question of a task shares a picture with the next task's."""
    correct = {
        task: np.array([index not in wrong.get(task, ()) for index in range(count)]) for task, count in TASKS.items()
    }
    pictures = {task: np.arange(count) for task, count in TASKS.items()}
    return Results(name, correct, pictures, IMAGE_TASKS, "the same questions", {}, 1.5)


WRONG: dict[str, dict[str, set[int]]] = {
    "float": {"shapes": {0}, "sums": {7}},
    "W3A16-mbq": {"shapes": {0, 1, 2, 3}, "colours": {5, 6}},
    "W3A16-rtn": {"shapes": {1, 2, 3, 4, 5, 6, 7}, "colours": {5}, "sums": {0, 7}},
}


def write_runs(folder: Path) -> Path:
    """A float model and two quantized ones on the same questions; ``WRONG`` says what each got wrong."""
    pictures = folder.parent / "drawn"
    pictures.mkdir(parents=True, exist_ok=True)
    for number in range(12):
        Image.new("RGB", (64, 48), (20 * number, 80, 200 - 10 * number)).save(pictures / f"{number}.png")
    places = sorted({(task, index) for wrong in WRONG.values() for task, each in wrong.items() for index in each})
    for name, wrong in WRONG.items():
        records = None
        if name != "float":
            records = write_records(folder.parent / "models" / name, method=name.split("-")[1])
        answers = []
        for task, index in places:
            right = index not in wrong.get(task, ())
            text = f"answer {index}" if right else f"{HOSTILE} of {name}"
            shown = (f"pictures/{index}.png",) if task in IMAGE_TASKS else ()
            answers.append(Answer(task, index, f"{HOSTILE} {task} {index}?", f"answer {index}", text, right, shown))
        info = {
            "model": name,
            "source": f"models/{name}",
            "created": "2026-01-03T00:00:00+00:00",
            "seconds": 1.5,
            "device": "cpu",
            "bytes": 4_000_000,
            "text": {"perplexity": {"estimate": 3.25, "low": 3.0, "high": 3.5}},
            "lmms_eval": None,
        }
        copies = {f"pictures/{number}.png": pictures / f"{number}.png" for number in range(12)}
        write_run(folder / name, info, answered(name, wrong), answers, copies, records)
    return folder
