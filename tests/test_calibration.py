"""Every token's role is exact: checked against token ids found by other means, for each family's real processor."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from mbq.calibration import (
    INTERLEAVED_TOKENS,
    NO_LABEL,
    CalibrationBatch,
    calibration_batches,
    language_mask,
    released_language_mask,
    sample_rows,
)
from mbq.errors import MBQError
from mbq.rows import Row
from tests.chats import END, one, row, said, vision_ids
from tests.tiny import ALL_FAMILY_NAMES, picture, tiny

# Vision tokens of one 56x56 picture. LLaVA-OneVision: 2x2 of the base view, 2x2 of one tile, a newline a row of it.
# InternVL: one tile of 4. Qwen2-VL: 4x4 patches of 14 pixels, merged 2x2.
ONE_PICTURE = {"llava_onevision": 4 + 4 + 2, "internvl": 4, "qwen2_vl": 4, "internvl2_internlm2": 4}
# Of each of several: LLaVA-OneVision then has the base view only, and its newline.
OF_SEVERAL = {"llava_onevision": 4 + 1, "internvl": 4, "qwen2_vl": 4, "internvl2_internlm2": 4}


@pytest.fixture(scope="module", params=ALL_FAMILY_NAMES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def made(family: str) -> tuple[Any, Any]:
    return tiny(family)


@pytest.fixture(scope="module")
def processor(made: tuple[Any, Any]) -> Any:
    return made[1]


def common(ids: list[int], other: list[int]) -> int:
    """The length of the longest common prefix."""
    return next(i for i, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b)


ANSWERS = [
    "yes",
    "A red circle is left of a blue square.",
    "7",
    "Two\n\nlines, and a space at the end ",
    "Größe: 3 → 4 ☂",
    "What is shown in the picture?",  # the question's own words
    "user",  # a word of the chat template
    "'quoted', in {braces} and <angles>",
]


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_labels_are_the_tokens_that_change_with_the_answer(answer: str, pictures: int, processor: Any) -> None:
    """The reference needs no offsets: two chats that differ in the answer only have their tokens before and behind it
    in common, and the answer's tokens are what is left, plus the end of the turn."""

    def ids_of(text: str) -> list[int]:
        return encoded(text).inputs["input_ids"][0].tolist()

    def encoded(text: str) -> CalibrationBatch:
        return one(row([*range(pictures), "What is shown in the picture?"], text), processor)

    batch, ids = encoded(answer), ids_of(answer)
    others = [ids_of(text) for text in ("#", "{")]
    start = min(common(ids, other) for other in others)
    stop = len(ids) - min(common(ids[::-1], other[::-1]) for other in others) + 1  # all share the end-of-turn token
    labelled = (batch.labels[0] != NO_LABEL).nonzero()[:, 0].tolist()
    assert labelled == list(range(start, stop))
    assert batch.labels[0, labelled].tolist() == ids[start:stop]
    assert said(processor, batch).lstrip(" ") == answer + END
    assert ids[stop - 1] == processor.tokenizer.convert_tokens_to_ids(END)


def test_every_turn_of_a_long_conversation_is_answered(processor: Any) -> None:
    turns = [[0, "What is it?"], "A star.", "Sure?", "Yes.", ["And", 1, "here?"], "A star.", "Sure?", "Yes."]
    batch = one(row(*turns), processor)
    ended = [answer + END for answer in turns[1::2]]
    assert said(processor, batch).replace(" Yes", "Yes").replace(" A star", "A star") == "".join(ended)


def test_language_positions_predict_the_answer_and_the_released_mask_is_the_answer(processor: Any) -> None:
    batch = one(row([0, "What color is it?"], "Yellow."), processor)
    ids = batch.inputs["input_ids"][0]
    positions = language_mask(batch)[0].nonzero()[:, 0]
    answers = released_language_mask(batch)[0].nonzero()[:, 0]
    assert ids[positions + 1].tolist() == batch.labels[0, answers].tolist()
    assert (positions + 1).tolist() == answers.tolist()
    assert not (language_mask(batch) & batch.vision).any()


def test_a_one_word_answer_has_exactly_the_positions_before_its_tokens(processor: Any) -> None:
    batch = one(row([0, "Which number?"], "7"), processor)
    ids = batch.inputs["input_ids"][0]
    seven = processor.tokenizer.convert_tokens_to_ids("7")
    end = processor.tokenizer.convert_tokens_to_ids(END)
    (place,) = (ids == seven).nonzero()[:, 0].tolist()
    assert language_mask(batch)[0].nonzero()[:, 0].tolist() == [place - 1, place]
    assert released_language_mask(batch)[0].nonzero()[:, 0].tolist() == [place, place + 1]
    assert ids[place + 1] == end


def test_vision_tokens_are_the_pictures_tokens(family: str, processor: Any) -> None:
    for pictures in range(4):
        batch = one(row([*range(pictures), "What?"], "A star."), processor)
        each = ONE_PICTURE if pictures < 2 else OF_SEVERAL
        assert int(batch.vision.sum()) == pictures * each[family]
        is_image = batch.inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids(processor.image_token)
        assert torch.equal(batch.vision, is_image)
        assert not (batch.vision & (batch.labels != NO_LABEL)).any()


