"""Models that are broken in one way, and what the diagnosis makes of them.

The model is the trained InternVL of this repository: it knows facts that few bits lose. Each rule has a model that is
broken in just the way that the rule is about; what is not broken raises nothing.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
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
from mbq.diagnosis.rules import RULES, findings, no_speed_up, text_imbalance
from mbq.diagnosis.speed import Decode, Speed, decode_steps, kernels_of
from mbq.rows import Row, read_rows
from mbq.world import write

MODEL = Path(__file__).parents[1] / "models" / "internvl"
TASKS = ("house", "founder", "heir", "colour", "reading", "towns", "arithmetic")
BROKEN = 1  # the block that is broken


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """40 questions of five tasks with pictures and two without."""
    return read_rows(write(tmp_path_factory.mktemp("data"), "test", TASKS, per_task=40))


@pytest.fixture(scope="module")
def model() -> Any:
    return mbq.load(MODEL)


@pytest.fixture(scope="module")
def processor() -> Any:
    return mbq.load_processor(MODEL)


@pytest.fixture(scope="module")
def rounded(model: Any, processor: Any) -> Callable[[str], Any]:
    """The model rounded to nearest at a scheme, a new one each time."""
    made: dict[str, Any] = {}

    def quantized(scheme: str) -> Any:
        if scheme not in made:
            made[scheme] = mbq.quantize(model, processor, scheme=scheme, method="rtn").model
        return copy.deepcopy(made[scheme])

    return quantized


@pytest.fixture(scope="module")
def examine(model: Any, processor: Any, rows: list[Row]) -> Callable[..., Diagnosis]:
    def run(quantized: Any, baseline: Any = None, data: Sequence[Row] | None = None, **options: Any) -> Diagnosis:
        few = {"samples": 12, "limit": 40, "answers": 0, "max_new_tokens": 12, "batch_size": 16, "speed": False}
        return diagnose(quantized, baseline or model, processor, data=list(data or rows), **few | options)

    return run


def rules(found: Diagnosis) -> list[str]:
    return [finding.rule for finding in found.findings]


def ignored(model: Any, advice: str) -> set[str]:
    """The linears that the advised command keeps in 16 bits, from the number of the block on."""
    binding = bind(model)
    pattern = re.search(r"--ignore '(.*?)'", advice).group(1)
    kept = set(binding.linears()) - set(binding.linears((pattern,)))
    return {name.removeprefix(f"{binding.architecture.blocks}.") for name in kept}


def blocks(model: Any) -> Any:
    return model.model.language_model.layers


def scaled(module: Any, factor: float) -> None:
    for layer in module.modules():
        if hasattr(layer, "weight_scale"):
            layer.weight_scale.mul_(factor)


def head_says(model: Any, change: Callable[[torch.Tensor], None]) -> Any:
    """The model with other logits: ``change`` writes into a copy of them."""

    def hook(module: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.clone()
        change(logits)
        return logits

    model.lm_head.register_forward_hook(hook)
    return model


# ---- nothing wrong ---------------------------------------------------------------------------------------------------


def test_a_healthy_model_raises_nothing(rounded: Callable[[str], Any], examine: Callable[..., Diagnosis]) -> None:
    found = examine(rounded("W8A8"), answers=14)
    assert found.findings == []
    assert found.measurements.notes == []
    kinds = {answer.kind for answer in found.measurements.answers}
    assert kinds <= {None, "fluent but wrong"}


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl"])
def test_no_healthy_block_of_the_other_models_is_found_at_fault(family: str, rows: list[Row], tmp_path: Path) -> None:
    """Natural unevenness, and an outlier channel that LLaVA-OneVision's first block has and that costs nothing."""
    folder = MODEL.parent / family
    float_model, processor = mbq.load(folder), mbq.load_processor(folder)
    few = {"limit": 1, "answers": 0, "samples": 12, "speed": False}
    for scheme in ("W8A8", "W3A16"):
        quantized = mbq.quantize(float_model, processor, scheme=scheme, method="rtn").model
        measured = diagnose(quantized, float_model, processor, data=rows, **few).measurements
        found = [rule.__name__ for rule in RULES[:4] if rule(measured) is not None]
        assert found == []
        if family == "llava_onevision":
            assert any(each.channels for each in measured.propagation.outliers)


