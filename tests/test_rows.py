"""What people's files say is what the model gets to see; and whatever is wrong with them is named with its line."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from mbq.errors import MBQError
from mbq.rows import Row, check_images, data_hash, read_rows, text_of


def colour(value: int) -> Image.Image:
    return Image.new("RGB", (8, 6), (value, 0, 0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures a.png, b.png and sub/c.png, whose red is 10, 20 and 30."""
    (tmp_path / "pictures" / "sub").mkdir(parents=True)
    for value, name in ((10, "a.png"), (20, "b.png"), (30, "sub/c.png")):
        colour(value).save(tmp_path / "pictures" / name)
    return tmp_path / "pictures"


def write(tmp_path: Path, *rows: Any, name: str = "calib.jsonl") -> Path:
    path = tmp_path / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def chat(*turns: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


def llava(*turns: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": value} for role, value in turns], **more}


GOOD = chat(("user", "What is two and two?"), ("assistant", "four"))


def shape_of(row: Row) -> list[tuple[str, list[str]]]:
    """Roles and parts, a picture as "*"."""
    return [(message["role"], [part.get("text", "*") for part in message["content"]]) for message in row.messages]


def reds(row: Row) -> list[int]:
    return [int(np.asarray(image)[0, 0, 0]) for image in row.open_images()]


def test_openai_messages_with_image_parts(tmp_path: Path, folder: Path) -> None:
    data = "data:image/png;base64," + base64.b64encode((folder / "b.png").read_bytes()).decode()
    content = [
        {"type": "image", "image": "a.png"},
        {"type": "text", "text": "Compare."},
        {"type": "image_url", "image_url": {"url": data}},
        {"type": "image_url", "image_url": {"url": (folder / "sub/c.png").as_uri()}},
        {"type": "image_url", "image_url": "sub/c.png"},
    ]
    path = write(tmp_path, chat(("system", "Be brief."), ("user", content), ("assistant", "Reds."), task="compare"))
    (row,) = read_rows(path, folder)
    assert shape_of(row) == [
        ("system", ["Be brief."]),
        ("user", ["*", "Compare.", "*", "*", "*"]),
        ("assistant", ["Reds."]),
    ]
    assert reds(row) == [10, 20, 30, 30]
    assert (row.task, row.where) == ("compare", "calib.jsonl, line 1")
    assert all(part.keys() <= {"type", "text"} for message in row.chat for part in message["content"])


def test_llava_conversations_with_markers(tmp_path: Path, folder: Path) -> None:
    path = write(
        tmp_path,
        llava(("human", "<image>\nWhat is it?"), ("gpt", "A\nred one."), image="a.png"),
        llava(
            ("human", "Is <image> like\n<image>"),
            ("gpt", "No."),
            ("human", "And?"),
            ("gpt", "Yes."),
            image=["a.png", "sub/c.png"],
        ),
        llava(("human", "What is two and two?"), ("gpt", "four")),
    )
    one, several, text_only = read_rows(path, folder)
    assert shape_of(one) == [("user", ["*", "What is it?"]), ("assistant", ["A\nred one."])]
    assert shape_of(several)[0] == ("user", ["Is ", "*", " like", "*"])
    assert [text_of(message) for message in several.messages[1:]] == ["No.", "And?", "Yes."]
    assert [reds(row) for row in (one, several, text_only)] == [[10], [10, 30], []]


def test_markers_in_messages_take_the_images_of_the_row(tmp_path: Path, folder: Path) -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    path = write(
        tmp_path,
        chat(("user", "<image>What?"), ("assistant", "Red."), images=["b.png"]),
        chat(("user", parts), ("assistant", "Red."), images=["b.png"]),
    )
    first, second = read_rows(path, folder)
    assert shape_of(first) == shape_of(second)
    assert reds(first) == reds(second) == [20]


def test_a_json_list_gives_the_rows_of_the_lines_file_and_counts_lines(tmp_path: Path, folder: Path) -> None:
    records = [GOOD, llava(("human", "<image>\nWhat?"), ("gpt", "Red."), image="a.png"), GOOD]
    lines = read_rows(write(tmp_path, *records), folder)
    whole = tmp_path / "calib.json"
    whole.write_text(json.dumps(records, indent=1))
    listed = read_rows(whole, folder)
    assert [row.messages for row in listed] == [row.messages for row in lines]
    starts = [number for number, line in enumerate(whole.read_text().split("\n"), 1) if line == " {"]
    assert [row.where for row in listed] == [f"calib.json, line {number}" for number in starts]
    assert len(read_rows(whole, folder, limit=2)) == 2


def test_blank_lines_a_byte_order_mark_and_line_separators_in_strings_are_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "calib.jsonl"
    row = json.dumps(chat(("user", "a\u2028b"), ("assistant", "é")), ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + f"\n{row}\r\n\n{row}".encode())
    first, second = read_rows(path)
    assert text_of(first.messages[0]) == "a\u2028b"
    assert [first.where, second.where] == ["calib.jsonl, line 2", "calib.jsonl, line 4"]


def test_image_paths_are_relative_to_the_data_file_where_no_folder_is_given(folder: Path) -> None:
    path = write(folder, llava(("human", "<image>\nWhat?"), ("gpt", "Red."), image="sub/c.png"))
    assert reds(read_rows(path)[0]) == [30]


def test_pictures_come_upright_and_rgb(tmp_path: Path) -> None:
    picture = Image.new("L", (8, 6), 9)
    exif = picture.getexif()
    exif[0x0112] = 6  # taken with the camera turned by 90 degrees
    picture.save(tmp_path / "turned.jpg", exif=exif)
    path = write(tmp_path, llava(("human", "<image>\nWhat?"), ("gpt", "Grey."), image="turned.jpg"))
    (image,) = read_rows(path)[0].open_images()
    assert (image.size, image.mode) == ((6, 8), "RGB")


CAPTIONS: dict[str, tuple[dict[str, list[Any]], str]] = {
    "one caption": ({"caption": ["A red one.", "A green one."]}, "image"),
    "flickr30k": (
        {"caption": [["A red one.", "Red."], ["A green one.", "Green."]], "sentids": [["0"], ["1"]]},
        "image",
    ),
    "coco, karpathy": ({"sentences": [["A red one."], ["A green one."]], "cocoid": [1, 2]}, "image"),
    "coco, raw": ({"sentences": [{"raw": "A red one.", "imgid": 0}, {"raw": "A green one.", "imgid": 1}]}, "image"),
    "coco 2017": ({"captions": [["A red one."], ["A green one."]]}, "image"),
    "conceptual captions": ({"alt_text": ["A red one.", "A green one."]}, "image"),
    "webdataset": ({"__key__": ["0", "1"], "txt": ["A red one.", "A green one."]}, "jpg"),
}


@pytest.mark.parametrize("kind", CAPTIONS)
def test_caption_datasets(kind: str, tmp_path: Path) -> None:
    columns, image_column = CAPTIONS[kind]
    features = datasets.Dataset.from_dict(columns).features
    columns = {**columns, image_column: [colour(10), colour(20)]}
    features[image_column] = datasets.Image()
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "set")
    rows = read_rows(tmp_path / "set", prompt="Say what you see.")
    assert [shape_of(row) for row in rows] == [
        [("user", ["*", "Say what you see."]), ("assistant", [caption])] for caption in ("A red one.", "A green one.")
    ]
    assert [reds(row) for row in rows] == [[10], [20]]
    assert rows[1].where == "set, row 1"


def test_a_dataset_may_name_its_pictures_by_path(tmp_path: Path, folder: Path) -> None:
    columns = {"file_name": ["a.png", "sub/c.png"], "caption": ["A.", "C."]}
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "set")
    assert [reds(row) for row in read_rows(tmp_path / "set", folder)] == [[10], [30]]


