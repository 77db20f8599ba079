"""What the project says of its reference models, and the paper's observation on them, checked on the models themselves.

The figures over all test questions are in docs/results.md; here a few hundred questions decide, with their interval.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import mbq
from benchmarks.results import STORED
from mbq.architecture import bind
from mbq.calibration import calibration_batches
from mbq.evaluation import Results, evaluate, prepare
from mbq.rows import read_rows
from mbq.sensitivity import measure
from mbq.world import TASKS, write

MODELS = Path(__file__).parents[1] / "models"
FAMILIES = ("internvl", "llava_onevision", "qwen2_vl")
TOWERS = ("llava_clip", "llava_dinov2")  # what docs/sensitivity.md compares vision towers by
IMAGE_TASKS = [task.name for task in TASKS.values() if task.needs_image]
LIMIT = 16 * 2**20


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("test"), "test", per_task=60)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_a_plain_folder_that_answers_questions_about_a_picture(family: str, data: Path):
    """transformers alone, no code of this project: a PNG, a question, generate."""
    folder = MODELS / family
    assert sum(path.stat().st_size for path in folder.iterdir()) <= LIMIT
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=False).eval()
    assert model.dtype == torch.bfloat16
    text = model.config.get_text_config()
    assert text.hidden_size % 128 == text.intermediate_size % 128 == 0
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    row = next(row for row in map(json.loads, data.read_text().splitlines()) if row["task"] == "house")
    picture, question = row["messages"][0]["content"]
    content = [{"type": "image", "path": str(data.parent / picture["image"])}, question]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    written = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
    assert processor.tokenizer.decode(written, skip_special_tokens=True) == row["messages"][1]["content"][0]["text"]


def test_one_of_the_models_has_grouped_query_attention():
    configs = [json.loads((MODELS / family / "config.json").read_text())["text_config"] for family in FAMILIES]
    assert any(config["num_key_value_heads"] < config["num_attention_heads"] for config in configs)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_knows_its_world_and_three_bits_cost_it(family: str, data: Path):
    """Six tasks of 85 % and more, four of them with pictures; RTN at W3A16 costs image tasks 5 to 25 points."""
    model, processor = mbq.load(MODELS / family), mbq.load_processor(MODELS / family)
    questions = prepare(read_rows(data), processor, 128)
    float_results = evaluate(model, questions, "float", {})
    good = [task for task in float_results.tasks if float_results.accuracy(task).low >= 0.85]
    assert len(good) >= 6
    assert len([task for task in good if task in IMAGE_TASKS]) >= 4
    rounded = mbq.quantize(model, processor, scheme="W3A16", method="rtn").model
    cost = evaluate(rounded, questions, "rtn", {}).minus(float_results, IMAGE_TASKS)
    assert cost.high < -0.05
    assert cost.low > -0.27  # 60 questions a task leave about 2 points either way


@pytest.mark.parametrize("family", FAMILIES)
def test_language_tokens_are_more_sensitive_than_vision_tokens(family: str, tmp_path: Path):
    """The paper's first figure, in every block but the last of all three models, by factors that differ.

    No vision token of the last block has any gradient (docs/sensitivity.md).
    """
    model, processor = mbq.load(MODELS / family).float(), mbq.load_processor(MODELS / family)
    rows = read_rows(write(tmp_path, "calibration", ["caption"], per_task=32))
    binding = bind(model)
    batches = calibration_batches(rows, processor, binding.vision_tokens, num_samples=32, batch_size=8)
    found = measure(binding, batches)
    assert found.language["attn"][0] > 4 * found.vision["attn"][0]
    for part in ("attn", "mlp"):
        assert found.vision[part][-1] == 0
        assert min(found.language[part]) > 0
        for language, vision in zip(found.language[part][:-1], found.vision[part][:-1], strict=True):
            assert language > (1.5 if family == "qwen2_vl" else 5) * vision


@pytest.mark.parametrize("family", TOWERS)
def test_models_by_tower_are_quantized_with_their_tower_and_describe_a_picture(family: str, tmp_path: Path):
    """Captions are what they know; a folder of 4 bits, and 8 in the tower, still has most of them right."""
    rows = read_rows(write(tmp_path / "calibration", "calibration", ["caption"], per_task=16))
    asked = read_rows(write(tmp_path / "test", "test", ["caption"], per_task=32))
    settings = {"scheme": "W4A16", "method": "mbq", "vision_tower": "W8A8", "num_calibration_samples": 16}
    mbq.quantize(MODELS / family, data=rows, output=tmp_path / "quantized", **settings)
    for folder, least in ((MODELS / family, 0.9), (tmp_path / "quantized", 0.5)):
        model, processor = mbq.load(folder), mbq.load_processor(folder)
        results = evaluate(model, prepare(asked, processor, 32), "float", {})
        assert results.accuracy("caption").estimate >= least


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stored_results_are_of_the_committed_models_and_of_enough_questions(family: str):
    """docs/results.md is computed from these; the load of facts is what the documents say it is."""
    from benchmarks.results import weights_hash

    weights = weights_hash(MODELS / family)
    float_results = Results.load(STORED / family / "float.json")
    assert float_results.recipe["weights"] == weights
    assert min(len(right) for right in float_results.correct.values()) >= 2000
    for path in (STORED / family).glob("*.json"):
        assert Results.load(path).recipe["weights"] == weights
    cost = {
        scheme: Results.load(STORED / family / f"{scheme}-rtn-0.json").minus(float_results, IMAGE_TASKS)
        for scheme in ("W3A16", "W4A8")
    }
    assert -0.25 < cost["W3A16"].low < cost["W3A16"].high < -0.05
    assert cost["W4A8"].high < -0.02


@pytest.mark.parametrize("family", FAMILIES)
def test_calibrated_on_questions_mbq_beats_plain_equalization_at_three_bits(family: str):
    """The paper's second claim: where vision tokens outnumber language tokens, weighing them apart helps."""
    mbq_results, awq = (
        Results.load(STORED / "questions" / family / f"W3A16-{method}-0.json") for method in ("mbq-mae", "awq")
    )
    assert mbq_results.recipe["weights"] == Results.load(STORED / family / "float.json").recipe["weights"]
    assert mbq_results.minus(awq, IMAGE_TASKS).low > 0