MIXED = [
    row([0, "What?"], "A star."),
    row("How many are two and two?", "four"),
    row([1, 2, "Compare the two pictures."], "They are alike.", "Sure?", "Yes."),
    row([3, "Describe the image."], "The image shows two green triangles and the number 7."),
]


def test_a_batch_of_mixed_lengths_equals_the_singles(made: tuple[Any, Any]) -> None:
    model, processor = made
    options: dict[str, Any] = {"num_samples": 4, "seed": 3}
    singles = calibration_batches(MIXED, processor, vision_ids(processor), batch_size=1, **options)
    (batch,) = calibration_batches(MIXED, processor, vision_ids(processor), batch_size=4, **options)
    assert all(tensor.shape == batch.labels.shape for tensor in (batch.vision, batch.inputs["attention_mask"]))
    with torch.no_grad():
        logits = model(**batch.inputs).logits
        for index, single in enumerate(singles):
            length = single.labels.shape[1]
            assert torch.equal(batch.inputs["input_ids"][index, :length], single.inputs["input_ids"][0])
            assert torch.equal(batch.labels[index, :length], single.labels[0])
            assert torch.equal(batch.vision[index, :length], single.vision[0])
            assert batch.inputs["attention_mask"][index].tolist() == [1] * length + [0] * (len(logits[index]) - length)
            assert (batch.labels[index, length:] == NO_LABEL).all()
            assert not batch.vision[index, length:].any()
            torch.testing.assert_close(logits[index, :length], model(**single.inputs).logits[0], rtol=1e-4, atol=1e-4)


def test_the_end_of_a_long_answer_is_cut_off(processor: Any) -> None:
    whole = one(MIXED[3], processor)
    first = int((whole.labels[0] != NO_LABEL).nonzero()[0])
    for limit in (first + 1, first + 5):
        cut = one(MIXED[3], processor, max_length=limit)
        assert torch.equal(cut.labels, whole.labels[:, :limit])
        assert torch.equal(cut.vision, whole.vision[:, :limit])
        assert torch.equal(cut.inputs["input_ids"], whole.inputs["input_ids"][:, :limit])
        assert torch.equal(cut.inputs["pixel_values"], whole.inputs["pixel_values"])
        assert int(language_mask(cut).sum()) == limit - first
    with pytest.raises(MBQError, match=rf"line 1: .*whole answer; raise --max-seq-length to at least {first + 1} "):
        one(MIXED[3], processor, max_length=first)


def test_an_image_is_never_cut(processor: Any) -> None:
    late = row("Hello.", "Hello!", ["What is shown in the picture?", 0], "A star.")
    last_vision = int(one(late, processor).vision[0].nonzero()[-1])
    one(late, processor, max_length=last_vision + 1)
    with pytest.raises(MBQError, match=rf"cuts off its images; raise --max-seq-length to at least {last_vision + 1} "):
        one(late, processor, max_length=last_vision)


def numbered(count: int) -> list[Row]:
    return [row([index, f"Number {index}?"], f"It is {index}.", where=f"line {index}") for index in range(count)]