def test_a_dataset_may_hold_conversations(tmp_path: Path) -> None:
    turns = llava(("human", "<image>\nWhat?"), ("gpt", "Red."))["conversations"]
    columns = {"conversations": [turns], "image": [colour(10)]}
    features = datasets.Dataset.from_dict({"conversations": [turns]}).features
    features["image"] = datasets.Image()
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "set")
    (row,) = read_rows(tmp_path / "set")
    assert shape_of(row) == [("user", ["*", "What?"]), ("assistant", ["Red."])]
    assert reds(row) == [10]


def test_of_several_splits_train_is_taken(tmp_path: Path) -> None:
    def split(caption: str) -> datasets.Dataset:
        return datasets.Dataset.from_dict({"image": ["x.png"], "caption": [caption]})

    datasets.DatasetDict({"test": split("T."), "train": split("R.")}).save_to_disk(tmp_path / "both")
    assert text_of(read_rows(tmp_path / "both")[0].messages[1]) == "R."
    datasets.DatasetDict({"test": split("T.")}).save_to_disk(tmp_path / "one")
    assert text_of(read_rows(tmp_path / "one")[0].messages[1]) == "T."
    datasets.DatasetDict({"test": split("T."), "dev": split("D.")}).save_to_disk(tmp_path / "neither")
    with pytest.raises(MBQError, match=r"splits test, dev"):
        read_rows(tmp_path / "neither")


