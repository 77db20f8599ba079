"""Rows of a data file: conversations in OpenAI style, whatever format people keep them in."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mbq.conditions import Condition, condition_from
from mbq.errors import MBQError
from mbq.images import ImageSource, image_bytes, image_source, open_image

MARKER = "<image>"
_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_BLANK = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True)
class Row:
    """One conversation.

    messages  [{"role": "system" | "user" | "assistant", "content": [part, ...]}, ...], where a part is
              {"type": "text", "text": str} or {"type": "image", "image": ImageSource}; images stand in user turns only
    where     the row's place for messages to the user: "calib.jsonl, line 7"
    task      what an evaluation counts the row under
    condition  what the question asks of the form of its answer
    """

    messages: list[dict[str, Any]]
    where: str
    task: str | None = None
    condition: Condition | None = None

    @property
    def images(self) -> list[ImageSource]:
        """The pictures in the order of the conversation, not opened."""
        parts = (part for message in self.messages for part in message["content"])
        return [part["image"] for part in parts if part["type"] == "image"]

    @property
    def chat(self) -> list[dict[str, Any]]:
        """The messages as a chat template takes them: image parts without their pictures."""
        return [{**message, "content": [_bare(part) for part in message["content"]]} for message in self.messages]

    def open_images(self) -> list[Image.Image]:
        """The pictures, decoded, upright and RGB. Raises MBQError where one is missing or corrupt."""
        return [open_image(source, self.where) for source in self.images]


def _bare(part: dict[str, Any]) -> dict[str, Any]:
    return {"type": "image"} if part["type"] == "image" else part


def text_of(message: dict[str, Any]) -> str:
    """The text parts of a message, joined."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def read_rows(
    path: str | Path,
    images: str | Path | None = None,
    *,
    limit: int | None = None,
    prompt: str = "Describe this image.",
    require_answer: bool = True,
) -> list[Row]:
    """Read rows from a JSON list, a JSONL file, or a folder that ``datasets`` saved.

    A row of a file is {"messages": [...]} in OpenAI style or {"conversations": [...]} in the LLaVA / ShareGPT4V style;
    ``<image>`` in a text stands for the next picture of the row's "image" (or "images") key. A folder's rows are
    pictures with captions, which become ``prompt`` → caption.

    images          the folder that image paths are relative to; None is the data file's own
    limit           stop after so many rows
    require_answer  refuse a row without an assistant's answer

    Pictures are opened later, by ``Row.open_images``. Raises MBQError, with file and line, for whatever is wrong.
    """
    path = Path(path)
    folder = Path(images) if images is not None else (path if path.is_dir() else path.parent)
    if not path.exists():
        raise MBQError(f"The data file {path} does not exist; check --data.")
    if not folder.is_dir():
        raise MBQError(f"The image folder {folder} does not exist; check --images.")
    if path.is_dir():
        from mbq.caption_dataset import dataset_records  # imports datasets, which takes a second

        records = dataset_records(path, prompt)
    else:
        records = _records(path)
    rows: list[Row] = []
    for where, record in records:
        if limit is not None and len(rows) == limit:
            break
        rows.append(row_from(record, where, folder, require_answer))
    if not rows:
        raise MBQError(f"{path.name} holds no rows; give a file with at least one conversation.")
    return rows


def row_from(record: Any, where: str, folder: Path, require_answer: bool = True) -> Row:
    """One parsed record as a Row; ``folder`` is what image paths are relative to. Raises MBQError naming ``where``."""
    if not isinstance(record, dict) or not ({"messages", "conversations"} & record.keys()):
        raise MBQError(
            f'{where}: a row must be an object with "messages" (OpenAI style) or "conversations" (LLaVA style).'
        )
    turns = record["messages"] if "messages" in record else record["conversations"]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise MBQError(f"{where}: the conversation must be a list of at least one message; mend the row.")
    own = record.get("image", record.get("images"))
    given = [own] if own is not None and not isinstance(own, list) else (own or [])
    waiting = iter([image_source(image, folder, where) for image in given])
    messages = [_message(turn, waiting, folder, where) for turn in turns]
    unused = len(list(waiting))
    if unused:
        raise MBQError(
            f"{where}: {len(given)} images but {unused} of them without a place; put one {MARKER} where each belongs."
        )
    answers = [text_of(message) for message in messages if message["role"] == "assistant"]
    if require_answer and not (answers and all(answer.strip() for answer in answers)):
        raise MBQError(f"{where}: the row has no answer; give it an assistant message with text, or leave the row out.")
    task = record.get("task")
    condition = condition_from(record.get("condition"), where)
    return Row(messages, where, None if task is None else str(task), condition)