def test_the_draw_follows_the_seed_alone() -> None:
    rows = numbered(20)
    drawn = [[row.where for row in sample_rows(rows, 8, seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 8
    assert sorted(row.where for row in sample_rows(rows, 20, 0)) == sorted(row.where for row in rows)


@pytest.mark.parametrize(("formatting", "needed", "possible"), [("plain", 8, 7), ("few-shot", 16, 3)])
def test_too_few_rows(formatting: str, needed: int, possible: int, processor: Any) -> None:
    message = rf"hold 7 rows, but 8 {formatting} samples need {needed}; .*--num-calibration-samples {possible}\."
    with pytest.raises(MBQError, match=message):
        calibration_batches(numbered(7), processor, vision_ids(processor), num_samples=8, formatting=formatting)


def test_few_shot_samples_are_two_rows_in_one_conversation(family: str, processor: Any) -> None:
    rows = numbered(4)
    rows[1].messages.insert(0, {"role": "system", "content": [{"type": "text", "text": "Be brief."}]})
    batches = calibration_batches(rows, processor, vision_ids(processor), num_samples=2, formatting="few-shot", seed=1)
    drawn = sample_rows(rows, 2, 1, "few-shot")
    assert len(batches) == 2
    for batch, first, second in zip(batches, drawn[::2], drawn[1::2], strict=True):
        number = [pair.where.removeprefix("line ") for pair in (first, second)]
        assert said(processor, batch).replace(" It", "It") == f"It is {number[0]}.{END}It is {number[1]}.{END}"
        assert int(batch.vision.sum()) == 2 * OF_SEVERAL[family]
        text = processor.tokenizer.decode(batch.inputs["input_ids"][0])
        assert text.index(f"Number {number[0]}?") < text.index(f"Number {number[1]}?")
        assert text.count("system") <= 1


def test_interleaved_samples_have_512_tokens_of_text_without_a_role_between(
    family: str, processor: Any, tmp_path: Path
) -> None:
    words = random.Random(0).choices(["picture", "star", "Answer", "with", "some\n", "Wörter", "of", "length"], k=3000)
    (tmp_path / "text.txt").write_text(" ".join(words), encoding="utf-8")
    made = {
        formatting: calibration_batches(
            numbered(6),
            processor,
            vision_ids(processor),
            num_samples=3,
            formatting=formatting,
            text=tmp_path / "text.txt",
        )
        for formatting in ("few-shot", "interleaved")
    }
    passages = set()
    for plain, batch in zip(made["few-shot"], made["interleaved"], strict=True):
        assert said(processor, batch) == said(processor, plain)
        assert int(batch.vision.sum()) == int(plain.vision.sum()) == 2 * OF_SEVERAL[family]
        labelled = (batch.labels[0] != NO_LABEL).nonzero()[:, 0].tolist()
        gap, before = max((after - before, before) for before, after in pairwise(labelled))
        plain_labelled = (plain.labels[0] != NO_LABEL).nonzero()[:, 0].tolist()
        plain_gap = max(after - before for before, after in pairwise(plain_labelled))
        # The turn that holds the text: <|im_start|>user\n ... <|im_end|>\n, a few tokens; the last word may split anew.
        frame = len(processor.tokenizer("<|im_start|>user\n" + END + "\n")["input_ids"])
        assert abs(gap - plain_gap - INTERLEAVED_TOKENS - frame) <= 3
        passage = processor.tokenizer.decode(batch.inputs["input_ids"][0, before + 1 : before + 1 + INTERLEAVED_TOKENS])
        passages.add(passage)
    assert len(passages) == 3


@pytest.mark.parametrize("text", [None, "gone.txt", "short.txt", "latin.txt"])
def test_interleaved_samples_need_a_text_file(text: str | None, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("word " * (INTERLEAVED_TOKENS - 1))
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1") * 5000)
    _, processor = tiny("qwen2_vl")
    with pytest.raises(MBQError, match=text or "--text"):
        calibration_batches(
            numbered(2),
            processor,
            vision_ids(processor),
            num_samples=1,
            formatting="interleaved",
            text=text and tmp_path / text,
        )


def test_an_image_token_in_the_text_is_refused(processor: Any) -> None:
    with pytest.raises(MBQError, match=r"line 1: the row has 1 image.s., but .* 2 time"):
        one(row([0, f"What does {processor.image_token} mean?"], "An image."), processor)


def test_a_template_that_leaves_images_out_is_refused() -> None:
    _, other = tiny("qwen2_vl")
    other.chat_template = "{% for message in messages %}{{ message['content'][-1]['text'] }}{% endfor %}"
    with pytest.raises(MBQError, match=r"line 1: the row has 1 image.s., but .* 0 time"):
        one(row([0, "What?"], "A star."), other)


def test_a_question_without_an_answer_is_no_sample(processor: Any) -> None:
    with pytest.raises(MBQError, match=r"line 1: the row has no answer"):
        one(row([0, "What?"]), processor)


def test_progress_counts_samples(processor: Any) -> None:
    seen: list[int] = []
    batches = calibration_batches(
        numbered(5), processor, vision_ids(processor), num_samples=3, batch_size=2, progress=seen.append
    )
    assert seen == [1, 2, 3]
    assert [len(batch.labels) for batch in batches] == [2, 1]


@pytest.mark.parametrize("size", [(56, 56), (112, 56), (100, 61), (168, 70)])
def test_pictures_of_any_size_have_as_many_vision_tokens_as_features(
    size: tuple[int, int], made: tuple[Any, Any]
) -> None:
    """The reference is the model: it stops where features and tokens differ in number."""
    model, processor = made
    messages = row([0, "What?"], "A star.").messages
    messages[0]["content"][0]["image"] = picture(0, 168).resize(size)
    batch = one(Row(messages, "x"), processor)
    (tower,) = [
        module
        for name, module in model.named_modules()
        if name.endswith(("multi_modal_projector", "mlp1", "visual.merger"))
    ]
    features = []
    hook = tower.register_forward_hook(lambda module, args, output: features.append(output.flatten(0, -2).shape[0]))
    with torch.no_grad():
        model(**batch.inputs)
    hook.remove()
    if type(model).__name__.startswith("Llava"):  # padding is cut off and newlines are added after the projector
        assert batch.vision.sum() > 4
    else:
        assert features == [int(batch.vision.sum())]


def test_bad_images_are_found_before_the_model_sees_anything(processor: Any, tmp_path: Path) -> None:
    content = [{"type": "image", "image": tmp_path / "gone.png"}, {"type": "text", "text": "What?"}]
    rows = [
        row("What?", "A star."),
        Row([{"role": "user", "content": content}, *row("What?", "A star.").messages[1:]], "calib.jsonl, line 9"),
    ]
    with pytest.raises(MBQError, match=r"^calib.jsonl, line 9: the image .*gone.png does not exist"):
        calibration_batches(rows, processor, vision_ids(processor), num_samples=2)
