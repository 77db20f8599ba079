"""--vision-tower: SmoothQuant on the ViT."""

from __future__ import annotations

import copy
import re

import pytest
import torch

from mbq.architecture import Binding, bind
from mbq.calibration import CalibrationBatch
from mbq.errors import MBQError
from mbq.qtensor import fake_quantize, fake_quantize_activations
from mbq.scheme import SCHEMES
from mbq.vision_tower import smooth_vision_tower, tower_ignore, tower_linears, tower_pattern
from tests.tiny import ALL_FAMILY_NAMES, inputs, tiny


def batch(processor: object, binding: Binding, images: int = 1) -> CalibrationBatch:
    made = dict(inputs(processor, images=images))
    vision = torch.isin(made["input_ids"], torch.tensor(sorted(binding.vision_tokens)))
    return CalibrationBatch(made, torch.full_like(made["input_ids"], -100), vision)


def logits(model: torch.nn.Module, batch: CalibrationBatch) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch.inputs).logits


@pytest.mark.parametrize("family", ALL_FAMILY_NAMES)
def test_smoothing_changes_weights_but_not_the_float_function(family: str) -> None:
    model, processor = tiny(family)
    before = copy.deepcopy(model)
    binding = bind(model)
    batches = [batch(processor, binding, images=1), batch(processor, binding, images=2)]
    names = smooth_vision_tower(binding, batches)
    per_block = 6 if family in ("llava_onevision", "internvl") else 4  # q, k, v apart or fused; o, fc1, fc2
    assert len(names) == 2 * per_block
    assert all(name.startswith(binding.architecture.vision_tower) for name in names)
    changed = [n for n in names if not torch.equal(model.get_submodule(n).weight, before.get_submodule(n).weight)]
    assert len(changed) == 2 * (per_block - 2), "all but the attention's output and fc2 read a norm"
    for each in batches:
        torch.testing.assert_close(logits(model, each), logits(before, each), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(("family", "norm", "linears"), [
    ("llava_onevision", "encoder.layers.1.layer_norm1", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    ("internvl", "encoder.layer.1.layernorm_before", ["attention.q_proj", "attention.k_proj", "attention.v_proj"]),
    ("qwen2_vl", "blocks.1.norm2", ["mlp.fc1"]),
    ("internvl2_internlm2", "encoder.layers.1.norm1", ["attn.qkv"]),
])  # fmt: skip
def test_the_vector_is_smoothquants(family: str, norm: str, linears: list[str]) -> None:
    """After folding, column j of the weights has grown by E_j = sqrt(max|X_j| / max|W_j|), and X_j has shrunk by it."""
    model, processor = tiny(family)
    binding = bind(model)
    batches = [batch(processor, binding, images=1), batch(processor, binding, images=2)]
    tower = binding.vision_tower
    block = norm.rpartition(".")[0]
    found = [tower.get_submodule(f"{block}.{name}") for name in linears]
    seen: list[torch.Tensor] = []
    handle = tower.get_submodule(norm).register_forward_hook(lambda m, a, out: seen.append(out.flatten(0, -2)))
    for each in batches:
        logits(model, each)
    handle.remove()
    x_max = torch.cat(seen).abs().amax(0)
    old = torch.cat([linear.weight.detach().clone() for linear in found])
    expected = x_max.sqrt() / old.abs().amax(0).sqrt()
    smooth_vision_tower(binding, batches)
    new = torch.cat([linear.weight.detach() for linear in found])
    torch.testing.assert_close(new, old * expected, rtol=1e-5, atol=1e-6)


def test_smoothing_helps_a_tower_with_loud_channels() -> None:
    """SmoothQuant's claim: where few channels are loud, W8A8 of the smoothed tower is nearer to float."""
    model, processor = tiny("llava_onevision")
    with torch.no_grad():
        for block in model.model.vision_tower.encoder.layers:
            block.layer_norm1.weight[:3] *= 60
            block.layer_norm2.weight[:3] *= 60
    reference = copy.deepcopy(model)
    binding = bind(model)
    data = batch(processor, binding, images=2)
    target = features(reference, data)
    plain = features(quantized(copy.deepcopy(model), tower_linears(binding)), data)
    names = smooth_vision_tower(binding, [data])
    smooth = features(quantized(model, names), data)
    assert (smooth - target).norm() < 0.5 * (plain - target).norm()


def features(model: torch.nn.Module, data: CalibrationBatch) -> torch.Tensor:
    with torch.no_grad():
        return model.model.vision_tower(data.inputs["pixel_values"].flatten(0, 1)).last_hidden_state


def quantized(model: torch.nn.Module, names: list[str]) -> torch.nn.Module:
    scheme = SCHEMES["W8A8"]
    assert scheme.activations is not None
    for name in names:
        linear = model.get_submodule(name)
        linear.weight.data = fake_quantize(linear.weight.data, scheme.weights)
        linear.register_forward_pre_hook(lambda m, a: (fake_quantize_activations(a[0], scheme.activations),))
    return model


@pytest.mark.parametrize("family", ALL_FAMILY_NAMES)
def test_patterns_name_the_towers_blocks_and_keep_the_rest(family: str) -> None:
    binding = bind(tiny(family)[0])
    tower = tower_linears(binding)
    target = tower_pattern(binding).removeprefix("re:")
    everything = binding.names + binding.kept
    assert [name for name in everything if re.match(target, name)] == tower
    ignored = [
        name
        for name in everything
        if any(name == p or (p.startswith("re:") and re.match(p[3:], name)) for p in tower_ignore(binding))
    ]
    assert sorted(ignored) == sorted(set(binding.kept) - set(tower))


@pytest.mark.parametrize(("family", "name"), [
    ("llava_onevision", "vision_tower.vision_model.encoder.layers.3.mlp.fc1"),
    ("internvl", "vision_tower.encoder.layer.11.attention.q_proj"),
    ("qwen2_vl", "visual.blocks.0.attn.qkv"),
])  # fmt: skip
def test_the_target_matches_checkpoint_names(family: str, name: str) -> None:
    binding = bind(tiny(family)[0])
    assert re.match(tower_pattern(binding).removeprefix("re:"), name)
    assert not any(re.match(p[3:], name) for p in tower_ignore(binding) if p.startswith("re:"))
    assert any(re.match(p[3:], name) for p in binding.ignore() if p.startswith("re:"))


def test_ignored_linears_of_the_tower_stay() -> None:
    model, processor = tiny("qwen2_vl")
    before = copy.deepcopy(model)
    binding = bind(model)
    names = smooth_vision_tower(binding, [batch(processor, binding)], ignore=(r"re:.*visual\.blocks\.0\..*",))
    assert names == [f"model.visual.blocks.1.{path}" for path in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    for path in ("attn.qkv.weight", "mlp.fc1.weight", "norm1.weight"):
        name = f"model.visual.blocks.0.{path}"
        assert torch.equal(model.get_parameter(name), before.get_parameter(name))


def test_text_only_data_is_refused() -> None:
    model, processor = tiny("qwen2_vl")
    binding = bind(model)
    with pytest.raises(MBQError, match="calibrates on images, and the data has none"):
        smooth_vision_tower(binding, [batch(processor, binding, images=0)])


def test_an_unknown_tower_is_refused() -> None:
    model, _ = tiny("llava_onevision")
    for block in model.model.vision_tower.encoder.layers:
        block.first_norm = block._modules.pop("layer_norm1")
    with pytest.raises(MBQError, match="none that --vision-tower knows"):
        tower_linears(bind(model))
