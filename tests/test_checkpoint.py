"""Folders: written whole or not at all, read by mbq and by transformers alone, refused where damaged."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils import is_match
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText, CompressedTensorsConfig

import mbq
from mbq.checkpoint.compressed_tensors import (
    checkpoint_bytes,
    float_activations,
    loading_note,
    quantization_config,
    replace_linears,
    save_model,
    serving_note,
)
from mbq.checkpoint.folder import check_new, new_folder
from mbq.errors import MBQError
from mbq.qlinear import QuantLinear
from mbq.qtensor import fake_quantize, fake_quantize_activations, quantize
from mbq.quantized import load
from mbq.scheme import SCHEMES, Scheme
from tests.tiny import FAMILY_NAMES, inputs, save, tiny

IGNORE = ["re:.*lm_head.*", "re:.*visual.*", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"]


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not is_match(name, module, IGNORE)
    }


def pack_model(model: Any, scheme: Scheme) -> Any:
    for name, linear in linears(model).items():
        q = quantize(linear.weight, scheme.weights)
        model.set_submodule(name, QuantLinear.from_qtensor(q, scheme, linear.bias))
    return model


def logits(model: Any, processor: Any) -> torch.Tensor:
    batch = inputs(processor).to(model.dtype)
    with torch.no_grad():
        return model(**batch).logits.float()


def fake_quantized(folder: Path, scheme: Scheme, activations: Callable[[torch.Tensor], torch.Tensor] | None) -> Any:
    """The float model with its weights rounded in place, and a hook that rounds what each linear reads."""
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    for linear in linears(model).values():
        linear.weight.data = fake_quantize(linear.weight.data, scheme.weights)
        if activations is not None:
            linear.register_forward_pre_hook(lambda _, args: (activations(args[0]),))
    return model


def worst_layer(model: Any, reference: Any, processor: Any) -> float:
    """The largest difference of a linear's output from the reference's on the *same* input, in units of its spread.

    Layer by layer, because a sum rounded otherwise can flip the code of a later activation, and that spreads.
    """
    differences = []

    def compare(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
            expected = reference.get_submodule(name)(args[0])
            differences.append(((output - expected).abs().max() / expected.std()).item())

        return hook

    handles = [model.get_submodule(name).register_forward_hook(compare(name)) for name in linears(reference)]
    logits(model, processor)
    for handle in handles:
        handle.remove()
    assert len(differences) == 14
    return max(differences)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], tuple[Path, Path]]:
    """``folders(family, scheme, dtype)``: a float folder and the same quantized, each written once."""
    root = tmp_path_factory.mktemp("folders")

    def make(family: str, name: str, dtype: str = "bfloat16") -> tuple[Path, Path]:
        float_folder, folder = root / f"{family}-{dtype}", root / f"{family}-{dtype}-{name}"
        if not float_folder.exists():
            save(family, float_folder, dtype=getattr(torch, dtype))
        if not folder.exists():
            model = AutoModelForImageTextToText.from_pretrained(float_folder)
            scheme = SCHEMES[name]
            save_model(pack_model(model, scheme), folder, quantization_config(scheme, IGNORE))
        return float_folder, folder

    return make


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("name", ["W2A16", "W3A16", "W4A16", "W4A16_SYM"])
def test_weight_only_folders_give_the_same_logits_everywhere(folders: Any, family: str, name: str) -> None:
    """Bit for bit: the search's fake quantization, mbq.load, and transformers alone by either call."""
    float_folder, folder = folders(family, name)
    processor = tiny(family)[1]
    packed = load(folder)
    found = logits(packed, processor)
    assert torch.equal(found, logits(fake_quantized(float_folder, SCHEMES[name], None), processor))
    for options in ({}, {"quantization_config": CompressedTensorsConfig(dequantize=True)}):
        alone = AutoModelForImageTextToText.from_pretrained(folder, **options).eval()
        assert torch.equal(found, logits(alone, processor))
    difference = (found - logits(load(float_folder), processor)).abs().max()
    assert difference > 0.1  # and the quantization is really there


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("name", ["W8A8", "W4A8", "W3A8", "W4A4"])
def test_weight_activation_folders_compute_what_the_search_simulates(folders: Any, family: str, name: str) -> None:
    """Every layer in float32, to the rounding of its sums (with no flipped code, logits agree within 4e-6, too)."""
    scheme = SCHEMES[name]
    float_folder, folder = folders(family, name, "float32")
    processor = tiny(family)[1]
    loaded = load(folder)
    simulated = fake_quantized(float_folder, scheme, lambda x: fake_quantize_activations(x, scheme.activations))
    assert worst_layer(loaded, simulated, processor) < 1e-5
    assert worst_layer(loaded, load(float_folder), processor) > 1e-3


