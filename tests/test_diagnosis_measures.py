"""The diagnosis' errors and outliers against the obvious way to get them: whole models, hooks, loops."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import mbq
from mbq.architecture import Binding, bind
from mbq.blocks import capture, forward, run
from mbq.calibration import CalibrationBatch, language_mask
from mbq.diagnosis.outside import compare_outside
from mbq.diagnosis.propagation import Propagation, propagate
from mbq.qlinear import QuantLinear
from mbq.qtensor import fake_quantize, fake_quantize_activations
from tests import tiny, tiny_families
from tests.calibrated import batches_for

FAMILIES = ("internvl", "llava_onevision", "qwen2_vl", "internvl2_internlm2")
PARTS = ("attn", "mlp")


def pair(family: str, scheme: str = "W4A8", batch_size: int = 2) -> tuple[Binding, Binding, list[CalibrationBatch]]:
    model, processor = tiny.tiny(family)
    binding = bind(model)
    quantized: Any = mbq.quantize(model, processor, scheme=scheme, method="rtn").model
    ours = replace(binding, model=quantized, blocks=quantized.get_submodule(binding.architecture.blocks))
    return binding, ours, batches_for(binding, processor, batch_size)


def masks(batch: CalibrationBatch) -> dict[str, torch.Tensor]:
    first = torch.zeros_like(batch.vision)
    first[:, 0] = True
    return {"language": language_mask(batch), "vision": batch.vision, "first": first}


class Watched:
    """Outputs of the parts of all blocks, while the model runs: ``seen[block, part]`` [batch, token, channel]."""

    def __init__(self, binding: Binding) -> None:
        self.seen: dict[tuple[int, str], torch.Tensor] = {}
        for index, (block, kind) in enumerate(zip(binding.blocks, binding.kinds, strict=True)):
            for part, path in zip(PARTS, (kind.attn_output, kind.mlp_output), strict=True):
                block.get_submodule(path).register_forward_hook(self.keep(index, part))

    def keep(self, index: int, part: str) -> Any:
        def hook(module: Any, args: Any, output: torch.Tensor) -> None:
            self.seen[index, part] = output

        return hook


def relative(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    error = sum(float((ours - theirs).double().square().sum()) for ours, theirs in pairs)
    return math.sqrt(error / sum(float(theirs.double().square().sum()) for _, theirs in pairs))


@torch.no_grad()
def naive_accumulated(
    reference: Binding, quantized: Binding, batches: list[CalibrationBatch], block: int, part: str, tokens: str
) -> float:
    """Run both models as a whole and compare."""
    theirs, ours = Watched(reference), Watched(quantized)
    pairs = []
    for batch in batches:
        forward(reference.model, batch)
        forward(quantized.model, batch)
        mask = masks(batch)[tokens]
        pairs.append(tuple(each.seen[block, part].view(*mask.shape, -1)[mask] for each in (ours, theirs)))
    return relative(pairs)


@pytest.mark.parametrize("family", FAMILIES)
def test_accumulated_errors_are_those_of_whole_models(family: str) -> None:
    reference, quantized, batches = pair(family)
    found = propagate(reference, quantized, batches)
    assert found.samples == 4
    for block in range(2):
        for part in PARTS:
            for tokens in ("language", "vision", "first"):
                wanted = naive_accumulated(*map(copy.deepcopy, (reference, quantized)), batches, block, part, tokens)
                assert wanted > 0.001
                assert found.blocks[block].accumulated[part][tokens] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("scheme", ["W3A16", "W4A8"])
@torch.no_grad()
def test_own_errors_are_those_of_a_model_with_one_quantized_block(scheme: str) -> None:
    """And rounding the float block's weights by hand gives the expected ones, that rounding to nearest has."""
    reference, quantized, batches = pair("internvl", scheme)
    found = propagate(reference, quantized, batches)
    for block in range(2):
        mixed, rounded = copy.deepcopy(reference), copy.deepcopy(reference)
        mixed.blocks[block] = copy.deepcopy(quantized.blocks[block])
        for path, layer in quantized.blocks[block].named_modules():
            if isinstance(layer, QuantLinear):
                linear = rounded.blocks[block].get_submodule(path)
                linear.weight.data = fake_quantize(linear.weight.data, layer.scheme.weights)
                if layer.scheme.activations is not None:
                    linear.register_forward_pre_hook(
                        lambda module, args, numbers=layer.scheme.activations: (
                            fake_quantize_activations(args[0], numbers),
                        )
                    )
        for part in PARTS:
            for tokens in ("language", "vision"):
                for other, errors in ((mixed, found.blocks[block].own), (rounded, found.blocks[block].expected)):
                    wanted = naive_accumulated(*map(copy.deepcopy, (reference, other)), batches, block, part, tokens)
                    assert errors[part][tokens] == pytest.approx(wanted, rel=1e-4)