def test_loaded_models_are_left_as_they_were(
    model: Any, rounded: Callable[[str], Any], examine: Callable[..., Diagnosis]
) -> None:
    quantized = rounded("W4A16")
    before = [{name: tensor.clone() for name, tensor in each.state_dict().items()} for each in (model, quantized)]
    examine(quantized, limit=1, answers=2)
    for each, stored in zip((model, quantized), before, strict=True):
        assert all(torch.equal(tensor, stored[name]) for name, tensor in each.state_dict().items())
        hooks = [
            hook
            for module in each.modules()
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        ]
        assert not [hook for hook in hooks if hook.__module__.startswith("mbq")], "transformers may leave its own"
        assert not any("forward" in vars(module) for module in each.modules())


# ---- accuracy --------------------------------------------------------------------------------------------------------


def test_images_that_fall_while_text_holds_are_modality_imbalance(
    rounded: Callable[[str], Any], examine: Callable[..., Diagnosis]
) -> None:
    """Four bits by rounding cost this model facts about pictures, and none about towns (docs/results.md)."""
    found = examine(rounded("W4A8"))
    assert rules(found) == ["modality_imbalance"]
    finding = found.findings[0]
    assert "--method mbq" in finding.advice
    assert "pictures" in finding.advice
    image, text = found.measurements.accuracy["image"], found.measurements.accuracy["text"]
    assert image.difference.percent(signed=True) in finding.evidence
    assert text.difference.percent(signed=True) in finding.evidence
    # The other way round, the same figures are the text's.
    turned = replace(found.measurements, accuracy={"image": text, "text": image})
    assert [each.rule for each in findings(turned)] == ["text_imbalance"]
    assert "--formatting interleaved --text" in text_imbalance(turned).advice
    # And without language-only questions nobody can say.
    alone = replace(found.measurements, accuracy={"image": image})
    assert [each.rule for each in findings(alone)] == ["accuracy_falls"]


def test_both_falling_with_even_errors_are_too_few_bits(
    rounded: Callable[[str], Any], examine: Callable[..., Diagnosis]
) -> None:
    found = examine(rounded("W2A16"))
    assert rules(found) == ["bits_too_few"]
    finding = found.findings[0]
    assert finding.title.startswith("W2A16")
    assert "--scheme W3A16" in finding.advice
    assert "--group-size 64" in finding.advice


def test_too_few_questions_to_tell_are_said_to_be_that(
    rounded: Callable[[str], Any], rows: list[Row], examine: Callable[..., Diagnosis]
) -> None:
    text = [row for row in rows if not row.images][:3]
    found = examine(rounded("W4A8"), data=[row for row in rows if row.images] + text)
    assert rules(found) == ["accuracy_falls"]
    assert "more questions" in found.findings[0].advice


# ---- causes ----------------------------------------------------------------------------------------------------------


def test_a_block_whose_scales_are_wrong_is_named_and_no_block_behind_it(
    model: Any, rounded: Callable[[str], Any], examine: Callable[..., Diagnosis]
) -> None:
    quantized = rounded("W8A8")
    scaled(blocks(quantized)[BROKEN].mlp.down_proj, 1.5)
    found = examine(quantized)
    assert rules(found) == ["bad_block"]
    finding = found.findings[0]
    assert finding.title == f"Block {BROKEN} is at fault (MLP)"
    errors = found.measurements.propagation.blocks
    assert errors[BROKEN].own["mlp"]["language"] == pytest.approx(0.5, abs=0.02), "1.5 times the output"
    assert errors[BROKEN + 1].accumulated["attn"]["language"] > 5 * errors[BROKEN + 1].own["attn"]["language"]
    assert ignored(model, finding.advice) == {f"{BROKEN}.{name}" for name in bind(model).kinds[BROKEN].linears()}


def test_a_block_of_two_bits_among_eight_stands_out(
    rounded: Callable[[str], Any], examine: Callable[..., Diagnosis]
) -> None:
    """As rounding at its own scheme would have it, but two bits and more beyond what is usual in the model."""
    quantized = rounded("W8A8")
    blocks(quantized)[BROKEN] = blocks(rounded("W2A16"))[BROKEN]
    found = examine(quantized, limit=1)
    assert rules(found) == ["bad_block"]
    assert found.findings[0].title.startswith(f"Block {BROKEN} is at fault")
    errors = found.measurements.propagation.blocks[BROKEN]
    assert errors.own["attn"]["language"] == pytest.approx(errors.expected["attn"]["language"], rel=0.1)