def _message(turn: dict[str, Any], waiting: Iterator[ImageSource], folder: Path, where: str) -> dict[str, Any]:
    name = turn.get("role", turn.get("from"))
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise MBQError(f"{where}: unknown role {name!r}; use one of {', '.join(_ROLES)}.")
    content = turn.get("content", turn.get("value"))
    if isinstance(content, str):
        content = _split_markers(content)
    if content is None:
        content = []
    if not isinstance(content, list):
        raise MBQError(f"{where}: a message's content must be a text or a list of parts; mend the row.")
    parts = [_part(part, waiting, folder, where) for part in content]
    if role != "user" and any(part["type"] == "image" for part in parts):
        raise MBQError(f"{where}: an image stands in the {role}'s turn; images belong in the user's turns.")
    return {"role": role, "content": parts}


def _split_markers(text: str) -> list[dict[str, Any]]:
    """ "<image>\nWhat is this?" as parts. Line breaks beside a marker belong to it: chat templates write their own."""
    pieces = text.split(MARKER)
    if len(pieces) == 1:
        return [{"type": "text", "text": text}]
    parts: list[dict[str, Any]] = []
    for index, piece in enumerate(pieces):
        if index:
            parts.append({"type": "image"})
            piece = piece.lstrip("\n")
        if index < len(pieces) - 1:
            piece = piece.rstrip("\n")
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _part(part: Any, waiting: Iterator[ImageSource], folder: Path, where: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind not in ("image", "image_url"):
        raise MBQError(f'{where}: a part must be {{"type": "text", "text": ...}} or {{"type": "image", "image": ...}}.')
    values = (part.get(key) for key in ("image", "image_url", "url", "path"))
    value = next((value for value in values if value is not None), None)
    if isinstance(value, dict):  # OpenAI's {"image_url": {"url": ...}}, or a stored picture of datasets
        value = value.get("url", value)
    source = next(waiting, None) if value is None else image_source(value, folder, where)
    if source is None:
        raise MBQError(f"{where}: an image marker without an image; give the row as many images as it has markers.")
    return {"type": "image", "image": source}


def check_images(rows: Sequence[Row]) -> None:
    """Raise MBQError for the first row whose picture file is missing, before any work is done."""
    for row in rows:
        for source in row.images:
            if isinstance(source, Path) and not source.is_file():
                image_bytes(source, row.where)


def data_hash(rows: Sequence[Row]) -> str:
    """SHA-256 of what the rows say and of their pictures' bytes, in order; where the files lie does not matter."""
    digest = hashlib.sha256()
    for row in rows:
        pictures = [hashlib.sha256(image_bytes(source, row.where)).hexdigest() for source in row.images]
        digest.update(json.dumps([row.chat, pictures], sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, parsed record) of a JSON list or a JSONL file."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise MBQError(f"{path.name}, line {line}: the file is not UTF-8; save it in that encoding.") from None
    yield from _list_items(text, path.name) if text.lstrip().startswith("[") else _lines(text, path.name)


def _lines(text: str, name: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: a JSON string may hold U+2028
        if line.strip():
            where = f"{name}, line {number}"
            try:
                yield where, json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise _not_json(where, error) from None


def _list_items(text: str, name: str) -> Iterator[tuple[str, Any]]:
    """The items one by one, so that each knows its line."""
    decoder = json.JSONDecoder()
    place, counted, line = text.index("[") + 1, 0, 1
    while True:
        place = _BLANK.match(text, place).end()  # type: ignore[union-attr]  # it matches nothing, too
        line += text.count("\n", counted, place)
        counted = place
        where = f"{name}, line {line}"
        if text[place : place + 1] == "]":
            rest = text[place + 1 :].lstrip()
            if rest:
                line = text.count("\n", 0, len(text) - len(rest)) + 1
                raise MBQError(f"{name}, line {line}: there is more after the end of the list; keep one list a file.")
            return
        try:
            item, place = decoder.raw_decode(text, place)
        except (json.JSONDecodeError, RecursionError) as error:
            raise _not_json(f"{name}, line {getattr(error, 'lineno', line)}", error) from None
        yield where, item
        place = _BLANK.match(text, place).end()  # type: ignore[union-attr]
        if text[place : place + 1] == ",":
            place += 1
        elif text[place : place + 1] != "]":
            line += text.count("\n", counted, place)
            raise MBQError(f"{name}, line {line}: the list is not closed; the file may be cut off, so fetch it again.")


def _not_json(where: str, error: Exception) -> MBQError:
    reason = getattr(error, "msg", "nested too deeply")
    return MBQError(
        f"{where}: not valid JSON ({reason}); mend the line, or fetch the file again if it was cut off (it holds one "
        "JSON object a line, or one JSON list)."
    )
