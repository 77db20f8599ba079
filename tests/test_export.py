"""``mbq.export``: the same function with other weights, which round to what ``mbq.quantize`` packs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

import mbq
from mbq.architecture import bind
from mbq.calibration import CalibrationBatch, calibration_batches, language_mask
from mbq.cli import app
from mbq.errors import MBQError
from mbq.qlinear import QuantLinear
from mbq.qtensor import fake_quantize, quantize
from mbq.rows import read_rows
from mbq.scheme import scheme_named
from mbq.search import _Search
from mbq.world import write
from tests import tiny

MODELS = Path(__file__).parents[1] / "models"


def logits(model: Any, processor: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(**tiny.inputs(processor, answer="A red circle.")).logits


@pytest.mark.parametrize("family", tiny.ALL_FAMILY_NAMES)
def test_the_function_stays_and_the_weights_do_not(
    family: str, float_folder: Callable[[str], Path], options: dict[str, Any], tmp_path: Path
) -> None:
    trust = family == "internvl2_internlm2"
    model = float_folder(family)
    made = mbq.export(model, output=tmp_path / "out", trust_remote_code=trust, **options)
    before, after = (mbq.load(folder, trust_remote_code=trust) for folder in (model, made.folder))
    processor = mbq.load_processor(made.folder, trust_remote_code=trust)
    torch.testing.assert_close(logits(after, processor), logits(before, processor), atol=1e-4, rtol=1e-4)
    changed = {name for name, value in before.state_dict().items() if not torch.equal(value, after.state_dict()[name])}
    folded = [row for row in made.search if row.skipped is None and row.alpha]
    assert folded, "the search chose something but E = 1"
    binding = bind(before)
    for row in folded:
        group = next(group for group in binding.architecture.groups if group.name == row.group)
        assert binding.name(row.block, group.prev) + ".weight" in changed
        assert {binding.name(row.block, path) + ".weight" for path in group.linears} <= changed
    assert all(name.startswith(binding.architecture.blocks) for name in changed), "only blocks are equalized"


def test_a_tower_has_the_names_that_engines_want(
    float_folder: Callable[[str], Path], options: dict[str, Any], tmp_path: Path
) -> None:
    made = mbq.export(float_folder("llava_onevision"), output=tmp_path / "out", **options)
    tower = [name for name in load_file(made.folder / "model.safetensors") if "vision_tower." in name]
    assert tower
    assert all(".vision_model." in f".{name}" for name in tower)


W3_FLOAT32 = (torch.float32, {"scheme": "W3A16", "group_size": 32})
W4_BFLOAT16 = (torch.bfloat16, {"scheme": "W4A16", "group_size": 64, "gqa_fold": True, "norm": "mse"})


@pytest.mark.parametrize(
    ("family", "dtype", "recipe"),
    [
        *((family, *each) for family in tiny.ALL_FAMILY_NAMES for each in (W3_FLOAT32, W4_BFLOAT16)),
        ("qwen2_vl", torch.bfloat16, {"scheme": "W4A8", "distorted_input": True}),
        ("internvl", torch.float32, {"scheme": "W8A8", "method": "smoothquant", "ignore": ["re:.*layers.1.*"]}),
    ],
)
def test_its_weights_round_to_the_codes_of_quantize(
    family: str, dtype: torch.dtype, recipe: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    recipe = {**options, **recipe, "trust_remote_code": family == "internvl2_internlm2"}
    model = tiny.save(family, tmp_path / "model", dtype=dtype)
    packed = mbq.quantize(model, output=tmp_path / "packed", **recipe).model
    folder = mbq.export(model, output=tmp_path / "equalized", **recipe).folder
    equalized = mbq.load(folder, trust_remote_code=recipe["trust_remote_code"])
    layers = {name: module for name, module in packed.named_modules() if isinstance(module, QuantLinear)}
    assert len(layers) >= 4
    for name, layer in layers.items():
        weight = equalized.get_parameter(f"{name}.weight")
        assert weight.dtype == dtype
        expected = QuantLinear.from_qtensor(quantize(weight, layer.scheme.weights), layer.scheme, None)
        for kind, tensor in expected.state_dict().items():
            assert torch.equal(tensor, layer.state_dict()[kind]), f"{kind} of {name}"


def test_the_vision_tower_too(float_folder: Callable[[str], Path], options: dict[str, Any], tmp_path: Path) -> None:
    recipe = {**options, "vision_tower": "W4A8"}
    packed = mbq.quantize(float_folder("internvl"), output=tmp_path / "packed", **recipe).model
    equalized = mbq.load(mbq.export(float_folder("internvl"), output=tmp_path / "equalized", **recipe).folder)
    tower = [name for name, m in packed.named_modules() if isinstance(m, QuantLinear) and "vision_tower" in name]
    assert tower
    for name in tower:
        layer = packed.get_submodule(name)
        codes = quantize(equalized.get_parameter(f"{name}.weight"), layer.scheme.weights)
        assert torch.equal(QuantLinear.from_qtensor(codes, layer.scheme, None).weight_packed, layer.weight_packed)


def test_a_trained_model_loses_less_when_plainly_rounded(tmp_path: Path) -> None:
    """Round to nearest at W3 g32, of the original and of the equalized folder, by what answers lose: the search's aim.

    The squared difference of the logits at the answers to questions that were not calibrated on.
    """
    model = MODELS / "qwen2_vl"
    data = write(tmp_path / "data", "calibration", tasks=["house", "motto", "caption"], per_task=12)
    held_out = write(tmp_path / "held_out", "test", tasks=["house", "motto", "caption"], per_task=12)
    made = mbq.export(
        model,
        output=tmp_path / "out",
        group_size=32,
        data=data,
        num_calibration_samples=24,
        batch_size=8,
        dtype="float32",
        device="cpu",
    )
    batches = batches_of(model, held_out)
    wanted = answers(mbq.load(model, dtype="float32"), batches)
    lost = {}
    for name, folder in (("original", model), ("equalized", made.folder)):
        rounded = mbq.load(folder, dtype="float32")
        for path in bind(rounded).names:
            weight = rounded.get_parameter(f"{path}.weight")
            weight.data = fake_quantize(weight.data, scheme_named("W3A16", 32).weights)
        lost[name] = (answers(rounded, batches) - wanted).square().mean().item()
    assert lost["equalized"] < lost["original"]


def batches_of(model: Path, data: Path) -> list[CalibrationBatch]:
    ids = set(bind(mbq.load(model)).vision_tokens)
    rows = read_rows(data)
    return calibration_batches(rows, mbq.load_processor(model), ids, num_samples=len(rows), batch_size=12)


def answers(model: Any, batches: list[CalibrationBatch]) -> torch.Tensor:
    """Logits [position, token] wherever an answer token is predicted."""
    with torch.inference_mode():
        return torch.cat([model(**batch.inputs).logits[language_mask(batch)] for batch in batches])


def test_the_folder_is_an_ordinary_float_one(
    float_folder: Callable[[str], Path], options: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny.save("internvl", tmp_path / "model", dtype=torch.bfloat16)
    made = mbq.export(model, output=tmp_path / "out", max_shard_size="200KB", **options)
    config = json.loads((made.folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    tensors = {name: tensor for file in made.folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    original = load_file(model / "model.safetensors")
    assert {name: (t.shape, t.dtype) for name, t in tensors.items()} == {
        name: (t.shape, t.dtype) for name, t in original.items()
    }
    loaded = AutoModelForImageTextToText.from_pretrained(made.folder)
    processor = AutoProcessor.from_pretrained(made.folder)
    assert torch.equal(logits(loaded, processor), logits(made.model, made.processor))
    assert processor.chat_template == tiny.INTERNVL_TEMPLATE

    recipe = yaml.safe_load((made.folder / "recipe.yaml").read_text())
    assert (recipe["scheme"], recipe["method"], recipe["data"]) == ("W3A16", "mbq", "calib.jsonl")
    assert len(json.loads((made.folder / "search.json").read_text())) == 8
    measured = json.loads((made.folder / "sensitivity.json").read_text())
    assert measured["language"]["attn"] == list(made.sensitivity.language["attn"])
    _, front_matter, card = (made.folder / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front_matter)["tags"] == ["mbq", "equalized"]
    assert "up to the rounding of the folded weights to bfloat16" in card
    assert "3-bit asymmetric integer weights with one scale per 128 input channels" in card
    assert "leave them in 16 bits: `lm_head`, `re:.*vision_tower.*`, `re:.*multi_modal_projector.*`." in card


def test_what_cannot_be_exported_leaves_nothing(
    float_folder: Callable[[str], Path], options: dict[str, Any], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    for wrong, sentence in [
        ({"format": "awq"}, "--format is 'awq'; choose one of equalized"),
        (
            {"format": "openvino"},
            "--format openvino is made by optimum-intel, which needs an older transformers than mbq",
        ),
        (
            {"format": "onnx"},
            "--format onnx is made by optimum-onnx, .*; export --format equalized, and give that folder to",
        ),
        ({"method": "rtn"}, "--method rtn equalizes nothing to export; choose one of smoothquant, awq, fixed, mbq"),
        ({"method": "magic"}, "Unknown method 'magic'"),
        ({"data": None}, r"mbq calibrates on image-text pairs; give them with --data\.$"),
    ]:
        with pytest.raises(MBQError, match=sentence):
            mbq.export(float_folder("internvl"), output=output, **{**options, **wrong})
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_export_goes_on_but_not_as_a_quantization(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.save("qwen2_vl", tmp_path / "model", blocks=3)
    wanted = mbq.export(model, output=tmp_path / "wanted", **options).folder
    search = _Search.block

    def interrupted(self: _Search, index: int, *args: Any) -> Any:
        if index == 2:
            raise KeyboardInterrupt
        return search(self, index, *args)

    with monkeypatch.context() as patch:
        patch.setattr(_Search, "block", interrupted)
        with pytest.raises(KeyboardInterrupt, match="--resume goes on"):
            mbq.export(model, output=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    with pytest.raises(MBQError, match="has another product"):
        mbq.quantize(model, output=tmp_path / "out", resume=True, **options)
    mbq.export(model, output=tmp_path / "out", resume=True, **options)
    for file in wanted.iterdir():
        if file.name != "README.md":  # which says the folder's name
            assert digest(tmp_path / "out" / file.name) == digest(file), file.name


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_the_command(float_folder: Callable[[str], Path], calibration: Path, tmp_path: Path) -> None:
    data = ["--data", calibration, "--images", calibration.parent / "images", "--num-calibration-samples", "4"]
    arguments = ["export", float_folder("llava_onevision"), "--output", tmp_path / "out", *data, "--gqa-fold"]
    done = CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "Equalized for W3A16 by mbq in " in done.stdout
    assert f" s: 8 of 8 groups.\nWrote {tmp_path / 'out'}\n" in done.stdout
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["gqa_fold"] is True

    refused = CliRunner().invoke(app, [str(each) for each in [*arguments, "--format", "onnx"]])
    assert refused.exit_code == 2
    assert refused.stderr.startswith("mbq: --format onnx is made by optimum-onnx")