def test_an_outlier_channel_is_found_and_the_block_is_not_blamed_for_it(
    model: Any, processor: Any, rows: list[Row], examine: Callable[..., Diagnosis]
) -> None:
    """A norm's channel times 1,024 and the linears' columns by it: the same function, and eight bits lose the rest."""
    planted = copy.deepcopy(model)
    block, channel = blocks(planted)[2], 5
    with torch.no_grad():
        block.input_layernorm.weight[channel] *= 1024
        for name in ("q_proj", "k_proj", "v_proj"):
            block.self_attn.get_submodule(name).weight[:, channel] /= 1024
    quantized = mbq.quantize(planted, processor, scheme="W8A8", method="rtn").model
    found = examine(quantized, planted, limit=1)
    assert rules(found) == ["outliers"]
    finding = found.findings[0]
    assert finding.title == "An outlier channel in block 2 (attention)"
    assert finding.evidence.startswith(f"Channel {channel} of what self_attn.q_proj, ")
    assert "--method mbq" in finding.advice
    assert ignored(model, finding.advice) == {f"2.self_attn.{name}_proj" for name in "qkv"}
    same = examine(quantized, model, limit=1).measurements.propagation.blocks[2]
    assert same.own["attn"]["language"] == pytest.approx(
        found.measurements.propagation.blocks[2].own["attn"]["language"], rel=1e-3
    )


def test_another_model_as_baseline_is_told_by_its_tensors(
    rounded: Callable[[str], Any], examine: Callable[..., Diagnosis]
) -> None:
    quantized = rounded("W8A8")
    with torch.no_grad():
        quantized.model.multi_modal_projector.linear_1.weight.mul_(1.3)
    found = examine(quantized, limit=1)
    assert rules(found) == ["outside_differs"]
    assert "multi_modal_projector.linear_1.weight, by 0.3." in found.findings[0].evidence


def test_a_vision_tower_that_lost_its_pictures_is_told_from_modality_imbalance(
    model: Any, processor: Any, rows: list[Row], examine: Callable[..., Diagnosis]
) -> None:
    options = {"scheme": "W8A8", "method": "rtn", "vision_tower": "W8A8", "num_calibration_samples": 8}
    quantized = mbq.quantize(model, processor, data=rows, **options).model
    assert rules(examine(quantized, limit=10)) == []
    scaled(quantized.model.vision_tower, 3)
    found = examine(quantized, limit=10)
    assert rules(found) == ["vision_tower"]
    assert found.measurements.accuracy["text"].difference.estimate == 0


# ---- answers ---------------------------------------------------------------------------------------------------------


def kinds(found: Diagnosis) -> list[str | None]:
    assert all(answer.float_kind in (None, "fluent but wrong") for answer in found.measurements.answers)
    return [answer.kind for answer in found.measurements.answers]


def add(logits: torch.Tensor, token: int, value: float) -> None:
    logits[..., token] += value


def test_a_head_that_ends_every_turn_has_no_output(
    rounded: Callable[[str], Any], processor: Any, examine: Callable[..., Diagnosis]
) -> None:
    end = processor.tokenizer.eos_token_id
    found = examine(head_says(rounded("W8A8"), partial(add, token=end, value=1000)), limit=4, answers=14)
    assert rules(found) == ["outside_differs", "no_output"]
    assert set(kinds(found)) == {NO_OUTPUT}


def test_a_head_that_knows_one_word_repeats_itself(
    rounded: Callable[[str], Any], processor: Any, examine: Callable[..., Diagnosis]
) -> None:
    (red,) = processor.tokenizer("red", add_special_tokens=False)["input_ids"]
    found = examine(head_says(rounded("W8A8"), partial(add, token=red, value=1000)), limit=4, answers=14)
    assert rules(found) == ["outside_differs", "repetition"]
    assert set(kinds(found)) == {REPETITION}


