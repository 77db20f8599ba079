"""Weighted means of squared inputs, against the model run as a whole, and under equalization."""

from __future__ import annotations

import pytest
import torch

from mbq.architecture import Binding
from mbq.blocks import forward
from mbq.calibration import CalibrationBatch, language_mask
from mbq.importance import importance
from mbq.methods import METHODS, SearchOptions
from mbq.scheme import scheme_named
from mbq.search import equalize_model
from mbq.sensitivity import measure, ratios
from tests.calibrated import calibrated


def inputs_of(binding: Binding, batch: CalibrationBatch) -> dict[str, torch.Tensor]:
    """What every linear of the blocks reads in one pass of the whole model, [token, channel] in float64."""
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        binding.model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.__setitem__(name, args[0].flatten(0, -2).double())
        )
        for name in binding.names
    ]
    with torch.no_grad():
        forward(binding.model, batch)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_onevision"])
@pytest.mark.parametrize("method", ["mbq", "awq", "fixed", "smoothquant"])
def test_tokens_weigh_what_the_search_weighs_them_by(family: str, method: str) -> None:
    binding, batches = calibrated(family)
    sensitivity = measure(binding, batches)
    options = SearchOptions(vision_weight=0.25)
    found = importance(binding, batches, METHODS[method], options, sensitivity)
    ratio = ratios(sensitivity, None)
    parts = {path: group.part for group in binding.architecture.groups for path in group.linears}
    sums, totals = {}, dict.fromkeys(binding.names, 0.0)
    for batch in batches:
        language, vision = language_mask(batch).flatten().double(), batch.vision.flatten().double()
        counted = batch.inputs["attention_mask"].flatten().double()
        for name, x in inputs_of(binding, batch).items():
            index, _, path = name.removeprefix(f"{binding.architecture.blocks}.").partition(".")
            weights = {
                "mbq": language + ratio[parts[path]][int(index)] * vision,
                "fixed": language + 0.25 * vision,
            }.get(method, counted)
            sums[name] = sums.get(name, 0.0) + weights @ x.square()
            totals[name] += float(weights.sum())
    assert found.means.keys() == set(binding.names)
    for name, mean in found.means.items():
        torch.testing.assert_close(mean.double(), sums[name] / totals[name], rtol=1e-4, atol=1e-7)
    assert (found.samples, found.tokens) == (4, sum(int(batch.inputs["attention_mask"].sum()) for batch in batches))


def test_equalized_channels_matter_by_the_inverse_square() -> None:
    binding, batches = calibrated("internvl", kv_heads=4)
    before = importance(binding, batches, METHODS["awq"], SearchOptions())
    weights = {name: binding.model.get_parameter(f"{name}.weight").clone() for name in binding.names}
    equalize_model(binding, batches, METHODS["awq"], scheme_named("W3A16", 32))
    after = importance(binding, batches, METHODS["awq"], SearchOptions())
    changed = 0
    for name, mean in after.means.items():
        if name.endswith(("v_proj", "up_proj")):  # their rows are divided by the next group's vector, too
            continue
        vector = (binding.model.get_parameter(f"{name}.weight") / weights[name]).median(0).values
        torch.testing.assert_close(mean * vector.square(), before.means[name], rtol=1e-3, atol=1e-6)
        changed += int(not torch.allclose(vector, torch.ones_like(vector)))
    assert changed, "nothing was equalized"
