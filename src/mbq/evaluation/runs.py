"""A run as a folder of plain files: what one model answered, so that runs can be compared and shown at any time.

run.json       what was asked of which model, when, on what, and the figures that are not right or wrong answers
results.json   right and wrong, question by question (``Results.save``); not in a run that asked no questions
answers.jsonl  a line a question that is shown, with what the model wrote
pictures/      the pictures of those questions
model/         what the model's folder records of its making
lmms_eval/     what lmms-eval's tasks wrote: samples_TASK.jsonl, a line a document
"""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from mbq.checkpoint.folder import new_folder
from mbq.errors import MBQError
from mbq.evaluation.results import Results
from mbq.images import ImageSource, image_bytes
from mbq.output import write_json

FORMAT = 1
RECORDS = ("recipe.yaml", "sensitivity.json", "search.json", "diagnosis.json")


@dataclass(frozen=True)
class Answer:
    """What a model wrote to a question.

    index      the question's number in its task, from 0, as in ``Results.correct[task]``
    question   the last user's turn, text only
    reference  the answer that is right
    answer     what the model wrote; of a right answer the reference, which it is to the letter
    right      as ``Results`` has it
    pictures   relative to the run's folder, in the order of the conversation
    """

    task: str
    index: int
    question: str
    reference: str
    answer: str
    right: bool
    pictures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """A run's folder, read.

    info     run.json
    results  None where no questions were asked
    """

    folder: Path
    info: dict[str, Any]
    results: Results | None
    answers: list[Answer]

    @property
    def name(self) -> str:
        return str(self.info["model"])

    @classmethod
    def load(cls, folder: str | Path) -> Run:
        """Read what ``write_run`` wrote. Raises MBQError for a folder that is no run, or a damaged one."""
        folder = Path(folder)
        if not (folder / "run.json").is_file():
            raise MBQError(f"{folder} is no run: it holds no run.json; give a folder that mbq evaluate --output wrote.")
        try:
            info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            if info["format"] != FORMAT:
                raise MBQError(f"{folder} is a run of format {info['format']}, not {FORMAT}; evaluate the model again.")
            results = Results.load(folder / "results.json") if (folder / "results.json").exists() else None
            answers = _read_answers(folder / "answers.jsonl", results)
            return cls(folder, {**info, "model": str(info["model"])}, results, answers)
        except (OSError, ValueError, LookupError, TypeError, ArithmeticError) as error:
            raise MBQError(
                f"The run {folder} is damaged ({' '.join(str(error).split())}); copy it anew, or evaluate again."
            ) from error


def write_run(
    folder: str | Path,
    info: Mapping[str, Any],
    results: Results | None = None,
    answers: Sequence[Answer] = (),
    pictures: Mapping[str, ImageSource] | None = None,
    model: str | Path | None = None,
    lmms_eval: str | Path | None = None,
) -> Path:
    """Write a run, whole or not at all, and return its folder.

    info       run.json but for its format; "model" is the name that it is compared and shown under
    pictures   what the answers' ``pictures`` are copies of, by name (``picture_names`` makes names)
    model      the model's folder, whose records are copied
    lmms_eval  a folder that is copied as it is

    Raises MBQError where ``folder`` holds something, where it cannot be written and where a picture cannot be read.
    """
    folder = Path(folder)
    with new_folder(folder) as new:
        write_json(new / "run.json", {"format": FORMAT, **info})
        if results is not None:
            results.save(new / "results.json")
        lines = (json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers)
        (new / "answers.jsonl").write_text("".join(lines), encoding="utf-8")
        for name, source in (pictures or {}).items():
            (new / name).parent.mkdir(exist_ok=True)
            (new / name).write_bytes(_file_bytes(source))
        records = [Path(model) / name for name in RECORDS] if model is not None else []
        for record in records:
            if record.is_file():
                (new / "model").mkdir(exist_ok=True)
                shutil.copyfile(record, new / "model" / record.name)
        if lmms_eval is not None:
            shutil.copytree(lmms_eval, new / "lmms_eval")
    return folder


def picture_names(sources: Sequence[ImageSource]) -> list[str]:
    """A file in ``pictures/`` for each source; the same source has the same, different ones never share one."""
    names: dict[Any, str] = {}
    taken: set[str] = set()
    found = []
    for source in sources:
        key = source if isinstance(source, Path | bytes) else id(source)
        if key not in names:
            plain = _plain_name(source, len(names))
            name, number = plain, 1
            while name.lower() in taken:  # a disk may not tell a.png from A.png
                number += 1
                name = f"{Path(plain).stem}-{number}{Path(plain).suffix}"
            taken.add(name.lower())
            names[key] = f"pictures/{name}"
        found.append(names[key])
    return found


def _plain_name(source: ImageSource, number: int) -> str:
    if isinstance(source, Path):
        return re.sub(r"[^\w.-]", "_", source.name).lstrip(".") or f"{number:05d}.png"
    if isinstance(source, Image.Image):
        return f"{number:05d}.png"
    with Image.open(io.BytesIO(image_bytes(source, str(source)[:80]))) as picture:
        return f"{number:05d}.{(picture.format or 'png').lower()}"


def _file_bytes(source: ImageSource) -> bytes:
    if not isinstance(source, Image.Image):
        return image_bytes(source, "a question")
    file = io.BytesIO()
    source.save(file, "PNG")
    return file.getvalue()


def _read_answers(path: Path, results: Results | None) -> list[Answer]:
    if results is None or not path.exists():
        return []
    answers = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line:
            fields = json.loads(line)
            answer = Answer(**{**fields, "pictures": tuple(_inside(name) for name in fields["pictures"])})
            if bool(results.correct[answer.task][answer.index]) != answer.right or answer.index < 0:
                raise ValueError(f"question {answer.index} of {answer.task} is not what results.json says")
            answers.append(answer)
    return answers


def _inside(name: str) -> str:
    """A run may come from elsewhere, and whoever shows it must not show other files of this machine."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise ValueError(f"the picture {name!r} lies outside")
    return name
