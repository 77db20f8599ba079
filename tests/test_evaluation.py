"""Scoring by one forward pass says what real generation says."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
import torch

from mbq.errors import MBQError
from mbq.evaluation import answers, evaluate, prepare, score, select
from mbq.evaluation.packed import PackedDecoder
from mbq.evaluation.questions import encode
from mbq.evaluation.scoring import _plain_logits
from mbq.rows import Row, text_of
from tests import tiny

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files, of two sizes: rows that name the same file are about the same picture."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{i}.png" for i in range(4)]
    for i, path in enumerate(paths):
        tiny.picture(i, 56 * (1 + i % 2)).save(path)
    return paths


def row(text: str, answer: str, picture: Any = None, task: str | None = None) -> Row:
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if picture is not None:
        content.insert(0, {"type": "image", "image": picture})
    return Row([{"role": "user", "content": content}, said(answer)], f"row {text}", task)


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def generated(model: Any, processor: Any, asked: Row, length: int) -> list[int]:
    """The obvious way: one question at a time, through generate; the new tokens, end of turn included."""
    prompt = processor.apply_chat_template(asked.chat[:-1], add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[prompt], images=asked.open_images() or None, return_tensors="pt")
    out = model.generate(**inputs, do_sample=False, max_new_tokens=length)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def brief(family: str) -> tuple[Any, Any]:
    """A tiny model that only writes letters and whose turn ends with any capital, so that answers are short."""
    model, processor = tiny.tiny(family, seed=3)
    tokenizer = processor.tokenizer
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in string.ascii_letters]
    head = model.get_output_embeddings() or model.language_model.get_output_embeddings()
    with torch.no_grad():
        keep = torch.zeros_like(head.weight)
        keep[letters] = 1
        head.weight.mul_(keep)
    model.generation_config.eos_token_id = letters[26:]
    return model, processor


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
def test_one_forward_pass_agrees_with_generation(
    family: str, packed: bool, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not packed:  # as for models whose decoder cannot be called apart
        monkeypatch.setattr(PackedDecoder, "supports", lambda model: False)
    model, processor = brief(family)
    rows, expected = [], []
    for i in range(24):
        asked = row(f"Question {i}?" + " more" * (i % 3), "", pictures[i % 4] if i % 5 else None)
        tokens = generated(model, processor, asked, 12)
        own = processor.tokenizer.decode(tokens[:-1])
        answer = [own, own, own + "a", own[:-1] + "q"][i % 4]  # twice right, then too long, then a wrong last letter
        reference = processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
        expected.append(tokens[:-1] == reference and len(tokens) < 12)
        rows.append(Row([asked.messages[0], said(answer)], "a row"))
    assert 6 <= sum(expected) <= 12
    questions = prepare(rows, processor, batch_size=5)
    assert score(model, questions).tolist() == expected
    assert score(model, questions).tolist() == expected  # for most families from the embeddings that were kept


@pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
def test_questions_that_share_a_picture_get_the_logits_of_separate_ones(family: str, pictures: list[Path]) -> None:
    model, processor = tiny.tiny(family)
    rows = [row(f"What is {i}?" + " and more" * (i % 3), "ab" * (i % 4 + 1), pictures[i % 4]) for i in range(14)]
    rows += [row("What is left of it?", "red")]
    questions = prepare(rows, processor, batch_size=6)
    assert sorted(len(group) for group in questions.groups) == [1, 3, 3, 4, 4]
    packed = PackedDecoder(model, questions)
    with torch.inference_mode():
        for number, batch in enumerate(questions.batches):
            for _ in range(2):  # computed, then kept
                torch.testing.assert_close(
                    packed.logits(number), _plain_logits(model, questions, batch), atol=1e-4, rtol=1e-4
                )


@pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
def test_prompts_of_one_picture_have_the_tokens_that_the_processor_gives(family: str, pictures: list[Path]) -> None:
    _, processor = tiny.tiny(family)
    rows = [row(text, "a", pictures[1]) for text in ("\n leading", "  two", "What?", ".", "éø ", "7 7")]
    questions = prepare(rows, processor)
    assert len(questions.groups) == 1
    batch = questions.batches[0]
    for index, prompt in enumerate(questions.prompts, start=1):
        mine = batch.ids[0][(batch.segment[0] == 0) | (batch.segment[0] == index)].tolist()
        real = encode([prompt], [rows[index - 1]], processor)["input_ids"][0].tolist()
        assert mine == real + questions.answers[index - 1]


def test_embeddings_are_kept_for_models_with_the_same_tower_only(pictures: list[Path]) -> None:
    model, processor = tiny.tiny("internvl")
    questions = prepare([row("What?", "red", pictures[0])], processor)
    score(model, questions)
    first = next(iter(questions.kept))
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.down_proj.weight.mul_(2)
    score(model, questions)
    assert list(questions.kept) == [first]
    with torch.no_grad():
        model.model.vision_tower.encoder.layer[0].mlp.fc1.weight.mul_(2)
    score(model, questions)
    assert list(questions.kept) != [first]


def test_answers_are_what_generation_writes_for_each_row_alone(pictures: list[Path]) -> None:
    model, processor = brief("qwen2_vl")
    rows = [row(f"Question {i}?" * (i + 1), "", pictures[i] if i % 2 else None) for i in range(4)]
    expected = [
        processor.tokenizer.decode(generated(model, processor, asked, 6), skip_special_tokens=True) for asked in rows
    ]
    assert answers(model, processor, rows, max_new_tokens=6) == expected


def test_select_takes_the_first_of_each_task_and_names_the_known_ones() -> None:
    rows = [row(str(i), "a", task="even" if i % 2 == 0 else "odd") for i in range(6)]
    assert [text_of(chosen.messages[0]) for chosen in select(rows, limit=2)] == ["0", "1", "2", "3"]
    assert [text_of(chosen.messages[0]) for chosen in select(rows, ["odd"])] == ["1", "3", "5"]
    with pytest.raises(MBQError, match="Unknown task 'prime'; choose from even, odd"):
        select(rows, ["prime"])


def test_nothing_to_ask_and_no_answer_are_sentences() -> None:
    _, processor = tiny.tiny("internvl")
    with pytest.raises(MBQError, match="no questions"):
        prepare([], processor)
    with pytest.raises(MBQError, match="the last message is no answer"):
        prepare([Row(row("What?", "a").messages[:1], "row 1")], processor)


def test_evaluate_sorts_answers_by_task(pictures: list[Path]) -> None:
    model, processor = brief("internvl")
    asked = [row(f"Question {i}?", "", pictures[i % 2] if i % 3 else None) for i in range(9)]
    rows = []
    for i, blank in enumerate(asked):
        own = processor.tokenizer.decode(generated(model, processor, blank, 12)[:-1])
        answer = own if i < 5 else own + "q"
        rows.append(Row([blank.messages[0], said(answer)], "a row", "seen" if i % 3 else "told"))
    results = evaluate(model, prepare(rows, processor, batch_size=2), "tiny")
    assert results.image_tasks == ("seen",)
    assert results.text_tasks == ("told",)
    assert results.correct["seen"].tolist() == [True, True, True, False, False, False]
    assert results.correct["told"].tolist() == [True, True, False]
    one, other = results.pictures["seen"][:2]
    assert one != other
    assert results.pictures["seen"].tolist() == [one, other, other, one, one, other]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
def test_scores_on_a_gpu_are_those_of_the_cpu(family: str, pictures: list[Path]) -> None:
    model, processor = brief(family)
    rows = []
    for i in range(12):
        asked = row(f"Question {i}?", "", pictures[i % 4] if i % 3 else None)
        own = processor.tokenizer.decode(generated(model, processor, asked, 12)[:-1])
        rows.append(Row([asked.messages[0], said(own if i % 2 else own + "q")], "a row"))
    questions = prepare(rows, processor, batch_size=5)
    expected = score(model, questions).tolist()
    assert any(expected)
    assert score(model.to("cuda"), questions).tolist() == expected
