"""Scoring by one forward pass says what real generation says."""

from __future__ import annotations

import string
from typing import Any

import pytest
import torch
from tests import tiny

from mbq.evaluation.questions import prepare
from mbq.evaluation.scoring import score
from mbq.rows import Row

torch.set_num_threads(1)


def row(text: str, answer: str, picture: int | None, task: str | None = "task") -> Row:
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if picture is not None:
        content.insert(0, {"type": "image", "image": tiny.picture(picture)})
    return Row([{"role": "user", "content": content}, said(answer)], f"row about picture {picture}", task)


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


@pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
def test_one_forward_pass_agrees_with_generation(family: str) -> None:
    model, processor = brief(family)
    rows, expected = [], []
    for i in range(24):
        asked = row(f"Question {i}?" + " more" * (i % 3), "", i % 4 if i % 5 else None)
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
