"""What a model writes to many questions at once is what it writes to each alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import mbq
from mbq.demo import reference_model
from mbq.evaluation import answers
from mbq.evaluation.run import world_questions
from mbq.evaluation.task_options import MAX_NEW_TOKENS, generation, stopped
from mbq.rows import Row, text_of
from tests import tiny

torch.set_num_threads(1)


@pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
def test_a_batch_writes_what_each_question_alone_gets(family: str, tmp_path: Path) -> None:
    """Prompts of several lengths, with pictures and without, through the trained models' own generate."""
    folder = reference_model(family)
    model, processor = mbq.load(folder, dtype="float32"), mbq.load_processor(folder)
    rows = world_questions(tmp_path, ["founder", "caption", "count", "towns", "arithmetic"], 3)
    together = answers(model, processor, rows, max_new_tokens=40, batch_size=8)
    assert together == [answers(model, processor, [row], max_new_tokens=40)[0] for row in rows]
    right = [text == text_of(row.messages[-1]) for text, row in zip(together, rows, strict=True) if row.task == "towns"]
    assert all(right), "the trained model knows its towns, so these texts are more than noise"


def test_the_caches_and_the_batches_are_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch is one call of generate, of at most the batch size, and pictures never meet questions without."""
    model, processor = tiny.tiny("internvl")
    calls: list[dict[str, Any]] = []
    own = type(model).generate

    def generate(self: Any, **inputs: Any) -> Any:
        calls.append(inputs)
        return own(self, **inputs)

    monkeypatch.setattr(type(model), "generate", generate)
    picture = {"type": "image", "image": tiny.picture(0)}
    rows = []
    for i in range(7):
        content = [*([picture] if i % 2 else []), {"type": "text", "text": "Why?" * (7 - i)}]
        said = {"role": "assistant", "content": [{"type": "text", "text": "So."}]}
        rows.append(Row([{"role": "user", "content": content}, said], f"row {i}"))
    done: list[tuple[int, int]] = []
    answers(model, processor, rows, 3, 2, lambda step, at, total, note="": done.append((at, total)))
    sizes = Counter((len(call["input_ids"]), "pixel_values" in call) for call in calls)
    assert sizes == {(2, False): 2, (2, True): 1, (1, True): 1}
    assert done[-1] == (7, 7)
    assert len(done) == 4


def test_generation_is_greedy_whatever_the_folder_asks_for() -> None:
    """Some folders bring sampling or a repetition penalty; the answer would then not be the one that is scored."""
    model, processor = tiny.tiny("qwen2_vl")
    rows = [
        Row(
            [
                {"role": "user", "content": [{"type": "text", "text": "What is it?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
            ],
            "row",
        )
    ]
    before = answers(model, processor, rows, 12)
    config = model.generation_config
    config.do_sample, config.temperature, config.repetition_penalty, config.num_beams = True, 5.0, 5.0, 3
    assert answers(model, processor, rows, 12) == before


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, {"do_sample": False, "max_new_tokens": MAX_NEW_TOKENS}),
        ({"max_new_tokens": 16, "temperature": 0, "top_p": 1.0}, {"do_sample": False, "max_new_tokens": 16}),
        ({"do_sample": True, "temperature": 0}, {"do_sample": False}),
        ({"temperature": 0.5, "top_p": 0.9}, {"do_sample": True, "temperature": 0.5, "top_p": 0.9}),
        ({"do_sample": True}, {"do_sample": True}),
        ({"num_beams": 4}, {"num_beams": 4, "do_sample": False}),
    ],
)
def test_what_tasks_ask_of_generation(asked: dict[str, Any], expected: dict[str, Any]) -> None:
    options, _ = generation(asked)
    assert options.items() >= expected.items()
    assert "until" not in options
    assert options["do_sample"] or not {"temperature", "top_p"} & options.keys()


def test_an_answer_ends_where_the_task_says() -> None:
    _, stops = generation({"until": ["\n\n", "ASSISTANT:", "Q:"]})
    assert stopped("one\n\ntwo Q: three ASSISTANT: four", stops) == "one\n\ntwo "
    assert stopped("one", stops) == "one"
    assert generation({"until": "Q:"})[1] == ["Q:"]