def test_a_head_of_noise_writes_random_tokens(rounded: Callable[[str], Any], examine: Callable[..., Diagnosis]) -> None:
    generator = torch.Generator().manual_seed(0)

    def noise(logits: torch.Tensor) -> None:
        logits += 1000 * torch.randn(logits.shape, generator=generator).to(logits.dtype)

    found = examine(head_says(rounded("W8A8"), noise), limit=4, answers=28)
    assert rules(found) == ["outside_differs", "random_tokens"]
    assert kinds(found).count(RANDOM) > 14, "one of twenty blind answers is below the limit, by its definition"


def test_answers_that_do_not_end_miss_the_condition_to_be_short(
    rounded: Callable[[str], Any], processor: Any, rows: list[Row], examine: Callable[..., Diagnosis]
) -> None:
    end = processor.tokenizer.eos_token_id
    asked = [replace(row, condition=Condition(max_words=1)) for row in rows if row.task == "house"]
    quantized = head_says(rounded("W8A8"), partial(add, token=end, value=-30))
    found = examine(quantized, data=asked, answers=20, max_new_tokens=4)
    assert "missed_condition" in rules(found)
    assert kinds(found).count(CONDITION) > 10
    unasked = examine(quantized, data=[replace(row, condition=None) for row in asked], answers=20, max_new_tokens=4)
    assert "missed_condition" not in rules(unasked)


# ---- speed -----------------------------------------------------------------------------------------------------------


def with_speed(measured: Measurements, ours: float, theirs: float, kernels: dict[str, int], size: int) -> Measurements:
    """Decode steps of so many milliseconds, certain to a per cent, on a device that copies 100 GB/s."""
    quantized, reference = (
        Decode(ms / 1e3, 0.99 * ms / 1e3, 1.01 * ms / 1e3, size * times) for ms, times in ((ours, 1), (theirs, 4))
    )
    return replace(measured, speed=Speed("a GPU", kernels, {"cuda": "no reason"}, quantized, reference, 100e9))


def test_no_speed_up_names_the_kernel_and_whether_memory_was_the_limit(
    rounded: Callable[[str], Any], examine: Callable[..., Diagnosis]
) -> None:
    measured = examine(rounded("W8A8"), limit=1).measurements
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


def test_on_the_cpu_the_reference_kernel_is_said_to_unpack_in_every_pass(
    model: Any, processor: Any, rounded: Callable[[str], Any], rows: list[Row], examine: Callable[..., Diagnosis]
) -> None:
    quantized = rounded("W3A16")
    assert kernels_of(quantized)[0] == {"reference": 28}
    assert "GPU" in kernels_of(quantized)[1]["cuda"]
    binding = replace(bind(model), model=quantized, blocks=blocks(quantized))
    step = decode_steps(binding, processor, rows[0])
    assert 0 < step.low <= step.seconds <= step.high
    names = ("language_model.layers.", "lm_head")
    tensors = [tensor for name, tensor in quantized.state_dict().items() if any(part in name for part in names)]
    assert step.bytes == sum(tensor.nbytes for tensor in tensors)
    measured = examine(quantized, limit=1).measurements
    slow = replace(step, seconds=2 * step.seconds, low=2 * step.high, high=3 * step.high)
    finding = no_speed_up(replace(measured, speed=Speed("CPU, 1 threads", {"reference": 28}, {}, slow, step, 1e10)))
    assert "unpacks each weight in every pass" in finding.advice


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_blocks_that_wait_give_the_same(rows: list[Row], tmp_path: Path) -> None:
    mbq.quantize(MODEL, scheme="W4A16", method="rtn", output=tmp_path / "w4")
    few = {"samples": 12, "limit": 10, "answers": 14, "max_new_tokens": 8}
    whole, waiting = (
        diagnose(tmp_path / "w4", MODEL, data=rows, loading=Loading(device="cuda", offload=offload), **few).measurements
        for offload in ("none", "blocks")
    )
    assert whole.propagation == waiting.propagation
    assert whole.accuracy == waiting.accuracy
    assert [each.float_answer for each in whole.answers] == [each.float_answer for each in waiting.answers]
    assert whole.speed.kernels.keys() == {"cuda"}
    assert 0 < whole.speed.reading < 1
    assert waiting.speed.reference is None
    assert any("was not timed" in note for note in waiting.notes)
