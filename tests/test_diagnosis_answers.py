"""Models that answer badly in one way, or slowly, and what the diagnosis makes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import mbq
from mbq.architecture import bind
from mbq.conditions import Condition
from mbq.diagnosis import Diagnosis, Loading, diagnose
from mbq.diagnosis.bad_answers import CONDITION, NO_OUTPUT, RANDOM, REPETITION
from mbq.diagnosis.measurements import Measurements
from mbq.diagnosis.rules import no_speed_up
from mbq.diagnosis.speed import Decode, Speed, decode_steps, kernels_of
from tests.trained import MODEL, Trained, blocks, rules


def head_says(model: Any, change: Callable[[torch.Tensor], None]) -> Any:
    """The model with other logits: ``change`` writes into a copy of them."""

    def hook(module: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.clone()
        change(logits)
        return logits

    model.lm_head.register_forward_hook(hook)
    return model


def kinds(found: Diagnosis) -> list[str | None]:
    assert all(answer.float_kind in (None, "fluent but wrong") for answer in found.measurements.answers)
    return [answer.kind for answer in found.measurements.answers]


def add(logits: torch.Tensor, token: int, value: float) -> None:
    logits[..., token] += value


def test_a_head_that_ends_every_turn_has_no_output(trained: Trained) -> None:
    end = trained.processor.tokenizer.eos_token_id
    found = trained.examine(
        head_says(trained.rounded("W8A8"), partial(add, token=end, value=1000)), limit=4, answers=14
    )
    assert rules(found) == ["outside_differs", "no_output"]
    assert set(kinds(found)) == {NO_OUTPUT}


def test_a_head_that_knows_one_word_repeats_itself(trained: Trained) -> None:
    (red,) = trained.processor.tokenizer("red", add_special_tokens=False)["input_ids"]
    found = trained.examine(
        head_says(trained.rounded("W8A8"), partial(add, token=red, value=1000)), limit=4, answers=14
    )
    assert rules(found) == ["outside_differs", "repetition"]
    assert set(kinds(found)) == {REPETITION}


def test_a_head_of_noise_writes_random_tokens(trained: Trained) -> None:
    generator = torch.Generator().manual_seed(0)

    def noise(logits: torch.Tensor) -> None:
        logits += 1000 * torch.randn(logits.shape, generator=generator).to(logits.dtype)

    found = trained.examine(head_says(trained.rounded("W8A8"), noise), limit=4, answers=28)
    assert rules(found) == ["outside_differs", "random_tokens"]
    assert kinds(found).count(RANDOM) > 14, "one of twenty blind answers is below the limit, by its definition"


def test_answers_that_do_not_end_miss_the_condition_to_be_short(trained: Trained) -> None:
    end = trained.processor.tokenizer.eos_token_id
    asked = [replace(row, condition=Condition(max_words=1)) for row in trained.rows if row.task == "house"]
    quantized = head_says(trained.rounded("W8A8"), partial(add, token=end, value=-30))
    found = trained.examine(quantized, rows=asked, answers=20, max_new_tokens=4)
    assert "missed_condition" in rules(found)
    assert kinds(found).count(CONDITION) > 10
    unasked = trained.examine(
        quantized, rows=[replace(row, condition=None) for row in asked], answers=20, max_new_tokens=4
    )
    assert "missed_condition" not in rules(unasked)


# ---- speed -----------------------------------------------------------------------------------------------------------


def with_speed(measured: Measurements, ours: float, theirs: float, kernels: dict[str, int], size: int) -> Measurements:
    """Decode steps of so many milliseconds, certain to a per cent, on a device that copies 100 GB/s."""
    quantized, reference = (
        Decode(ms / 1e3, 0.99 * ms / 1e3, 1.01 * ms / 1e3, size * times) for ms, times in ((ours, 1), (theirs, 4))
    )
    return replace(measured, speed=Speed("a GPU", kernels, {"cuda": "no reason"}, quantized, reference, 100e9))


def test_no_speed_up_names_the_kernel_and_whether_memory_was_the_limit(trained: Trained) -> None:
    measured = trained.examine(trained.rounded("W8A8"), limit=1).measurements
    assert no_speed_up(measured) is None, "not measured"
    assert no_speed_up(with_speed(measured, 1, 2, {"triton": 28}, 10**7)) is None
    slow = no_speed_up(with_speed(measured, 2, 2, {"reference": 28}, 10**7))
    assert "reference (28 layers)" in slow.evidence
    assert "cuda does not run: no reason" in slow.evidence
    assert "Memory was not the limit" in slow.evidence
    assert "5%" in slow.evidence, "10 MB in 2 ms are 5 GB/s"
    assert "mbq doctor" in slow.advice
    bound = no_speed_up(with_speed(measured, 2, 2, {"triton": 28}, 15 * 10**7))
    assert "Memory was the limit" in bound.evidence
    assert "fewer bytes" in bound.advice


def test_on_the_cpu_the_reference_kernel_is_said_to_unpack_in_every_pass(trained: Trained) -> None:
    quantized = trained.rounded("W3A16")
    assert kernels_of(quantized)[0] == {"reference": 28}
    assert "GPU" in kernels_of(quantized)[1]["cuda"]
    binding = replace(bind(trained.model), model=quantized, blocks=blocks(quantized))
    step = decode_steps(binding, trained.processor, trained.rows[0])
    assert 0 < step.low <= step.seconds <= step.high
    names = ("language_model.layers.", "lm_head")
    tensors = [tensor for name, tensor in quantized.state_dict().items() if any(part in name for part in names)]
    assert step.bytes == sum(tensor.nbytes for tensor in tensors)
    measured = trained.examine(quantized, limit=1).measurements
    slow = replace(step, seconds=2 * step.seconds, low=2 * step.high, high=3 * step.high)
    finding = no_speed_up(replace(measured, speed=Speed("CPU, 1 threads", {"reference": 28}, {}, slow, step, 1e10)))
    assert "unpacks each weight in every pass" in finding.advice


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_blocks_that_wait_give_the_same(trained: Trained, tmp_path: Path) -> None:
    mbq.quantize(MODEL, scheme="W4A16", method="rtn", output=tmp_path / "w4")
    few = {"samples": 12, "limit": 10, "answers": 14, "max_new_tokens": 8}
    whole, waiting = (
        diagnose(
            tmp_path / "w4", MODEL, data=trained.rows, loading=Loading(device="cuda", offload=offload), **few
        ).measurements
        for offload in ("none", "blocks")
    )
    assert whole.propagation == waiting.propagation
    assert whole.accuracy == waiting.accuracy
    assert [each.float_answer for each in whole.answers] == [each.float_answer for each in waiting.answers]
    assert whole.speed.kernels.keys() == {"cuda"}
    assert 0 < whole.speed.reading < 1
    assert waiting.speed.reference is None
    assert any("was not timed" in note for note in waiting.notes)
