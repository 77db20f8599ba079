"""What a run's lmms-eval tasks scored document by document, so that two runs can be compared one by one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from mbq.errors import MBQError
from mbq.evaluation.results import Results
from mbq.evaluation.runs import Run


def document_results(run: Run) -> Results | None:
    """The scores as ``Results``, whose ``correct`` may hold fractions (VQA's accuracies); None where there are none.

    A task is in it if one of its metrics, of which more is better, scores each document by a number from 0 to 1: by
    itself, or as the "score" of what the metric collects. (MMMU's and SEED-Bench's only come to a number in the sum.)

    Raises MBQError for files that are not what ``evaluate_tasks`` writes.
    """
    summary = run.info.get("lmms_eval") or {}
    scores: dict[str, np.ndarray] = {}
    asked = hashlib.sha256()
    try:
        for task, metrics in summary.get("higher_is_better", {}).items():
            path = run.folder / "lmms_eval" / f"samples_{task}.jsonl"
            found = _scores(path, [metric for metric, better in metrics.items() if better]) if path.is_file() else None
            if found is not None:
                scores[task] = found[0]
                asked.update(json.dumps([task, found[1]]).encode())
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise MBQError(f"The run {run.folder} is damaged ({error}); copy it anew, or evaluate again.") from error
    pictures = {task: np.arange(len(values)) for task, values in scores.items()}
    start = 0
    for task in pictures:  # no two documents are taken to share a picture
        pictures[task] = pictures[task] + start
        start += len(pictures[task])
    return Results(run.name, scores, pictures, (), asked.hexdigest()) if scores else None


def _scores(path: Path, metrics: list[str]) -> tuple[np.ndarray, list[Any]] | None:
    """[document] of the first metric that has a number for each, and what was asked."""
    samples = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    samples.sort(key=lambda sample: sample["doc_id"])
    asked = [[sample["doc_id"], sample["target"], sample["arguments"]] for sample in samples]
    for metric in metrics:
        values = [_number(sample.get(metric)) for sample in samples]
        if values and all(value is not None and 0 <= value <= 1 for value in values):
            return np.array(values, float), asked
    return None


def _number(value: Any) -> float | None:
    if isinstance(value, dict):
        value = value.get("score")
    return float(value) if isinstance(value, bool | int | float) else None
