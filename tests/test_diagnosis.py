"""Models that are broken in one way, and what the diagnosis makes of them: accuracy, blocks, outliers, the rest.

The model is the trained InternVL of this repository: it knows facts that few bits lose. What is not broken raises
nothing.
"""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mbq
from mbq.architecture import bind
from mbq.diagnosis import diagnose
from mbq.diagnosis.rules import RULES, findings, text_imbalance
from tests.trained import MODEL, Trained, blocks, rules

BROKEN = 1  # the block that is broken


def ignored(model: Any, advice: str) -> set[str]:
    """The linears that the advised command keeps in 16 bits, from the number of the block on."""
    binding = bind(model)
    pattern = re.search(r"--ignore '(.*?)'", advice).group(1)
    kept = set(binding.linears()) - set(binding.linears((pattern,)))
    return {name.removeprefix(f"{binding.architecture.blocks}.") for name in kept}


def scaled(module: Any, factor: float) -> None:
    for layer in module.modules():
        if hasattr(layer, "weight_scale"):
            layer.weight_scale.mul_(factor)


# ---- nothing wrong ---------------------------------------------------------------------------------------------------


def test_a_healthy_model_raises_nothing(trained: Trained) -> None:
    found = trained.examine(trained.rounded("W8A8"), answers=14)
    assert found.findings == []
    assert found.measurements.notes == []
    kinds = {answer.kind for answer in found.measurements.answers}
    assert kinds <= {None, "fluent but wrong"}


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl"])
def test_no_healthy_block_of_the_other_models_is_found_at_fault(trained: Trained, family: str, tmp_path: Path) -> None:
    """Natural unevenness, and an outlier channel that LLaVA-OneVision's first block has and that costs nothing."""
    folder = MODEL.parent / family
    float_model, processor = mbq.load(folder), mbq.load_processor(folder)
    few = {"limit": 1, "answers": 0, "samples": 12, "speed": False}
    for scheme in ("W8A8", "W3A16"):
        quantized = mbq.quantize(float_model, processor, scheme=scheme, method="rtn").model
        measured = diagnose(quantized, float_model, processor, data=trained.rows, **few).measurements
        found = [rule.__name__ for rule in RULES[:4] if rule(measured) is not None]
        assert found == []
        if family == "llava_onevision":
            assert any(each.channels for each in measured.propagation.outliers)


def test_loaded_models_are_left_as_they_were(trained: Trained) -> None:
    quantized = trained.rounded("W4A16")
    before = [
        {name: tensor.clone() for name, tensor in each.state_dict().items()} for each in (trained.model, quantized)
    ]
    trained.examine(quantized, limit=1, answers=2)
    for each, stored in zip((trained.model, quantized), before, strict=True):
        assert all(torch.equal(tensor, stored[name]) for name, tensor in each.state_dict().items())
        hooks = [
            hook
            for module in each.modules()
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        ]
        assert not [hook for hook in hooks if hook.__module__.startswith("mbq")], "transformers may leave its own"
        assert not any("forward" in vars(module) for module in each.modules())


# ---- accuracy --------------------------------------------------------------------------------------------------------


def test_images_that_fall_while_text_holds_are_modality_imbalance(trained: Trained) -> None:
    """Four bits by rounding cost this model facts about pictures, and none about towns (docs/results.md)."""
    found = trained.examine(trained.rounded("W4A8"))
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


def test_both_falling_with_even_errors_are_too_few_bits(trained: Trained) -> None:
    found = trained.examine(trained.rounded("W2A16"))
    assert rules(found) == ["bits_too_few"]
    finding = found.findings[0]
    assert finding.title.startswith("W2A16")
    assert "--scheme W3A16" in finding.advice
    assert "--group-size 64" in finding.advice


def test_too_few_questions_to_tell_are_said_to_be_that(trained: Trained) -> None:
    text = [row for row in trained.rows if not row.images][:3]
    found = trained.examine(trained.rounded("W4A8"), rows=[row for row in trained.rows if row.images] + text)
    assert rules(found) == ["accuracy_falls"]
    assert "more questions" in found.findings[0].advice


# ---- causes ----------------------------------------------------------------------------------------------------------


def test_a_block_whose_scales_are_wrong_is_named_and_no_block_behind_it(trained: Trained) -> None:
    quantized = trained.rounded("W8A8")
    scaled(blocks(quantized)[BROKEN].mlp.down_proj, 1.5)
    found = trained.examine(quantized)
    assert rules(found) == ["bad_block"]
    finding = found.findings[0]
    assert finding.title == f"Block {BROKEN} is at fault (MLP)"
    errors = found.measurements.propagation.blocks
    assert errors[BROKEN].own["mlp"]["language"] == pytest.approx(0.5, abs=0.02), "1.5 times the output"
    assert errors[BROKEN + 1].accumulated["attn"]["language"] > 5 * errors[BROKEN + 1].own["attn"]["language"]
    assert ignored(trained.model, finding.advice) == {
        f"{BROKEN}.{name}" for name in bind(trained.model).kinds[BROKEN].linears()
    }


