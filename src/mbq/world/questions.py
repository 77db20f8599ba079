"""The world as files: pictures and rows of questions in the calibration format."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from mbq.errors import MBQError
from mbq.world.scene import SPLIT_RESIDUES, Scenes, picture, sample_scenes
from mbq.world.tasks import TASKS, Task


def questions(
    split: str, tasks: Iterable[str] | None = None, per_task: int = 2000, seed: int = 0
) -> tuple[Scenes, list[dict[str, Any]]]:
    """``per_task`` questions of each task, and the scenes they are about; every picture is asked each image task once.

    A row is {"task", "messages"}: OpenAI-style messages, the picture as {"type": "image", "image": "images/00000.png"}.
    Splits "train", "calibration", "development" and "test" share no scene, no town (but for training) and no sum.
    Raises MBQError for an unknown task or split.
    """
    names = list(TASKS if tasks is None else tasks)
    for name in names:
        if name not in TASKS:
            raise MBQError(f"Unknown task {name!r}; choose from {', '.join(TASKS)}.")
    if split not in SPLIT_RESIDUES:
        raise MBQError(f"Unknown split {split!r}; choose from {', '.join(SPLIT_RESIDUES)}.")
    generator = torch.Generator().manual_seed(seed)
    scenes = sample_scenes(per_task, split, generator)
    rows = [row for name in names for row in _rows(TASKS[name], scenes, split, seed)]
    return scenes, rows


def _rows(task: Task, scenes: Scenes, split: str, seed: int) -> list[dict[str, Any]]:
    # a generator of its own, so that a task's questions do not depend on which other tasks are asked
    generator = torch.Generator().manual_seed(seed * 1000 + list(TASKS).index(task.name) + 1)
    drawn = [variant.texts(variant.draw(scenes, len(scenes), split, generator)) for variant in task.variants]
    rows = []
    for index in range(len(scenes)):
        question, answer = drawn[index % len(drawn)][index]
        content: list[dict[str, str]] = [{"type": "text", "text": question}]
        if task.needs_image:
            content.insert(0, {"type": "image", "image": f"images/{index:05d}.png"})
        messages = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        rows.append({"task": task.name, "messages": messages})
    return rows


def write(
    folder: str | Path, split: str = "test", tasks: Sequence[str] | None = None, per_task: int = 2000, seed: int = 0
) -> Path:
    """Write ``questions.jsonl`` and ``images/*.png`` into ``folder``; returns the path of the questions."""
    folder = Path(folder)
    scenes, rows = questions(split, tasks, per_task, seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    if any(TASKS[row["task"]].needs_image for row in rows):
        for index in range(len(scenes)):
            picture(scenes, index).save(folder / "images" / f"{index:05d}.png")
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
