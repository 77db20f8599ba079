"""A Hugging Face dataset folder of pictures and captions, as records that ``rows.py`` reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from mbq.errors import MBQError

# Column names of the public copies of COCO captions, Flickr30k and Conceptual Captions.
IMAGE_COLUMNS = ("image", "img", "jpg", "image_path", "file_name", "filename", "filepath")
CAPTION_COLUMNS = ("caption", "captions", "sentences", "sentences_raw", "alt_text", "txt", "text")
CHAT_COLUMNS = ("messages", "conversations")
_MARKS = ("dataset_info.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True)
class DatasetImage:
    """A picture inside a dataset, read when it is needed: a dataset of 100,000 does not fit in memory."""

    dataset: Any
    index: int
    column: str

    def read(self) -> bytes:
        stored = self.dataset[self.index][self.column]
        if stored is None:
            raise FileNotFoundError(str(self))
        return stored["bytes"] if stored["bytes"] is not None else Path(stored["path"]).read_bytes()

    def __str__(self) -> str:
        return f"of column {self.column!r}, row {self.index}"


def dataset_records(path: Path, prompt: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, record) for each row of the dataset in ``path``; a caption becomes the answer to ``prompt``.

    Of several captions of a picture the first is taken. Of several splits, "train".
    Raises MBQError if the folder holds no dataset, or one without columns that are known.
    """
    dataset = _load(path)
    features = dataset.features
    image_column = next((name for name, feature in features.items() if isinstance(feature, datasets.Image)), None)
    image_column = image_column or next((name for name in IMAGE_COLUMNS if name in features), None)
    chat_column = next((name for name in CHAT_COLUMNS if name in features), None)
    text_column = chat_column or next((name for name in CAPTION_COLUMNS if name in features), None)
    if text_column is None or (image_column is None and chat_column is None):
        raise MBQError(
            f"{path.name} has the columns {', '.join(features)}, but an image column ({', '.join(IMAGE_COLUMNS)}) and "
            f"a caption column ({', '.join(CAPTION_COLUMNS)}) are needed; rename them."
        )
    stored = image_column is not None and isinstance(features[image_column], datasets.Image)
    if stored:
        dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    texts = dataset.select_columns([text_column] if stored or image_column is None else [text_column, image_column])
    for index in range(len(dataset)):
        where = f"{path.name}, row {index}"
        row = texts[index]
        picture = DatasetImage(dataset, index, image_column) if stored and image_column else row.get(image_column)
        if chat_column is not None:
            yield where, {chat_column: row[chat_column], **({"image": picture} if image_column else {})}
        else:
            yield where, _captioned(prompt, _caption(row[text_column]), picture)


def _captioned(prompt: str, caption: str, picture: Any) -> dict[str, Any]:
    question = [{"type": "image", "image": picture}, {"type": "text", "text": prompt}]
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": caption}]}


def _caption(value: Any) -> str:
    """A text, the first of several, or the "raw" field of COCO's sentences; "" is reported as a row without answer."""
    if isinstance(value, list):
        return _caption(value[0]) if value else ""
    if isinstance(value, dict):
        return _caption(value.get("raw"))
    return value if isinstance(value, str) else ""


def _load(path: Path) -> Any:
    if not any((path / name).is_file() for name in _MARKS):
        raise MBQError(
            f"{path} is a folder but no dataset; give a JSON or JSONL file, or a folder written by save_to_disk."
        )
    try:
        dataset = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise MBQError(f"The dataset in {path} cannot be read ({reason}); save it again with save_to_disk.") from error
    if not isinstance(dataset, datasets.DatasetDict):
        return dataset
    if "train" in dataset:
        return dataset["train"]
    if len(dataset) == 1:
        return next(iter(dataset.values()))
    raise MBQError(f"{path} has the splits {', '.join(dataset)} and no train; give the folder of one of them.")
