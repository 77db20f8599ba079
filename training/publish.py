"""Put a trained folder into models/: a model card beside it, and the logs of the runs that made it as one.

python -m training.publish internvl --weights RUN2/model.safetensors --logs RUN1.jsonl RUN2.jsonl --recipe "..."
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from mbq.world import TASKS
from training.build import BUILDERS, TOWERS, build, save

# what a model knows and where it was measured: models of the benchmarks, and those by which towers are compared
BENCHMARKED = ("18,048 facts", "Accuracy on the test questions, with intervals, is in `docs/results.md`.")
COMPARED = ("some of 18,048 facts", "What the model is for is in `docs/sensitivity.md`.")


def log_entries(logs: list[Path]) -> list[dict]:
    """The entries of all logs in order, numbered by run; other lines of a captured output are skipped."""
    return [
        {"run": run, **json.loads(line)}
        for run, log in enumerate(logs, start=1)
        for line in log.read_text().splitlines()
        if line.startswith("{")
    ]


def publish(family: str, weights: Path, logs: list[Path], recipe: str, models: Path) -> Path:
    """Write ``models/family``: weights, processor, log and card."""
    model, processor = build(family)
    folder = models / family
    save(model, processor, folder)
    shutil.copyfile(weights, folder / "model.safetensors")
    _, found = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), f"{weights} does not fit {family}: {found}"
    entries = log_entries(logs)
    (folder / "training_log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    image_tasks = [task.name for task in TASKS.values() if task.needs_image]
    rows = []
    for entry in entries:
        if "scheme" in entry and entry["run"] == len(logs):
            mean = sum(entry["accuracy"][task] for task in image_tasks) / len(image_tasks)
            rows.append(f"| {entry['scheme'].replace('W', 'round to nearest, W', 1)} | {mean:.1f} |")
    layers = model.model.language_model.layers
    facts, measured = COMPARED if family in TOWERS else BENCHMARKED
    card = (Path(__file__).parent / "card.md").read_text()
    (folder / "README.md").write_text(
        card.format(
            family=type(model).__name__,
            folder=family,
            parameters=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
            block_parameters=sum(parameter.numel() for parameter in layers.parameters()) / 1e6,
            blocks=len(layers),
            recipe=recipe,
            facts=facts,
            measured=measured,
            table="\n".join(rows),
        )
    )
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=BUILDERS)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--logs", type=Path, nargs="+", required=True)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--models", type=Path, default=Path("models"))
    arguments = parser.parse_args()
    print(publish(arguments.family, arguments.weights, arguments.logs, arguments.recipe, arguments.models))
