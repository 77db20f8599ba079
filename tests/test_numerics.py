"""Odd numbers: types, overflows, channels without a signal, outliers; and what holds for any numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mbq
from mbq.architecture import bind
from mbq.equalization import fold
from mbq.errors import MBQError
from mbq.methods import METHODS
from mbq.qtensor import dequantize, fake_quantize, quantize
from mbq.scheme import SCHEMES, WeightScheme, scheme_named
from mbq.search import equalize_model
from mbq.sensitivity import measure, ratios
from tests import tiny
from tests.calibrated import batches_for, calibrated, row

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MBQ = METHODS["mbq"]


def searched(binding: Any, batches: Any, method: str = "mbq", scheme: str = "W3A16") -> list[Any]:
    """A row a group; groups of 32, since the tiny models are narrow."""
    chosen = scheme_named(scheme, 32) if SCHEMES[scheme].weights.group_size else SCHEMES[scheme]
    measured = measure(binding, batches) if METHODS[method].weighs else None
    return equalize_model(binding, batches, METHODS[method], chosen, sensitivity=measured)


# ---- types -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["W3A16", "W4A8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_is_searched_folded_and_packed(dtype: torch.dtype, scheme: str) -> None:
    model, processor = tiny.tiny("qwen2_vl")
    rows = [row("A red circle.", 1, 0), row("Two green triangles.", 1, 1)]
    group_size = 32 if scheme == "W3A16" else None
    options: dict[str, Any] = {"num_calibration_samples": 2, "group_size": group_size}
    result = mbq.quantize(model.to(dtype), processor, scheme=scheme, data=rows, **options)
    assert all(row.alpha is not None for row in result.search if row.skipped is None)
    logits = result.model(**tiny.inputs(processor).to(torch.float32).to(dtype=dtype)).logits
    assert logits.dtype == dtype
    assert torch.isfinite(logits).all()


def test_an_overflow_names_the_block_and_the_type() -> None:
    binding, batches = calibrated("internvl")
    binding.model.half()
    down = binding.blocks[1].get_submodule(binding.architecture.mlp_output)
    down.weight.data.fill_(6e4)
    sentence = r"The output of .*layers\.1 is not finite in float16; give --dtype bfloat16 or float32\.$"
    with pytest.raises(MBQError, match=sentence):
        measure(binding, batches)
    with pytest.raises(MBQError, match=sentence):
        equalize_model(binding, batches, METHODS["awq"], scheme_named("W3A16", 32))


# ---- channels and tokens ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["mbq", "awq", "smoothquant", "fixed"])
def test_a_channel_without_a_signal_is_no_obstacle(method: str) -> None:
    """Its mean is 0, and 0 to any power is nothing that could be divided by."""
    binding, batches = calibrated("qwen2_vl")
    before = binding.blocks[0].get_submodule("input_layernorm").weight
    before.data[3] = 0
    rows = searched(binding, batches, method)
    assert all(torch.isfinite(each).all() for each in binding.model.parameters())
    assert before[3] == 0
    assert all(row.alpha is not None for row in rows if row.skipped is None)


def test_a_constant_weight_and_a_weight_of_zeros_are_no_obstacle() -> None:
    binding, batches = calibrated("qwen2_vl")
    binding.module(0, "self_attn.q_proj").weight.data.fill_(0.01)
    binding.module(1, "mlp.up_proj").weight.data.zero_()
    searched(binding, batches)
    assert all(torch.isfinite(each).all() for each in binding.model.parameters())
    assert not binding.module(1, "mlp.up_proj").weight.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_outlier_costs_its_own_group_only(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, scheme = torch.randn(4, 256).to(dtype), WeightScheme(3, False, 64)
    usual = fake_quantize(weight, scheme)
    weight[1, 70] = 1e4
    found = fake_quantize(weight, scheme)
    inside = torch.zeros(4, 256, dtype=torch.bool)
    inside[1, 64:128] = True
    assert torch.equal(found[~inside], usual[~inside])
    step = quantize(weight, scheme).scale[1, 1].float()
    assert ((found - weight).float().abs()[inside] <= step * 0.51).all()


def test_rows_without_pictures_are_weighed_by_awq_and_refused_by_mbq() -> None:
    binding, _ = calibrated("internvl")
    batches = batches_for(binding, tiny.tiny("internvl")[1], 2, images=(0, 0, 0, 0))
    with pytest.raises(MBQError, match="No calibration sample has an image"):
        measure(binding, batches)
    assert any(row.alpha is not None for row in searched(binding, batches, "awq"))


def test_the_last_blocks_vision_tokens_have_no_gradient_and_the_floor_takes_its_place() -> None:
    binding, batches = calibrated("llava_onevision")
    measured = measure(binding, batches)
    assert measured.vision["mlp"][-1] == 0
    assert ratios(measured)["mlp"][-1] > 0
    assert all(row.alpha is not None for row in searched(binding, batches) if row.skipped is None)


# ---- what holds for any numbers --------------------------------------------------------------------------------------


@st.composite
def weights(draw: st.DrawFn) -> tuple[torch.Tensor, WeightScheme]:
    size = draw(st.integers(2, 20))
    scheme = WeightScheme(draw(st.sampled_from((2, 3, 4, 8))), draw(st.booleans()), draw(st.sampled_from((size, None))))
    torch.manual_seed(draw(st.integers(0, 10**6)))
    weight = torch.randn(draw(st.integers(1, 4)), size * draw(st.integers(1, 3)))
    weight *= draw(st.sampled_from((1e-3, 1.0, 30.0)))
    return weight.to(draw(st.sampled_from(DTYPES))), scheme


@settings(max_examples=80, deadline=None)
@given(weights(), st.integers(0, 10))
def test_a_quantizer_knows_no_order_of_rows_and_powers_of_two_only_scale(
    case: tuple[torch.Tensor, WeightScheme], power: int
) -> None:
    weight, scheme = case
    found = quantize(weight, scheme)
    order = torch.randperm(len(weight))
    assert torch.equal(quantize(weight[order], scheme).codes, found.codes[order])
    larger = quantize(weight.float() * 2.0**power, scheme)
    smaller = quantize(weight.float(), scheme)
    if smaller.scale.min() > 1e-5:  # the least scale there is
        assert torch.equal(larger.codes, smaller.codes)
        assert torch.equal(larger.scale, smaller.scale * 2.0**power)


@settings(max_examples=80, deadline=None)
@given(weights())
def test_groups_of_both_signs_move_by_a_step_at_most_when_they_are_quantized_again(
    case: tuple[torch.Tensor, WeightScheme],
) -> None:
    """Groups of one sign lose their offset each time, and symmetric codes reach one step further below zero."""
    weight, scheme = case[0].float(), replace(case[1], symmetric=False)
    size = scheme.group_size or weight.shape[1]
    weight[:, ::size], weight[:, 1::size] = weight[:, ::size].abs(), -weight[:, 1::size].abs()
    once = quantize(weight, scheme)
    first = dequantize(once)
    step = once.scale.repeat_interleave(size, dim=1)
    assert ((fake_quantize(first, scheme) - first).abs() <= step * 1.01).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 12), st.integers(1, 9), st.booleans())
def test_a_fold_keeps_the_function_and_its_inverse_the_weights(seed: int, channels: int, rows: int, bias: bool) -> None:
    torch.manual_seed(seed)
    before, after = nn.Linear(5, rows, bias=bias).double(), nn.Linear(channels, 3).double()
    sources = torch.randint(0, rows, (channels,))
    vector = (torch.rand(rows).double() * 10 + 0.05)[sources]  # channels of one row have one factor
    x = torch.randn(7, 5).double()

    def function() -> torch.Tensor:
        return after(before(x)[:, sources])

    wanted, weight = function(), after.weight.clone()
    parameters = list(before.parameters())
    fold(vector.float(), sources, parameters, [after.weight])
    torch.testing.assert_close(function(), wanted, rtol=1e-5, atol=1e-5)
    fold(1 / vector.float(), sources, parameters, [after.weight])
    torch.testing.assert_close(after.weight.data, weight, rtol=1e-5, atol=1e-6)


def test_binding_twice_gives_the_same() -> None:
    model, _ = tiny.tiny("internvl")
    assert bind(model).names == bind(model).names
