"""What ``mbq inspect`` says of a configuration is what ``mbq quantize`` then makes of the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

import mbq
from benchmarks.decode_models import FAMILIES
from mbq.cli import app
from mbq.errors import MBQError
from mbq.inspection import inspect
from mbq.qlinear import QuantLinear
from tests import tiny


@pytest.mark.parametrize("tower", [None, "W8A8"])
@pytest.mark.parametrize("scheme", ["W3A16", "W4A8"])
@pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
def test_numbers_are_those_of_the_quantized_model(
    family: str, scheme: str, tower: str | None, float_folder: Callable[[str], Path], calibration: Path, tmp_path: Path
) -> None:
    options = {"scheme": scheme, "method": "rtn", "vision_tower": tower, "num_calibration_samples": 2}
    found = inspect(float_folder(family), **options)
    data = {"data": calibration, "images": calibration.parent / "images"} if tower else {}
    result = mbq.quantize(float_folder(family), output=tmp_path / "out", **options, **data)
    layers = [module for module in result.model.modules() if isinstance(module, QuantLinear)]
    assert sum(found.quantized.values()) == len(layers)
    for (name, shape), count in found.quantized.items():
        same = [each for each in layers if (each.out_features, each.in_features) == shape and each.scheme.name == name]
        assert len(same) == count
    assert found.cost.weights == result.bytes_before
    written = [load_file(file) for file in (tmp_path / "out").glob("*.safetensors")]
    assert found.cost.packed == sum(tensor.nbytes for tensors in written for tensor in tensors.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_7b_model_is_inspected_without_its_weights(family: str, tmp_path: Path) -> None:
    _, config = FAMILIES[family]()
    config.architectures, config.dtype = [FAMILIES[family]()[0].__name__], "bfloat16"
    config.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    found = inspect(tmp_path, num_calibration_samples=128, max_seq_length=1024)
    parameters = 28 * (2 * 3584 * 3584 + 2 * 512 * 3584 + 3 * 18944 * 3584)
    counted = sum(outputs * inputs * count for (_, (outputs, inputs)), count in found.quantized.items())
    assert counted == parameters
    assert found.cost.weights == pytest.approx({"llava_onevision": 16.06e9, "qwen2_vl": 16.58e9}[family], rel=0.001)
    # 3 bits, a 16-bit scale and a 3-bit zero for 128 weights; the rest stays.
    quantized = parameters * (3 + 19 / 128) / 8
    assert found.cost.packed == pytest.approx(found.cost.weights - 2 * parameters + quantized, rel=1e-4)
    assert found.cost.inputs == 128 * 1024 * (30 * 3584 * 2 + 2 * 128 * 2 + 8) + 1024 * 3584 * 2
    assert found.cost.apart < found.cost.weights - 27 * 2 * parameters / 28


def test_the_command_prints_sizes(float_folder: Callable[[str], Path]) -> None:
    done = CliRunner().invoke(app, ["inspect", str(float_folder("internvl")), "--scheme", "W4A16"])
    assert done.exit_code == 0
    assert "W4A16" in done.stdout
    assert "become" in done.stdout
    assert "kept" in done.stdout
    for line in ("Weights: the whole model on ", "Activations: every block's inputs", "Needed: about ", "Time: about "):
        assert f"\n{line}" in done.stdout


def test_what_would_not_fit_is_said_in_the_place_of_a_plan(float_folder: Callable[[str], Path]) -> None:
    found = inspect(float_folder("internvl"), num_calibration_samples=10**6, device="cpu")
    assert isinstance(found.plan, str)
    assert found.plan.startswith("Activations of 1000000 calibration samples take ")
    assert "; lower --num-calibration-samples to " in found.plan


def test_what_cannot_be_quantized_cannot_be_inspected(float_folder: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(MBQError, match="no multiple of the group size 100"):
        inspect(float_folder("internvl"), group_size=100)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(MBQError, match="takes no images"):
        inspect(tmp_path)