def test_batches_and_padding_change_nothing() -> None:
    def flat(found: Propagation) -> list[float]:
        values = [value for each in found.blocks for part in each.own.values() for value in part.values()]
        values += [value for each in found.blocks for part in each.accumulated.values() for value in part.values()]
        return values + [number for each in found.outliers for number in (each.channel, each.ratio, each.share)]

    whole, single = (propagate(*pair("internvl", batch_size=size)) for size in (4, 1))
    assert flat(whole) == pytest.approx(flat(single), rel=1e-3)


def test_blocks_of_other_kinds_are_measured_too() -> None:
    """LFM2's convolutions, Qwen3-VL, which adds picture features to what later blocks read, and experts."""
    for family in ("lfm2_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5_moe", "internvl3_5_moe"):
        model, processor = tiny_families.tiny(family)
        binding = bind(model)
        quantized: Any = mbq.quantize(model, processor, scheme="W8A8", method="rtn").model
        ours = replace(binding, model=quantized, blocks=quantized.get_submodule(binding.architecture.blocks))
        found = propagate(binding, ours, batches_for(binding, processor, 1))
        for errors in found.blocks:
            for part in PARTS:
                assert 0 < errors.own[part]["vision"] < 0.2
                assert errors.own[part]["vision"] == pytest.approx(errors.expected[part]["vision"], rel=0.2)


def test_the_same_weights_have_no_error_and_nothing_differs_outside() -> None:
    reference, quantized, batches = pair("internvl", "W8A8")
    found = propagate(reference, reference, batches)
    assert {value for each in found.blocks for part in each.accumulated.values() for value in part.values()} == {0.0}
    assert compare_outside(reference, quantized, batches[0]).differs is False
    with torch.no_grad():
        quantized.model.get_output_embeddings().weight[7] += 1
    outside = compare_outside(reference, quantized, batches[0])
    assert list(outside.tensors) == ["lm_head.weight"]
    weight = reference.model.get_output_embeddings().weight.detach()
    assert outside.tensors["lm_head.weight"] == pytest.approx(math.sqrt(weight.shape[1]) / float(weight.norm()))
    assert outside.logits > 0.01


def test_samples_without_pictures_have_no_vision_error() -> None:
    reference, quantized, _ = pair("internvl")
    batches = batches_for(reference, tiny.tiny("internvl")[1], 4, images=(0, 0, 0, 0))
    found = propagate(reference, quantized, batches)
    assert found.entry == {"language": 0.0, "vision": None, "first": 0.0}
    assert found.blocks[0].own["attn"]["vision"] is None
    assert {each.modality for each in found.outliers} == {"language"}


@torch.no_grad()
def test_outliers_and_massive_activations_are_what_a_loop_finds() -> None:
    reference, quantized, batches = pair("internvl")
    quantized.blocks[1].post_attention_layernorm.weight[3] *= 500
    found = propagate(reference, quantized, batches)
    hidden, calls = capture(reference, batches)
    rows: dict[str, list[torch.Tensor]] = {"language": [], "vision": []}
    spikes = []
    middle = [run(reference.blocks[0], *each) for each in zip(hidden, calls[0], strict=True)]

    def read(module: Any, args: Any) -> None:
        for tokens, each in rows.items():
            each.append(args[0][masks(batch)[tokens]])

    hook = quantized.blocks[1].mlp.gate_proj.register_forward_pre_hook(read)
    for batch, states, call in zip(batches, middle, calls[1], strict=True):  # noqa: B007, read() looks at it
        run(quantized.blocks[1], states, call)
        sizes = run(reference.blocks[1], states, call)[:, 0].abs()
        spikes += [(float(each.max()), float(each.max() / each.median())) for each in sizes]
    hook.remove()
    for tokens, each in rows.items():
        x = torch.cat(each)
        (outlier,) = [
            one for one in found.outliers if (one.block, one.linears[0], one.modality) == (1, "mlp.gate_proj", tokens)
        ]
        maxima = x.abs().amax(0)
        assert outlier.channel == 3
        assert outlier.part == "mlp"
        assert outlier.ratio == pytest.approx(float(maxima[3] / maxima.median()), rel=1e-4)
        steps = maxima / maxima.median() > 127
        assert outlier.channels == tuple(steps.nonzero().flatten().tolist()) == (3,)
        assert outlier.share == pytest.approx(float(x[:, 3].square().sum() / x.square().sum()), rel=1e-4)
    spike = found.massive[1]
    assert spike.value == pytest.approx(max(value for value, _ in spikes), rel=1e-4)
    assert spike.ratio == pytest.approx(max(ratio for _, ratio in spikes), rel=1e-4)
    assert spike.massive is False


def test_a_massive_activation_is_what_its_definition_says() -> None:
    reference, quantized, batches = pair("internvl")
    with torch.no_grad():
        bias = torch.zeros(reference.blocks[0].mlp.down_proj.out_features)
        bias[9] = 5000
        reference.blocks[0].mlp.down_proj.bias = torch.nn.Parameter(bias)
    found = propagate(reference, quantized, batches)
    assert [each.massive for each in found.massive] == [True, True]
    assert found.massive[0].others > 1000
