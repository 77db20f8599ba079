"""The models that a page shows, read from runs and quantized folders; no model is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from mbq.errors import MBQError
from mbq.evaluation.runs import Run

LARGEST_RECORD = 64 * 2**20  # bytes; a 72B's search.json has 0.2 MB


@dataclass(frozen=True)
class Records:
    """What a quantized folder says of its making; each None or empty where the file is not there.

    recipe        recipe.yaml, and ``recipe_text`` as it stands there
    sensitivity   sensitivity.json: side -> part -> number a block
    search        search.json: a row a group
    diagnosis     diagnosis.json
    measurements  measurements.json: seconds a step, bytes, memory
    card          README.md
    """

    recipe: dict[str, Any] | None = None
    recipe_text: str = ""
    sensitivity: dict[str, Any] | None = None
    search: list[dict[str, Any]] = field(default_factory=list)
    diagnosis: dict[str, Any] | None = None
    measurements: dict[str, Any] | None = None
    card: str = ""

    @classmethod
    def read(cls, folder: Path) -> Records:
        """Raises MBQError for a file that is not what its name says."""
        text = _text(folder / "recipe.yaml") or ""
        return cls(
            recipe=_checked(folder / "recipe.yaml", _yaml(folder / "recipe.yaml", text), dict),
            recipe_text=text,
            sensitivity=_json(folder / "sensitivity.json", dict),
            search=_json(folder / "search.json", list) or [],
            diagnosis=_json(folder / "diagnosis.json", dict),
            measurements=_json(folder / "measurements.json", dict),
            card=_text(folder / "README.md") or "",
        )


@dataclass(frozen=True)
class Subject:
    """A model that a page shows.

    label    what it is called there, no two alike
    place    its folder's name, for commands that take it
    run      what it answered, or None
    bytes    of its weight files on disk, or None where that is not recorded
    """

    label: str
    place: str
    records: Records
    run: Run | None = None
    bytes: int | None = None

    @property
    def quantized(self) -> bool:
        return self.records.recipe is not None

    @property
    def scheme(self) -> str:
        return str((self.records.recipe or {}).get("scheme", ""))

    @property
    def method(self) -> str:
        return str((self.records.recipe or {}).get("method", ""))

    @property
    def created(self) -> str:
        """ISO 8601, or nothing."""
        if self.run is not None:
            return str(self.run.info.get("created") or "")
        return str((self.records.measurements or {}).get("created") or "")


def read_subjects(paths: Iterable[str | Path]) -> list[Subject]:
    """Runs, folders of runs and quantized folders, in the order given but float models first; a model's folder and its
    run become one.

    Raises MBQError for a folder that is neither, or is damaged.
    """
    found: list[Subject] = []
    for path in paths:
        for folder in _folders(Path(path)):
            found = _joined(found, read_subject(folder))
    if not found:
        raise MBQError("A report is about something; give runs (mbq evaluate --output) or quantized folders.")
    return sorted(_labelled(found), key=lambda subject: subject.quantized)


def read_subject(folder: Path, name: str | None = None) -> Subject:
    """One run or quantized folder; ``name`` is for one that has not got its own yet."""
    name = name or folder.resolve().name
    if (folder / "run.json").is_file():
        run = Run.load(folder)
        size = run.info.get("bytes")
        return Subject(run.name, run.name, Records.read(folder / "model"), run, size if isinstance(size, int) else None)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return Subject(name, name, Records.read(folder), bytes=size or None)


def _folders(path: Path) -> list[Path]:
    if not path.is_dir():
        raise MBQError(f"{path} is no folder; give a run (mbq evaluate --output) or a quantized folder.")
    if any((path / name).is_file() for name in ("run.json", "recipe.yaml")):
        return [path]
    inside = [folder for folder in path.iterdir() if (folder / "run.json").is_file()]
    if not inside:
        raise MBQError(
            f"{path} holds no run.json, no recipe.yaml and no runs; give a run (mbq evaluate --output) or a quantized "
            "folder."
        )
    return sorted(inside)


def _joined(found: list[Subject], new: Subject) -> list[Subject]:
    """A model's own folder says more of its making than its run's copies; which is which is seen by name and recipe."""
    for place, old in enumerate(found):
        same = old.label == new.label and old.records.recipe == new.records.recipe and new.quantized
        if same and (old.run is None) != (new.run is None):
            own, run = (old, new.run) if old.run is None else (new, old.run)
            return [*found[:place], replace(own, run=run, bytes=own.bytes or new.bytes), *found[place + 1 :]]
    return [*found, new]


def _labelled(subjects: list[Subject]) -> list[Subject]:
    """Runs of one name are told apart by their time, or by a number."""
    names = [subject.label for subject in subjects]
    found: list[Subject] = []
    for subject in subjects:
        label = subject.label
        if names.count(label) > 1 and subject.created:
            label = f"{label} ({subject.created[:16].replace('T', ' ')})"
        taken, number, base = {other.label for other in found}, 1, label
        while label in taken:
            number += 1
            label = f"{base}, {number}"
        found.append(replace(subject, label=label))
    return found


def _text(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > LARGEST_RECORD:
            raise MBQError(f"{path} has more than {LARGEST_RECORD >> 20} MB, which no record has; remove it.")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(path, error) from error


def _json(path: Path, kind: type) -> Any:
    text = _text(path)
    try:
        return None if text is None else _checked(path, json.loads(text), kind)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, error) from error


def _yaml(path: Path, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from error


def _checked(path: Path, content: Any, kind: type) -> Any:
    if content is not None and not isinstance(content, kind):
        raise _damaged(path, TypeError(f"it holds a {type(content).__name__}"))
    return content


def _damaged(path: Path, error: Exception) -> MBQError:
    return MBQError(f"{path} is damaged ({' '.join(str(error).split())}); copy it anew, or remove it.")
