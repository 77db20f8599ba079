"""Kinds of bad answers, their limits, and the intervals that a diagnosis rests on."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from mbq.conditions import Condition
from mbq.diagnosis import bad_answers
from mbq.diagnosis.bad_answers import CONDITION, NO_OUTPUT, RANDOM, REPETITION, WRONG, Limits, kind_of, looped
from mbq.diagnosis.measurements import accuracies, gap, more_often
from mbq.diagnosis.run import by_modality
from mbq.evaluation import Results, prepare
from mbq.evaluation.scoring import answer_losses
from mbq.evaluation.statistics import Interval
from mbq.rows import Row
from tests import tiny
from tests.calibrated import ANSWERS, row


@pytest.mark.parametrize(
    ("tokens", "times"),
    [
        ([], 1),
        ([5], 1),
        ([5, 5], 2),
        ([1, 2, 3, 4], 1),
        ([1, 2, 1, 2, 1, 2, 7], 3),
        ([9, 8, 7, 5, 5, 5], 1),  # a loop at the end of what is half something else
        ([9, 5, 5, 5], 3),
        ([1, 2, 3, 1, 2, 3, 1, 2], 2),  # the last round is cut off
    ],
)
def test_a_loop_is_over_half_of_the_answer(tokens: list[int], times: int) -> None:
    assert looped(tokens) == times


def test_the_first_rule_that_applies_names_the_kind() -> None:
    limits, short = Limits(repeats=3, loss=10.0), Condition(max_words=2)

    def kind(answer: str, tokens: list[int], loss: float) -> str | None:
        return kind_of(answer, "red circle", short, tokens, loss, limits)

    assert kind(" red circle\n", [1, 2], 20.0) is None
    assert kind(" \n", [], math.nan) == NO_OUTPUT
    assert kind("no no no no", [4, 4, 4, 4], 12.0) == REPETITION
    assert kind("no no", [4, 4], 2.0) == WRONG
    assert kind("xq zv", [4, 5], 10.0) == RANDOM
    assert kind("a blue square", [4, 5, 6], 2.0) == CONDITION
    assert kind("blue square", [5, 6], 2.0) == WRONG


def test_limits_are_the_float_models_own_and_those_of_blind_answers() -> None:
    blind = np.array([*range(1, 101), np.nan], float)
    limits = bad_answers.limits_for([[1, 2], [7, 7, 7, 7]], blind)
    assert limits.repeats == 5, "the float model repeats four times"
    assert (blind[:-1] >= limits.loss).mean() == 0.95
    assert bad_answers.limits_for([[1, 2]], blind).repeats == 3
    text = bad_answers.definitions(limits)
    assert set(text) == set(bad_answers.KINDS)
    assert "5 times" in text[REPETITION]
    assert f"{limits.loss:.1f}" in text[RANDOM]


def test_blind_answers_are_drawn_from_the_plain_vocabulary() -> None:
    _, processor = tiny.tiny("internvl")
    texts = bad_answers.blind_answers(processor, [40] * 30, seed=1)
    assert texts == bad_answers.blind_answers(processor, [40] * 30, seed=1)
    assert not any("<|" in text for text in texts)
    assert len(set("".join(texts))) > 100


def test_losses_are_the_mean_log_probabilities_of_the_answers_tokens() -> None:
    model, processor = tiny.tiny("qwen2_vl")
    asked = [row(answer, images, seed) for seed, (answer, images) in enumerate(zip(ANSWERS, (1, 0, 1, 0), strict=True))]
    found = answer_losses(model, prepare([*asked, bad_answers.with_answer(asked[1], "")], processor, 2))
    assert math.isnan(found[4])
    for each, loss in zip(asked, found, strict=False):
        prompt = processor.apply_chat_template(each.chat[:-1], add_generation_prompt=True, tokenize=False)
        answer = each.messages[-1]["content"][0]["text"]
        inputs = processor(text=[prompt + answer], images=each.open_images() or None, return_tensors="pt")
        ids = processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            chances = model(**inputs).logits[0, -len(ids) - 1 : -1].log_softmax(-1)
        assert float(loss) == pytest.approx(float(-chances[range(len(ids)), ids].mean()), rel=1e-3)


def test_rows_of_one_task_are_told_apart_by_their_pictures() -> None:
    given = [(1, None), (0, None), (1, "a"), (0, "b"), (0, "a"), (1, "c")]
    rows = [replace(row("Yellow.", images, seed), task=task) for seed, (images, task) in enumerate(given)]
    assert [each.task for each in by_modality(rows)] == [None, "questions, text only", "a", "b", "a, text only", "c"]


def test_answers_are_taken_evenly_from_the_tasks() -> None:
    rows = [Row([], str(number), task) for task, count in (("a", 5), ("b", 1), ("c", 3)) for number in range(count)]
    chosen = [(each.task, each.where) for each in bad_answers.spread(rows, 6)]
    assert chosen == [("a", "0"), ("b", "0"), ("c", "0"), ("a", "1"), ("c", "1"), ("a", "2")]
    assert len(bad_answers.spread(rows, 99)) == 9


# ---- intervals -------------------------------------------------------------------------------------------------------


def test_more_often_is_sure_only_where_chance_is_not_enough() -> None:
    none = [False] * 40
    assert more_often([True, *none[1:]], none).low == 0
    assert more_often([True] * 10 + none[10:], none).low > 0.1
    assert more_often([True] * 10 + none[10:], [True] * 10 + none[10:]) == Interval(0.0, 0.0, 0.0)


def test_the_gap_between_two_differences_has_both_their_widths() -> None:
    found = gap(Interval(-0.10, -0.13, -0.06), Interval(0.0, -0.03, 0.02))
    assert found.estimate == pytest.approx(-0.10)
    assert found.low == pytest.approx(-0.10 - math.hypot(0.03, 0.02))
    assert found.high == pytest.approx(-0.10 + math.hypot(0.04, 0.03))


def test_no_flipped_question_of_a_few_is_not_certainty() -> None:
    """As wide as 0 wrong of 20 is by Wilson's interval: z² / (n + z²), z = 1.96."""
    right = {"a": np.ones(20, bool)}
    results = Results("m", right, {"a": np.arange(20)}, (), "q")
    found = accuracies(results, results)["text"]
    most = 1.959964**2 / (20 + 1.959964**2)
    assert (found.difference.low, found.difference.high) == pytest.approx((-most, most), rel=1e-4)
    assert found.falls is False
