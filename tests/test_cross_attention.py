"""Llama 3.2 Vision, whose pictures are no tokens: what blocks with cross-attention see, and when they are left out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import mbq
from mbq.architecture import Binding, bind
from mbq.blocks import forward
from mbq.calibration import NO_LABEL, CalibrationBatch, encode, language_mask
from mbq.diagnosis.propagation import propagate
from mbq.errors import MBQError, MBQWarning
from mbq.evaluation import prepare
from mbq.evaluation.questions import prompt_of
from mbq.evaluation.scoring import _plain_logits
from mbq.figures import NO_VISION, save_sensitivity_picture, sensitivity_table
from mbq.importance import importance
from mbq.methods import METHODS, SearchOptions
from mbq.report.making import sensitivity_panel
from mbq.rows import Row, text_of
from mbq.scheme import scheme_named
from mbq.search import GroupSearch, equalize_model
from mbq.sensitivity import Sensitivity, measure, ratios
from tests.calibrated import batches_for
from tests.chats import row
from tests.report_folders import put, write_records
from tests.test_importance import inputs_of
from tests.test_report import folder
from tests.tiny_families import tiny

CROSS = 1  # the block with cross-attention
IMAGES = (1, 1, 0, 2)
SCHEME = scheme_named("W3A16", 32)


def bound(images: tuple[int, ...] = IMAGES, batch_size: int = 2) -> tuple[Binding, list[CalibrationBatch]]:
    model, processor = tiny("mllama")
    binding = bind(model)
    answers = [f"Answer number {number} is this one." for number in range(len(images))]
    return binding, batches_for(binding, processor, batch_size, images, answers)


def searched(
    binding: Binding, batches: list[CalibrationBatch], method: str = "awq", **options: Any
) -> list[GroupSearch]:
    sensitivity = measure(binding, batches) if METHODS[method].weighs else None
    search = SearchOptions(gqa_fold=True, **options)
    return equalize_model(binding, batches, METHODS[method], SCHEME, search, sensitivity=sensitivity)


def test_a_padded_batch_gives_each_sample_what_it_gives_alone() -> None:
    """Samples with another number of pictures have batches of their own."""
    binding, batches = bound((1, 0, 2, 1, 2, 0))
    single = bound((1, 0, 2, 1, 2, 0), batch_size=1)[1]
    assert sorted(len(batch.labels) for batch in batches) == [2, 2, 2]
    alone = {tuple(batch.inputs["input_ids"][0].tolist()): batch for batch in single}
    with torch.no_grad():
        for batch in batches:
            found = forward(binding.model, batch).logits
            for number, ids in enumerate(batch.inputs["input_ids"]):
                own = ids[batch.inputs["attention_mask"][number].bool()]
                expected = forward(binding.model, alone[tuple(own.tolist())]).logits[0]
                torch.testing.assert_close(found[number, : len(own)], expected, atol=1e-4, rtol=1e-4)


def test_pictures_change_what_the_model_says() -> None:
    """Else nothing here would test a cross-attention."""
    binding, (batch,) = bound((1,), batch_size=1)
    other = replace(batch, inputs={**batch.inputs, "pixel_values": -batch.inputs["pixel_values"]})
    with torch.no_grad():
        first, second = (forward(binding.model, each).logits for each in (batch, other))
    assert float((first - second).abs().max()) > 0.01


def test_the_language_side_of_the_sensitivity_stands_alone(tmp_path: Path) -> None:
    binding, batches = bound()
    found = measure(binding, batches)
    assert found.vision is None
    assert all(value > 0 for values in found.language.values() for value in values)
    content = json.loads(json.dumps(found.to_json()))
    assert content["vision"] is None
    assert Sensitivity.from_json(content) == found
    assert ratios(found) == {"attn": (0.0,) * 3, "mlp": (0.0,) * 3}
    console = Console(record=True, width=200)
    console.print(sensitivity_table(found))
    text = " ".join(console.export_text().split())
    assert NO_VISION in text
    assert "0.0e+00" not in text
    save_sensitivity_picture(found, tmp_path / "sensitivity.png", "tiny")
    assert (tmp_path / "sensitivity.png").stat().st_size > 0
    put(write_records(tmp_path / "model") / "sensitivity.json", content)
    panel = sensitivity_panel(folder(tmp_path / "model"))
    assert panel is not None
    assert any("No vision tokens stand in the sequence of" in note for note in panel.notes)
    assert len(panel.tables[0].rows) == 2 * 3


@pytest.mark.parametrize("options", [{}, {"norm": "mse"}, {"objective": "paper"}])
def test_mbq_weighs_language_tokens_alone(options: dict[str, str]) -> None:
    """As for text: the same losses as a fixed factor of 0 for vision tokens, but for what all are multiplied by."""
    binding, batches = bound()
    fixed = searched(*bound(), "fixed", vision_weight=0.0, norm=options.get("norm", "mae"))
    for mine, theirs in zip(searched(binding, batches, "mbq", **options), fixed, strict=True):
        assert (mine.alpha, mine.skipped) == (theirs.alpha, theirs.skipped)
        if theirs.losses:
            factors = torch.tensor(mine.losses) / torch.tensor(theirs.losses)
            torch.testing.assert_close(factors, factors[:1].expand_as(factors), rtol=1e-4, atol=0.0)


def test_text_alone_says_nothing_about_blocks_that_it_leaves_out() -> None:
    """Statistics and losses of a block with cross-attention are those of the samples with pictures."""
    with_text, batches = bound((1, 0, 2, 0), batch_size=1)
    pictured = [batch for batch in batches if "pixel_values" in batch.inputs]
    assert len(pictured) == 2
    found, expected = searched(with_text, batches), searched(bound()[0], pictured)
    first = [(mine, theirs) for mine, theirs in zip(found, expected, strict=True) if mine.block < CROSS]
    assert any(mine.losses != theirs.losses for mine, theirs in first)
    for mine, theirs in zip(found, expected, strict=True):
        if mine.block == CROSS:
            assert (mine.alpha, mine.skipped) == (theirs.alpha, theirs.skipped)
            torch.testing.assert_close(mine.losses, theirs.losses, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("scheme", ["W3A16", "W4A8"])
def test_a_distorted_input_passes_the_blocks_that_are_left_out(scheme: str) -> None:
    binding, batches = bound()
    options = SearchOptions(gqa_fold=True, distorted_input=True)
    group_size = 32 if scheme == "W3A16" else None
    found = equalize_model(binding, batches, METHODS["awq"], scheme_named(scheme, group_size), options)
    assert [(each.block, each.group) for each in found if each.skipped] == [(CROSS, "kv")]


def test_without_any_picture_blocks_with_cross_attention_are_rounded_to_nearest(tmp_path: Path) -> None:
    model, processor = tiny("mllama")
    rows = [row(f"What is {number}?", f"It is {number}.") for number in range(2)]
    options = {"num_calibration_samples": 2, "group_size": 32, "device": "cpu", "scheme": "W4A16_SYM"}
    with pytest.warns(MBQWarning, match="nothing to balance"):
        result = mbq.quantize(model, processor, data=rows, output=tmp_path / "out", **options)
    reasons = {each.skipped for each in result.search if each.block == CROSS and each.group != "kv"}
    assert reasons == {"no calibration sample has a picture, without which the block is left out"}
    assert mbq.load(tmp_path / "out") is not None


@pytest.mark.parametrize("method", ["mbq", "awq"])
def test_importance_of_a_cross_attention_is_that_of_samples_with_pictures(method: str) -> None:
    """Of keys and values, that of the states of all pictures."""
    binding, batches = bound()
    sensitivity = measure(binding, batches)
    found = importance(binding, batches, METHODS[method], SearchOptions(), sensitivity)
    sums: dict[str, Any] = {}
    totals: dict[str, float] = {}
    for batch in batches:
        for name, x in inputs_of(binding, batch).items():
            tokens = language_mask(batch) if method == "mbq" else batch.inputs["attention_mask"]
            weights = tokens.flatten().double()
            if name.endswith(("cross_attn.k_proj", "cross_attn.v_proj")):
                weights = torch.ones(len(x), dtype=torch.float64)
            sums[name] = sums.get(name, 0.0) + weights @ x.square()
            totals[name] = totals.get(name, 0.0) + float(weights.sum())
    assert found.means.keys() == set(binding.names)
    for name, mean in found.means.items():
        torch.testing.assert_close(mean.double(), sums[name] / totals[name], rtol=1e-4, atol=1e-7)


def test_a_diagnosis_looks_at_blocks_where_they_run() -> None:
    model, processor = tiny("mllama")
    binding, batches = bound()
    quantized: Any = mbq.quantize(model, processor, scheme="W4A16", group_size=32, method="rtn").model
    ours = replace(binding, model=quantized, blocks=quantized.get_submodule(binding.architecture.blocks))
    found = propagate(binding, ours, batches)
    pictured = propagate(binding, ours, [batch for batch in batches if "pixel_values" in batch.inputs])
    assert found.blocks[CROSS] == pictured.blocks[CROSS]
    for part in ("attn", "mlp"):
        assert found.blocks[CROSS].accumulated[part]["language"] > 0.001
        assert found.blocks[CROSS].accumulated[part]["vision"] is None


def test_questions_about_several_pictures_are_seen_as_if_alone() -> None:
    model, processor = tiny("mllama")
    rows = [row([*range(number % 3), f"What is {number}?"], "ab" * (number + 1)) for number in range(6)]
    questions = prepare(rows, processor, batch_size=6)
    with torch.inference_mode():
        for batch in questions.batches:
            expected = [_alone(model, processor, rows[index]) for index in batch.rows.tolist()]
            found = _plain_logits(model, questions, batch)
            torch.testing.assert_close(found, torch.cat(expected), atol=1e-4, rtol=1e-4)


def _alone(model: Any, processor: Any, asked: Row) -> torch.Tensor:
    """The logits that predict the answer and its end, by the processor's own inputs for question and answer."""
    text = prompt_of(asked, processor) + text_of(asked.messages[-1])
    pictures = [asked.open_images()] if asked.images else None
    given = processor(text=[text], images=pictures, return_tensors="pt", add_special_tokens=False)
    answer = processor.tokenizer(text_of(asked.messages[-1]), add_special_tokens=False)["input_ids"]
    assert given["input_ids"][0, -len(answer) :].tolist() == answer
    return model(**given).logits[0, -len(answer) - 1 :]


def test_samples_are_cut_behind_their_pictures() -> None:
    model, processor = tiny("mllama")
    asked = row([0, "What is shown in this picture?"], "A red circle is left of a blue square.")
    whole = encode(asked, processor, set(), max_length=2048)
    length = int((whole.labels[0] != NO_LABEL).nonzero()[0]) + 3
    cut = encode(asked, processor, set(), max_length=length)
    assert cut.inputs["cross_attention_mask"].shape[1] == cut.inputs["input_ids"].shape[1] == length
    with torch.no_grad():
        found, expected = (forward(model, batch).logits[0, :length] for batch in (cut, whole))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    late = row(["What is shown in this picture?"], "Yellow.", [0, "And here?"], "Green.")
    with pytest.raises(MBQError, match="cuts off its images"):
        encode(late, processor, set(), max_length=45)