def test_a_block_of_two_bits_among_eight_stands_out(trained: Trained) -> None:
    """As rounding at its own scheme would have it, but two bits and more beyond what is usual in the model."""
    quantized = trained.rounded("W8A8")
    blocks(quantized)[BROKEN] = blocks(trained.rounded("W2A16"))[BROKEN]
    found = trained.examine(quantized, limit=1)
    assert rules(found) == ["bad_block"]
    assert found.findings[0].title.startswith(f"Block {BROKEN} is at fault")
    errors = found.measurements.propagation.blocks[BROKEN]
    assert errors.own["attn"]["language"] == pytest.approx(errors.expected["attn"]["language"], rel=0.1)


def test_a_block_that_stays_in_16_bits_is_not_at_fault(trained: Trained) -> None:
    """Where no rounding is expected, twice that is none either."""
    options = {"scheme": "W8A8", "method": "mbq", "num_calibration_samples": 8, "ignore": [f"re:.*layers.{BROKEN}.*"]}
    rows = [row for row in trained.rows if row.images]
    quantized = mbq.quantize(trained.model, trained.processor, data=rows, **options).model
    found = trained.examine(quantized, limit=1)
    assert rules(found) == []
    errors = found.measurements.propagation.blocks[BROKEN]
    assert errors.own["attn"]["language"] == errors.expected["attn"]["language"] == 0


def test_a_block_that_gives_no_numbers_is_at_fault(trained: Trained) -> None:
    quantized = trained.rounded("W8A8")
    blocks(quantized)[BROKEN].self_attn.v_proj.weight_scale[3] = float("nan")
    found = trained.examine(quantized, limit=1)
    assert rules(found)[0] == "bad_block"
    assert found.findings[0].title == f"Block {BROKEN} is at fault (attention)"
    assert "is inf" in found.findings[0].evidence


def test_an_outlier_channel_is_found_and_the_block_is_not_blamed_for_it(trained: Trained) -> None:
    """A norm's channel times 1,024 and the linears' columns by it: the same function, and eight bits lose the rest."""
    planted = copy.deepcopy(trained.model)
    block, channel = blocks(planted)[2], 5
    with torch.no_grad():
        block.input_layernorm.weight[channel] *= 1024
        for name in ("q_proj", "k_proj", "v_proj"):
            block.self_attn.get_submodule(name).weight[:, channel] /= 1024
    quantized = mbq.quantize(planted, trained.processor, scheme="W8A8", method="rtn").model
    found = trained.examine(quantized, planted, limit=1)
    assert rules(found) == ["outliers"]
    finding = found.findings[0]
    assert finding.title == "An outlier channel in block 2 (attention)"
    assert finding.evidence.startswith(f"Channel {channel} of what self_attn.q_proj, ")
    assert "--method mbq" in finding.advice
    assert ignored(trained.model, finding.advice) == {f"2.self_attn.{name}_proj" for name in "qkv"}
    same = trained.examine(quantized, limit=1).measurements.propagation.blocks[2]
    assert same.own["attn"]["language"] == pytest.approx(
        found.measurements.propagation.blocks[2].own["attn"]["language"], rel=1e-3
    )


def test_another_model_as_baseline_is_told_by_its_tensors(trained: Trained) -> None:
    quantized = trained.rounded("W8A8")
    with torch.no_grad():
        quantized.model.multi_modal_projector.linear_1.weight.mul_(1.3)
    found = trained.examine(quantized, limit=1)
    assert rules(found) == ["outside_differs"]
    assert "multi_modal_projector.linear_1.weight, by 0.3." in found.findings[0].evidence


def test_a_vision_tower_that_lost_its_pictures_is_told_from_modality_imbalance(trained: Trained) -> None:
    options = {"scheme": "W8A8", "method": "rtn", "vision_tower": "W8A8", "num_calibration_samples": 8}
    quantized = mbq.quantize(trained.model, trained.processor, data=trained.rows, **options).model
    assert rules(trained.examine(quantized, limit=10)) == []
    scaled(quantized.model.vision_tower, 3)
    found = trained.examine(quantized, limit=10)
    assert rules(found) == ["vision_tower"]
    assert found.measurements.accuracy["text"].difference.estimate == 0
