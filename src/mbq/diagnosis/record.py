"""diagnosis.json: everything that was measured and found, for the report and for scripts."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mbq.diagnosis.bad_answers import KINDS, definitions
from mbq.diagnosis.measurements import Measurements
from mbq.diagnosis.run import Diagnosis
from mbq.errors import MBQError
from mbq.output import base_name, write_json

FORMAT = 1
NAME = "diagnosis.json"
EXAMPLES = 20  # bad answers that are kept, text and all


def target(output: str | Path) -> Path:
    """The file that ``output``, a file or a folder, stands for. Raises MBQError where it cannot be written."""
    path = Path(output).expanduser()
    if path.is_dir():
        return path / NAME
    if path.suffix != ".json":
        raise MBQError(f"--output {output} is no folder and no .json file; give one of the two.")
    if not path.absolute().parent.is_dir():
        raise MBQError(f"--output {output} lies in a folder that does not exist; make it, or give another one.")
    return path


def write(found: Diagnosis, output: str | Path) -> Path:
    """Write the record to a file, or to diagnosis.json in a folder; the path."""
    path = target(output)
    write_json(path, to_json(found))
    return path


def to_json(found: Diagnosis) -> dict[str, Any]:
    """Errors are null where there are no such tokens; "answers" counts the quantized model's bad ones by kind."""
    m = found.measurements
    return {
        "format": FORMAT,
        "model": base_name(m.model),
        "baseline": base_name(m.baseline),
        "scheme": m.scheme.name,
        "samples": m.propagation.samples,
        "entry": m.propagation.entry,
        "blocks": [
            {"block": number, **errors.accumulated, "own": errors.own, "expected": errors.expected}
            for number, errors in enumerate(m.propagation.blocks)
        ],
        "outliers": [asdict(each) for each in m.propagation.outliers],
        "massive": [{**asdict(each), "massive": each.massive} for each in m.propagation.massive],
        "outside": asdict(m.outside),
        "accuracy": {kind: asdict(each) for kind, each in m.accuracy.items()},
        **_answers(m),
        "speed": None if m.speed is None else asdict(m.speed),
        "notes": m.notes,
        "findings": [{name: _named(text, m) for name, text in asdict(finding).items()} for finding in found.findings],
    }


def _named(text: str, m: Measurements) -> str:
    """Folders are the machine's own business: of a path, only the last part is written."""
    for path in (m.model, m.baseline):
        text = text.replace(path, base_name(path))
    return text


def _answers(m: Measurements) -> dict[str, Any]:
    ours, theirs = Counter(each.kind for each in m.answers), Counter(each.float_kind for each in m.answers)
    return {
        "answered": len(m.answers),
        "answers": {kind: ours[kind] for kind in KINDS} if m.limits else {},
        "answers_float": {kind: theirs[kind] for kind in KINDS} if m.limits else {},
        "definitions": definitions(m.limits) if m.limits else {},
        "examples": [asdict(each) for each in m.answers if each.kind is not None][:EXAMPLES],
    }
