"""Float models and processors from folders, and a sentence for each way that can fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from mbq.architecture import bind
from mbq.errors import MBQError
from mbq.loading import check_finite, load_model, load_processor, torch_device, torch_dtype
from tests.tiny import ALL_FAMILY_NAMES, inputs, save, tiny


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("qwen2_vl", tmp_path_factory.mktemp("qwen2_vl"))


@pytest.fixture
def folder(qwen: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    for file in qwen.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def refused(folder: Path, **options: object) -> str:
    with pytest.raises(MBQError) as error:
        load_model(folder, **options)  # type: ignore[arg-type]
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


@pytest.mark.parametrize("family", ALL_FAMILY_NAMES)
def test_a_folder_gives_the_model_that_was_saved(family: str, tmp_path: Path) -> None:
    model, processor = tiny(family)
    save(family, tmp_path)
    loaded = load_model(tmp_path, trust_remote_code=True)
    same = load_processor(tmp_path, trust_remote_code=True)
    assert not loaded.training
    assert loaded.dtype == torch.float32
    given, again = inputs(processor, images=2), inputs(same, images=2)
    assert torch.equal(given["input_ids"], again["input_ids"])
    with torch.no_grad():
        torch.testing.assert_close(loaded(**again).logits, model(**given).logits, rtol=1e-5, atol=1e-5)
    assert bind(loaded).names == bind(model).names


def test_dtype(qwen: Path) -> None:
    assert load_model(qwen, dtype="bfloat16").dtype == torch.bfloat16
    assert load_model(qwen, dtype=torch.float16).dtype == torch.float16
    with pytest.raises(MBQError, match=r"--dtype int4 is unknown; give auto, bfloat16, float16, float32"):
        load_model(qwen, dtype="int4")


def test_no_folder(tmp_path: Path) -> None:
    assert refused(tmp_path / "nowhere").startswith(f"There is no folder {tmp_path / 'nowhere'}")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert f"{folder} has no config.json" in refused(folder)


@pytest.mark.parametrize("text", ['{"model_type": "qwen2_vl",', "[]", ""])
def test_a_damaged_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert str(folder / "config.json") in refused(folder)


def test_quantized_already(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "compressed-tensors"})
    assert f"{folder} is quantized already (compressed-tensors); give the float model" in refused(folder)


def test_a_text_only_model(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert "LlamaForCausalLM, which takes no images" in refused(tmp_path)


def test_remote_code_is_not_run_unasked(tmp_path: Path) -> None:
    save("internvl2_internlm2", tmp_path)
    (tmp_path / "configuration_internvl_chat.py").write_text("raise SystemExit('this code ran')")
    message = refused(tmp_path)
    assert "modeling_internvl_chat.py" in message
    assert "--trust-remote-code" in message
    load_processor(tmp_path)  # the tokenizer is a plain one, and the configuration's code is not needed


def test_remote_code_of_another_transformers(tmp_path: Path) -> None:
    """Code from before transformers 5 leaves out ``post_init``, which from_pretrained relies on today."""
    save("internvl2_internlm2", tmp_path)
    code = tmp_path / "modeling_internvl_chat.py"
    code.write_text(code.read_text().replace("        self.post_init()\n", ""))
    message = refused(tmp_path, trust_remote_code=True)
    assert f"The code in {tmp_path} does not run with transformers" in message


def test_a_tokenizer_with_code_is_not_run_unasked(tmp_path: Path) -> None:
    save("internvl2_internlm2", tmp_path)
    (tmp_path / "tokenization.py").write_text("raise SystemExit('this code ran')")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["tokenization.Own", None]}, "tokenizer_class": "Own"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(MBQError, match=r"runs code of its own; read it, then allow it with --trust-remote-code"):
        load_processor(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_a_damaged_weights_file_is_named(folder: Path, damage: str) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes({"cut": content[:-100], "garbage": b"\xff" * 64 + content[64:], "empty": b""}[damage])
    assert f"{file} is damaged" in refused(folder)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "holds no weights" in refused(folder)


def test_a_shard_that_is_not_there(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    assert "lacks the weights file model-00002-of-00002.safetensors" in refused(folder)


def test_an_index_that_points_outside(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder.parent / "elsewhere.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert "names '../elsewhere.safetensors', which is no safetensors file beside it" in refused(folder)


def test_no_pickle_is_loaded(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "holds no weights (*.safetensors)" in refused(folder)


def test_weights_that_are_missing_are_not_made_up(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "q_proj.weight" in name)
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "self_attn.q_proj.weight (1 missing in all)" in refused(folder)


def test_weights_of_another_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "q_proj.weight" in name)
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert f"{folder} cannot be loaded" in refused(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(folder: Path, value: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "layers.1" in name and "up_proj.weight" in name)
    tensors[name][3, :2] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    message = refused(folder)
    assert "layers.1.mlp.up_proj.weight holds 2 values that are NaN or infinite" in message


def test_finite_weights_pass() -> None:
    check_finite(tiny("internvl")[0])


def test_devices() -> None:
    assert torch_device("cpu") == torch.device("cpu")
    with pytest.raises(MBQError, match="--device abacus is no device"):
        torch_device("abacus")
    with pytest.raises(MBQError, match="--device meta is not one that mbq runs on"):
        torch_device("meta")
    with pytest.raises(MBQError, match=r"--device cuda:99, but this machine has \d+ GPUs"):
        torch_device("cuda:99")
    assert torch_dtype("auto") == "auto"


def test_a_folder_without_a_processor(folder: Path) -> None:
    (folder / "processor_config.json").unlink()
    with pytest.raises(MBQError, match=r"image processor|cannot be loaded"):
        load_processor(folder)


def test_a_processor_without_a_chat_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(MBQError, match="has no chat template"):
        load_processor(folder)
