"""``mbq.quantize`` from a folder to a folder: what the result is, and what every file holds."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForImageTextToText, AutoProcessor, CompressedTensorsConfig

import mbq
from mbq.qlinear import QuantLinear
from mbq.qtensor import fake_quantize
from mbq.scheme import SCHEMES
from tests import tiny


@pytest.fixture
def run(calibration: Path, tmp_path: Path) -> Callable[..., mbq.QuantizationResult]:
    """quantize(...) on the eight rows, into a new folder ``out``."""

    def quantize(model: Any, processor: Any = None, **options: Any) -> mbq.QuantizationResult:
        defaults = {"images": calibration.parent / "images", "num_calibration_samples": 8, "batch_size": 4}
        return mbq.quantize(
            model, processor, **({"data": calibration, "output": tmp_path / "out"} | defaults | options)
        )

    return quantize


def logits(model: Any, processor: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(**tiny.inputs(processor, answer="A red circle.")).logits


@pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
@pytest.mark.parametrize(("scheme", "method"), [("W3A16", "mbq"), ("W4A8", "mbq"), ("W8A8", "smoothquant")])
def test_the_folder_gives_the_logits_of_the_result(
    family: str, scheme: str, method: str, float_folder: Callable[[str], Path], run: Callable[..., Any]
) -> None:
    result = run(float_folder(family), scheme=scheme, method=method)
    loaded, processor = mbq.load(result.folder), mbq.load_processor(result.folder)
    expected = logits(result.model, result.processor)
    assert torch.equal(logits(loaded, processor), expected)
    float_model = mbq.load(float_folder(family))
    assert not torch.allclose(logits(float_model, processor), expected, atol=1e-4), "nothing was quantized"


@pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
def test_transformers_alone_gives_the_same_logits(
    family: str, float_folder: Callable[[str], Path], run: Callable[..., Any]
) -> None:
    folder = run(float_folder(family), scheme="W3A16", method="mbq").folder
    model = AutoModelForImageTextToText.from_pretrained(
        folder, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    processor = AutoProcessor.from_pretrained(folder)
    torch.testing.assert_close(logits(model, processor), logits(mbq.load(folder), processor), atol=1e-4, rtol=1e-4)


def test_rtn_needs_no_data_and_is_the_weights_rounded(float_folder: Callable[[str], Path], run: Callable) -> None:
    result = run(float_folder("internvl"), method="rtn", data=None, images=None)
    reference = mbq.load(float_folder("internvl"))
    names = [name for name, module in result.model.named_modules() if isinstance(module, QuantLinear)]
    assert len(names) == 14, "two blocks of seven linears"
    for name in names:
        linear = reference.get_submodule(name)
        linear.weight.data = fake_quantize(linear.weight.data, SCHEMES["W3A16"].weights)
    torch.testing.assert_close(
        logits(result.model, result.processor), logits(reference, result.processor), atol=1e-5, rtol=1e-5
    )
    assert {"search.json", "sensitivity.json"}.isdisjoint(path.name for path in result.folder.iterdir())


def test_tower_projector_embeddings_and_head_stay_as_they_were(
    float_folder: Callable[[str], Path], run: Callable[..., Any]
) -> None:
    result = run(float_folder("llava_onevision"), scheme="W4A8")
    before = mbq.load(float_folder("llava_onevision")).state_dict()
    after = result.model.state_dict()
    kept = [
        name for name in before if "language_model.layers" not in name and name != "model.language_model.norm.weight"
    ]
    assert any("vision_tower" in name for name in kept)
    assert any("embed_tokens" in name for name in kept)
    for name in kept:
        assert torch.equal(before[name], after[name]), name


def test_what_vllm_leaves_out_is_told(float_folder: Callable[[str], Path], run: Callable[..., Any]) -> None:
    result = run(float_folder("qwen2_vl"), scheme="W4A8", method="rtn")
    for text in (str(result), (result.folder / "README.md").read_text()):
        assert "16-bit activations, and does not say so" in text


def test_ignore_keeps_a_linear_in_float(float_folder: Callable[[str], Path], run: Callable[..., Any]) -> None:
    result = run(float_folder("qwen2_vl"), ignore=[r"re:.*layers\.1\.mlp\.down_proj"])
    kinds = {
        name: type(module).__name__
        for name, module in mbq.load(result.folder).named_modules()
        if name.endswith("mlp.down_proj")
    }
    assert kinds == {
        "model.language_model.layers.0.mlp.down_proj": "QuantLinear",
        "model.language_model.layers.1.mlp.down_proj": "Linear",
    }


@pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
def test_the_vision_tower_is_quantized_where_asked_for(
    family: str, float_folder: Callable[[str], Path], run: Callable[..., Any]
) -> None:
    result = run(float_folder(family), vision_tower="W4A8", num_calibration_samples=4)
    loaded = mbq.load(result.folder)
    schemes = {name: module.scheme.name for name, module in loaded.named_modules() if isinstance(module, QuantLinear)}
    tower = {name for name, scheme in schemes.items() if scheme == "W4A8"}
    assert tower
    assert all("vision_tower" in name or "visual" in name for name in tower)
    assert sum(scheme == "W3A16" for scheme in schemes.values()) == 14
    assert torch.equal(logits(loaded, result.processor), logits(result.model, result.processor))


def test_a_loaded_model_is_not_changed(calibration: Path) -> None:
    model, processor = tiny.tiny("internvl")
    before = copy.deepcopy(model.state_dict())
    result = mbq.quantize(
        model, processor, data=calibration, images=calibration.parent / "images", num_calibration_samples=4
    )
    assert result.folder is None
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert result.bytes_after < result.bytes_before


def test_every_file_of_the_folder(
    float_folder: Callable[[str], Path], calibration: Path, run: Callable[..., Any]
) -> None:
    result = run(float_folder("internvl"), seed=3, max_shard_size="200KB")
    folder = result.folder
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = {path.name for path in folder.glob("*.safetensors")}
    assert shards == set(index["weight_map"].values())
    assert len(shards) > 1
    for name in ("config.json", "generation_config.json", "tokenizer.json", "processor_config.json"):
        assert (folder / name).is_file(), name
    assert (folder / "chat_template.jinja").read_text() == tiny.INTERNVL_TEMPLATE

    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert recipe["seed"] == 3
    assert recipe["group_size"] == 128
    assert recipe["data"] == "calib.jsonl", "no folders of this machine"
    assert recipe["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert str(calibration.parent) not in (folder / "recipe.yaml").read_text()

    search = json.loads((folder / "search.json").read_text())
    assert [(row["block"], row["group"]) for row in search] == [
        (block, group) for block in range(2) for group in ("qkv", "o", "gate_up", "down")
    ]
    for found in search:
        if found["skipped"] is None:
            assert len(found["losses"]) == 20
            assert found["losses"].index(min(found["losses"])) == round(found["alpha"] * 20)

    sensitivity = json.loads((folder / "sensitivity.json").read_text())
    assert sensitivity["vision"]["attn"][-1] == 0, "nothing attends to the last block's vision tokens"
    assert all(value > 0 for value in sensitivity["language"]["attn"])


def test_the_same_recipe_gives_the_same_bytes(
    float_folder: Callable[[str], Path], run: Callable[..., Any], tmp_path: Path
) -> None:
    def digest(name: str) -> str:
        folder = run(float_folder("internvl"), output=tmp_path / name, num_calibration_samples=4).folder
        return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()

    assert digest("one") == digest("two")


def test_progress_tells_each_step_to_its_end(float_folder: Callable[[str], Path], run: Callable[..., Any]) -> None:
    told: dict[str, list[tuple[int, int]]] = {}
    notes = []

    def progress(step: str, done: int, total: int, note: str) -> None:
        told.setdefault(step, []).append((done, total))
        notes.append(note)

    run(float_folder("internvl"), progress=progress)
    assert {step: calls[-1] for step, calls in told.items()} == {
        "calibrate": (8, 8),
        "sensitivity": (2, 2),
        "search": (2, 2),
        "quantize": (14, 14),
    }
    assert any(note.startswith("block 1, loss ") for note in notes)


def test_unknown_options_and_values_are_named() -> None:
    with pytest.raises(mbq.MBQError, match="Unknown option 'bits'"):
        mbq.quantize("model", bits=3)
    with pytest.raises(mbq.MBQError, match="Unknown method 'magic'; choose one of rtn, smoothquant, awq, fixed, mbq"):
        mbq.quantize("model", method="magic")
    with pytest.raises(mbq.MBQError, match="--formatting is 'loose'; choose one of plain, few-shot, interleaved"):
        mbq.quantize("model", formatting="loose")
    with pytest.raises(mbq.MBQError, match="mbq calibrates on image-text pairs; give them with --data"):
        mbq.quantize("model")