def test_the_hash_follows_the_words_and_the_pictures_but_not_the_place(tmp_path: Path, folder: Path) -> None:
    def hashed(where: Path, text: str = "Red.", image: str = "a.png") -> str:
        return data_hash(read_rows(write(tmp_path, llava(("human", "<image>"), ("gpt", text), image=image)), where))

    moved = tmp_path / "moved"
    folder_hash = hashed(folder)
    folder.rename(moved)
    assert hashed(moved) == folder_hash
    assert len({folder_hash, hashed(moved, text="Blue."), hashed(moved, image="b.png")}) == 3
    colour(99).save(moved / "a.png")
    assert hashed(moved) != folder_hash
    assert re.fullmatch("[0-9a-f]{64}", folder_hash)


PICTURED = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]
BAD_ROWS: dict[str, tuple[Any, str]] = {
    "a truncated object": ('{"messages": [{"role": "user", "con', "not valid JSON"),
    "no object": (["user", "assistant"], "must be an object"),
    "an unknown format": ({"question": "What?", "answer": "That."}, '"messages".*"conversations"'),
    "no message": ({"messages": []}, "at least one message"),
    "a conversation that is a text": ({"conversations": "human: What?"}, "at least one message"),
    "an unknown role": (chat(("user", "What?"), ("robot", "That.")), "unknown role 'robot'"),
    "no answer": (chat(("user", "What?")), "no answer"),
    "an empty answer": (llava(("human", "What?"), ("gpt", " \n")), "no answer"),
    "an answer that is null": (chat(("user", "What?"), ("assistant", None)), "no answer"),
    "an image without a marker": (llava(("human", "What?"), ("gpt", "Red."), image="a.png"), "put one <image>"),
    "more images than markers": (
        llava(("human", "<image>"), ("gpt", "Red."), image=["a.png", "b.png"]),
        "2 images but 1 of them without a place",
    ),
    "a marker without an image": (llava(("human", "<image>\nWhat?"), ("gpt", "Red.")), "marker without an image"),
    "an image part without an image": (chat(("user", [{"type": "image"}]), ("assistant", "Red.")), "without an image"),
    "an image in an answer": (chat(("user", "Draw."), ("assistant", PICTURED)), "the assistant's turn"),
    "an unknown part": (chat(("user", [{"type": "audio", "audio": "a.wav"}]), ("assistant", "Red.")), "a part must be"),
    "content that is a number": (chat(("user", 7), ("assistant", "Red.")), "content must be"),
    "an image that is a number": (llava(("human", "<image>"), ("gpt", "Red."), image=7), "not int"),
    "an image that is null": (llava(("human", "<image>"), ("gpt", "Red."), image=[None]), "not NoneType"),
    "bad base64": (llava(("human", "<image>"), ("gpt", "Red."), image="data:image/png;base64,?"), "base64"),
    "a web address": (llava(("human", "<image>"), ("gpt", "Red."), image="https://example.org/a.png"), "download it"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_named_with_its_file_and_line(kind: str, tmp_path: Path, folder: Path) -> None:
    bad, message = BAD_ROWS[kind]
    path = write(tmp_path, GOOD, "", bad, GOOD)
    with pytest.raises(MBQError, match=message) as caught:
        read_rows(path, folder)
    assert str(caught.value).startswith("calib.jsonl, line 3: ")
    assert_one_sentence(caught.value)


def assert_one_sentence(error: BaseException) -> None:
    text = str(error)
    assert text.endswith(".")
    assert "\n" not in text
    assert ". " not in text


def test_rows_without_answers_are_questions_where_none_is_required(tmp_path: Path) -> None:
    (row,) = read_rows(write(tmp_path, chat(("user", "What?"))), require_answer=False)
    assert shape_of(row) == [("user", ["What?"])]


@pytest.mark.parametrize(
    ("end", "line"),
    [("", 3), (" ", 3), (', {"mess', 3), (",", 3), ("]\n]", 4), (" {}]", 3)],
    ids=["no end", "blank end", "inside a row", "after a comma", "twice the end", "no comma"],
)
def test_a_broken_list_is_named_with_its_line(end: str, line: int, tmp_path: Path) -> None:
    path = tmp_path / "calib.json"
    path.write_text(f"[\n{json.dumps(GOOD)},\n{json.dumps(GOOD)}{end}")
    with pytest.raises(MBQError, match=rf"^calib.json, line {line}: ") as caught:
        read_rows(path)
    assert_one_sentence(caught.value)


def test_json_nested_beyond_reason_is_a_bad_line_and_not_a_crash(tmp_path: Path) -> None:
    with pytest.raises(MBQError, match=r"line 2: not valid JSON"):
        read_rows(write(tmp_path, GOOD, "[" * 200_000))


def empty(path: Path) -> None:
    path.write_text("\n")


def empty_list(path: Path) -> None:
    path.write_text("[]")


def latin(path: Path) -> None:
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + '{"messages": "é"}'.encode("latin-1"))


def plain_folder(path: Path) -> None:
    path.mkdir()


def broken_dataset(path: Path) -> None:
    path.mkdir()
    (path / "dataset_info.json").write_text("{")
    (path / "state.json").write_text("{")


def strange_columns(path: Path) -> None:
    datasets.Dataset.from_dict({"picture": ["a.png"], "label": [3]}).save_to_disk(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist; check --data"),
        (empty, "holds no rows"),
        (empty_list, "holds no rows"),
        (latin, "line 2: the file is not UTF-8"),
        (plain_folder, "no dataset"),
        (broken_dataset, "cannot be read"),
        (strange_columns, "columns picture, label, but"),
    ],
)
def test_bad_data_files(make: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    make(tmp_path / "calib")
    with pytest.raises(MBQError, match=message) as caught:
        read_rows(tmp_path / "calib")
    assert_one_sentence(caught.value)


def test_a_missing_image_folder(tmp_path: Path) -> None:
    with pytest.raises(MBQError, match="check --images"):
        read_rows(write(tmp_path, GOOD), tmp_path / "nowhere")


def pictured(tmp_path: Path, folder: Path, image: str) -> Row:
    return read_rows(write(tmp_path, GOOD, llava(("human", "<image>"), ("gpt", "Red."), image=image)), folder)[1]


def test_a_missing_image_is_named_with_its_row(tmp_path: Path, folder: Path) -> None:
    row = pictured(tmp_path, folder, "gone.png")
    for look in (row.open_images, lambda: check_images([row]), lambda: data_hash([row])):
        with pytest.raises(MBQError, match=r"^calib.jsonl, line 2: the image .*gone.png does not exist") as caught:
            look()
        assert_one_sentence(caught.value)


@pytest.mark.parametrize("kind", ["cut off", "no picture", "empty"])
def test_a_corrupt_image_is_named_with_its_row(kind: str, tmp_path: Path, folder: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = io.BytesIO()
    Image.fromarray(noise).save(whole, "PNG")
    content = {"cut off": whole.getvalue()[:3000], "no picture": b"<html>404</html>", "empty": b""}[kind]
    (folder / "bad.png").write_bytes(content)
    row = pictured(tmp_path, folder, "bad.png")
    with pytest.raises(MBQError, match=r"^calib.jsonl, line 2: the image .*bad.png cannot be decoded"):
        row.open_images()


def test_a_folder_is_no_image(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(MBQError, match=r"sub cannot be read"):
        pictured(tmp_path, folder, "sub").open_images()