@pytest.mark.parametrize("name", ["W8A8", "W4A8", "W3A8", "W4A4"])
def test_transformers_alone_divides_activations_by_another_number(folders: Any, name: str) -> None:
    """The card's sentence: the plain call has the same weights, and (2^b - 1) / 2 instead of 2^(b-1) - 1."""
    scheme = SCHEMES[name]
    float_folder, folder = folders("internvl", name, "float32")
    processor = tiny("internvl")[1]

    def theirs(x: torch.Tensor) -> torch.Tensor:
        levels = 2**scheme.activations.bits - 1
        scale = x.abs().amax(-1, keepdim=True) / (levels / 2)
        return (x / scale).round().clamp(-(levels + 1) // 2, levels // 2) * scale

    alone = AutoModelForImageTextToText.from_pretrained(folder).eval()
    logits(alone, processor)  # the first forward pass unpacks
    ours = fake_quantized(float_folder, scheme, lambda x: fake_quantize_activations(x, scheme.activations))
    assert worst_layer(alone, fake_quantized(float_folder, scheme, theirs), processor) < 1e-5
    assert worst_layer(alone, ours, processor) > 1e-3
    assert f"by {(2**scheme.activations.bits - 1) / 2}" in loading_note(scheme)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_loaded_model_generates_with_packed_weights(folders: Any, family: str) -> None:
    _, folder = folders(family, "W3A16")
    model, processor = load(folder), tiny(family)[1]
    batch = inputs(processor).to(model.dtype)
    answer = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert answer.shape[1] > batch["input_ids"].shape[1]
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len(layers) == 14  # two blocks of q, k, v, o, gate, up, down
    assert not linears(model)
    assert type(model).__name__ == type(tiny(family)[0]).__name__


# What transformers 5 saves of a model that it made itself lacks a level of published checkpoints, which vLLM wants.
TOWERS = {"llava_onevision": "vision_tower.vision_model."}


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_tensors_have_the_names_of_the_original_checkpoint(folders: Any, family: str) -> None:
    float_folder, folder = folders(family, "W3A16")
    with (
        safe_open(float_folder / "model.safetensors", "pt") as before,
        safe_open(folder / "model.safetensors", "pt") as after,
    ):
        old, new = set(before.keys()), set(after.keys())
    old = {name.replace("vision_tower.", TOWERS.get(family, "vision_tower.")) for name in old}
    packed = {name.removesuffix("_packed") for name in new if name.endswith(".weight_packed")}
    assert len(packed) == 14
    assert packed < old
    suffixes = ("_packed", "_scale", "_zero_point", "_shape")
    assert new == (old - packed) | {name + suffix for name in packed for suffix in suffixes}


@pytest.mark.parametrize("name", SCHEMES)
def test_bytes_on_disk_are_the_counted_bits(folders: Any, name: str) -> None:
    float_folder, folder = folders("qwen2_vl", name)
    scheme, bits = SCHEMES[name], SCHEMES[name].weights.bits
    before, after = (load_file(path / "model.safetensors") for path in (float_folder, folder))
    codes = "weight" if name == "W8A8" else "weight_packed"
    for tensor_name, tensor in after.items():
        if tensor_name.endswith("weight_scale"):
            layer = tensor_name.removesuffix("weight_scale")
            rows, width = before[layer + "weight"].shape
            groups = width // 128 if scheme.activations is None else 1
            assert after[layer + codes].nbytes * 8 == rows * width * bits
            assert tensor.nbytes * 8 == rows * groups * 16
            zero = after.get(layer + "weight_zero_point")
            assert (zero is None) == scheme.weights.symmetric
            assert zero is None or zero.nbytes * 8 == rows * groups * bits
    model = AutoModelForImageTextToText.from_pretrained(float_folder)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert checkpoint_bytes(model, config) == sum(tensor.nbytes for tensor in after.values())


@pytest.mark.parametrize("name", SCHEMES)
def test_the_config_spells_out_every_argument(name: str) -> None:
    scheme = SCHEMES[name]
    config = quantization_config(scheme, IGNORE)
    parsed = QuantizationConfig.model_validate(config)
    assert parsed.quantization_status == "compressed"
    assert parsed.ignore == IGNORE
    assert parsed.format == ("int-quantized" if name == "W8A8" else "pack-quantized")
    (group,) = parsed.config_groups.values()
    assert group.targets == ["Linear"]
    weights, activations = group.weights, group.input_activations
    assert (weights.num_bits, weights.type, weights.symmetric) == (scheme.weights.bits, "int", scheme.weights.symmetric)
    if scheme.activations is None:
        assert (weights.strategy, weights.group_size, activations) == ("group", 128, None)
    else:
        assert weights.strategy == "channel"
        found = (
            activations.num_bits,
            activations.type,
            activations.symmetric,
            activations.strategy,
            activations.dynamic,
        )
        assert found == (scheme.activations.bits, "int", True, "token", True)


def test_the_tower_of_a_published_checkpoint_keeps_its_names(folders: Any, tmp_path: Path) -> None:
    """A folder whose float model had them too: they are not added twice, and nothing is lost."""
    float_folder, folder = folders("llava_onevision", "W3A16")
    save_model(load(folder), tmp_path, json.loads((folder / "config.json").read_text())["quantization_config"])
    first, again = (load_file(path / "model.safetensors") for path in (folder, tmp_path))
    assert first.keys() == again.keys()
    tower = {name for name in first if "vision_model." in name}
    published = {
        name.replace("vision_tower.", TOWERS["llava_onevision"])
        for name in load_file(float_folder / "model.safetensors")
    }
    assert tower == {name for name in published if "vision_model." in name}
    assert tower
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("name", SCHEMES)
def test_folders_whose_activations_vllm_leaves_alone_say_so(name: str) -> None:
    """Four bits packed with rounded activations; docs/engines.md has the measurement."""
    silent = name in ("W4A8", "W4A4")
    assert ("16-bit activations, and does not say so" in serving_note(SCHEMES[name])) == silent
    assert bool(float_activations(SCHEMES[name])) == silent


def test_sharded_folders_load(folders: Any, tmp_path: Path) -> None:
    float_folder, folder = folders("llava_onevision", "W3A16")
    model = pack_model(AutoModelForImageTextToText.from_pretrained(float_folder), SCHEMES["W3A16"])
    save_model(model, tmp_path, quantization_config(SCHEMES["W3A16"], IGNORE), max_shard_size="200KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert not (tmp_path / "model.safetensors").exists()
    processor = tiny("llava_onevision")[1]
    assert torch.equal(logits(load(tmp_path), processor), logits(load(folder), processor))
    shutil.move(tmp_path / sorted(set(index["weight_map"].values()))[1], tmp_path / "elsewhere")
    with pytest.raises(MBQError, match=r"lacks the weights file .*00002-of"):
        load(tmp_path)


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model, processor = tiny("qwen2_vl", tied=True, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "float")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "float")
    config = quantization_config(SCHEMES["W4A16"], IGNORE)
    expected = checkpoint_bytes(model, config)
    save_model(pack_model(model, SCHEMES["W4A16"]), tmp_path / "packed", config)
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    assert expected == sum(tensor.nbytes for tensor in tensors.values())
    loaded = load(tmp_path / "packed")
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert torch.equal(logits(loaded, processor), logits(model, processor))


def test_dtype_of_a_loaded_model(folders: Any) -> None:
    _, folder = folders("internvl", "W4A16")
    model = load(folder, dtype="float32")
    assert model.dtype == torch.float32
    layer = next(module for module in model.modules() if isinstance(module, QuantLinear))
    assert layer.weight_scale.dtype == torch.float32
    assert layer.weight_packed.dtype == torch.int32
    processor = tiny("internvl")[1]
    found, expected = logits(model, processor), logits(load(folder), processor)
    assert (found - expected).abs().max() < 0.2 * expected.std()  # bf16 rounding of every layer: measured 0.07


def test_a_loaded_model_saves_again(folders: Any, tmp_path: Path) -> None:
    _, folder = folders("llava_onevision", "W3A16")
    load(folder).save_pretrained(tmp_path)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert torch.equal(*(logits(load(path), tiny("llava_onevision")[1]) for path in (folder, tmp_path)))


def test_a_model_with_its_own_code(tmp_path: Path) -> None:
    save("internvl2_internlm2", tmp_path / "float")
    made = mbq.quantize(
        tmp_path / "float", scheme="W3A16", method="rtn", output=tmp_path / "out", trust_remote_code=True
    )
    loaded = load(tmp_path / "out", trust_remote_code=True)
    assert sum(isinstance(module, QuantLinear) for module in loaded.modules()) == 10  # wqkv, wo, w1, w3, w2 twice
    assert torch.equal(logits(loaded, made.processor), logits(made.model, made.processor))
    with pytest.raises(MBQError, match=r"runs code of its own .*--trust-remote-code"):
        load(tmp_path / "out")


def test_another_scheme_for_the_vision_tower(tmp_path: Path) -> None:
    model, processor = tiny("internvl")
    others = {"re:.*vision_tower.*": SCHEMES["W8A8"]}
    config = quantization_config(SCHEMES["W4A8"], ["re:.*lm_head.*", "re:.*multi_modal_projector.*"], others)
    assert config["format"] == "mixed-precision"
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and not is_match(name, linear, config["ignore"]):
            scheme = SCHEMES["W8A8" if "vision_tower" in name else "W4A8"]
            layer = QuantLinear.from_qtensor(quantize(linear.weight, scheme.weights), scheme, linear.bias)
            model.set_submodule(name, layer)
    save_model(model, tmp_path, config)
    loaded = load(tmp_path)
    schemes = {name: layer.scheme.name for name, layer in loaded.named_modules() if isinstance(layer, QuantLinear)}
    assert set(schemes.values()) == {"W8A8", "W4A8"}
    assert all((scheme == "W8A8") == ("vision_tower" in name) for name, scheme in schemes.items())
    assert torch.equal(logits(loaded, processor), logits(model, processor))


def test_a_config_that_does_not_match_the_layers_is_refused(tmp_path: Path) -> None:
    model = pack_model(tiny("internvl")[0], SCHEMES["W3A16"])
    with pytest.raises(MBQError, match=r"vision_tower.* is not quantized, but the ignore patterns"):
        save_model(model, tmp_path, quantization_config(SCHEMES["W3A16"], ["re:.*lm_head.*"]))
    with pytest.raises(MBQError, match=r"q_proj is quantized, but the ignore patterns"):
        save_model(model, tmp_path, quantization_config(SCHEMES["W3A16"], [*IGNORE, "re:.*q_proj"]))
    assert not any(tmp_path.iterdir())
    with pytest.raises(MBQError, match="matches no linear"):
        replace_linears(tiny("internvl")[0], quantization_config(SCHEMES["W3A16"], ["re:.*"]))


def damage(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


LAYER = "model.layers.0.mlp.down_proj."


def first_group(config: dict[str, Any]) -> dict[str, Any]:
    return config["quantization_config"]["config_groups"]["group_0"]


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (
            lambda f: damage(f, lambda t: t.pop(LAYER + "weight_packed")),
            "1 tensors are missing, .*down_proj.weight_packed",
        ),
        (
            lambda f: damage(
                f, lambda t: t.update({LAYER + "weight_packed": t[LAYER + "weight_packed"][:, 1:].clone()})
            ),
            "of the wrong shape, .*down_proj.weight_packed",
        ),
        (lambda f: damage(f, lambda t: t.update({LAYER + "extra": torch.ones(1)})), "left over, .*extra"),
        (lambda f: damage(f, lambda t: t[LAYER + "weight_shape"].add_(1)), "weight_shape of .*down_proj is"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x00" * 100), "model.safetensors is damaged"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text('{"model'), "not JSON"),
        (lambda f: edit(f, lambda c: c["quantization_config"].update(quant_method="gptq")), "quantized with 'gptq'"),
        (lambda f: edit(f, lambda c: first_group(c).update(format="marlin-24")), "Format 'marlin-24' of W3A16"),
        (lambda f: edit(f, lambda c: first_group(c)["weights"].update(type="float")), "weights of W3A16"),
        (lambda f: edit(f, lambda c: first_group(c)["weights"].update(num_bits=5)), "bits of W5A16"),
        (lambda f: edit(f, lambda c: c["quantization_config"].update(config_groups={})), "names no weights"),
        (lambda f: edit(f, lambda c: c.update(architectures=["NoSuchModel"])), "NoSuchModel"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_sentence(
    folders: Any, tmp_path: Path, harm: Callable[[Path], Any], sentence: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(folders("qwen2_vl", "W3A16")[1], folder)
    harm(folder)
    with pytest.raises(MBQError, match=sentence) as raised:
        load(folder)
    assert "\n" not in str(raised.value)


def test_an_unknown_kernel_is_refused_before_loading(folders: Any) -> None:
    with pytest.raises(MBQError, match="Unknown kernel 'fast'"):
        load(folders("qwen2_vl", "W3A16")[1], kernel="fast")


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with new_folder(target, needs=10) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("content")
        assert not target.exists()
    assert (target / "sub" / "a").read_text() == "content"
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_an_empty_folder_is_taken_and_a_full_one_is_not(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    with new_folder(target) as folder:
        (folder / "a").write_text("first")
    with pytest.raises(MBQError, match="out is not empty; choose another"), new_folder(target) as folder:
        (folder / "a").write_text("second")
    assert (target / "a").read_text() == "first"
    with pytest.raises(MBQError, match="is a file"):
        check_new(target / "a")


@pytest.mark.parametrize(
    ("error", "raised", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), MBQError, r"disk of .*out is full: .* about 0.00 GB; free"),
        (PermissionError(errno.EACCES, "Permission denied"), MBQError, r"out cannot be written \(Permission denied\)"),
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
        (ValueError("a mistake of ours"), ValueError, "a mistake of ours"),
    ],
)
def test_whatever_interrupts_the_writer_leaves_nothing(
    tmp_path: Path, error: BaseException, raised: type[BaseException], sentence: str
) -> None:
    def write() -> None:
        with new_folder(tmp_path / "out", needs=1000) as folder:
            (folder / "half").write_text("written")
            raise error

    with pytest.raises(raised) as caught:
        write()
    assert re.search(sentence, str(caught.value))
    assert not any(tmp_path.iterdir())


def test_a_disk_too_small_is_seen_before_the_start(tmp_path: Path) -> None:
    sentence = r"is full: the model needs about 1000000\.00 GB and [\d.]+ GB are free"
    with pytest.raises(MBQError, match=sentence), new_folder(tmp_path / "out", needs=10**15):
        pytest.fail("nothing is written")
    assert not any(tmp_path.iterdir())
