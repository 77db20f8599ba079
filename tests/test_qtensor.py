"""Quantizers against slow loops written from the paper's formulas, one number at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mbq.errors import MBQError
from mbq.qtensor import (
    QTensor,
    dequantize,
    fake_quantize,
    fake_quantize_activations,
    quantize,
    quantize_activations,
)
from mbq.scheme import ActivationScheme, WeightScheme

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def slow_quantize(weight: torch.Tensor, scheme: WeightScheme) -> QTensor:
    """The formulas, group by group in Python; the scale is rounded to the weight's dtype before its use."""
    rows, width = weight.shape
    size = scheme.group_size or width
    codes = torch.empty(rows, width, dtype=torch.int64)
    scales = torch.empty(rows, width // size, dtype=weight.dtype)
    zeros = torch.zeros(rows, width // size, dtype=torch.int64)
    for row in range(rows):
        for group in range(width // size):
            values = weight[row, group * size : (group + 1) * size].float()
            if scheme.symmetric:
                least, most = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
                scale = values.abs().max() / most
            else:
                least, most = 0, 2**scheme.bits - 1
                scale = (values.max() - values.min()) / most
            scale = max(scale, torch.tensor(1e-5)).to(weight.dtype).float()
            zero = 0 if scheme.symmetric else min(max(round(float(-values.min() / scale)), least), most)
            scales[row, group], zeros[row, group] = scale, zero
            for i, value in enumerate(values):
                code = round(float(value / scale)) + zero  # Python's round: to nearest, ties to even
                codes[row, group * size + i] = min(max(code, least), most)
    return QTensor(codes, scales, None if scheme.symmetric else zeros, scheme)


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, WeightScheme]:
    size = draw(st.integers(1, 17))
    groups = draw(st.integers(1, 3))
    bits = draw(st.sampled_from((2, 3, 4, 8)))
    scheme = WeightScheme(bits, draw(st.booleans()), draw(st.sampled_from((size, None))))
    torch.manual_seed(draw(st.integers(0, 10**6)))
    weight = torch.randn(draw(st.integers(1, 3)), groups * size) * draw(st.sampled_from((1e-6, 1e-2, 1.0, 50.0)))
    shift = draw(st.sampled_from((0.0, -2.0, 2.0)))  # groups of one sign, too
    return (weight + shift).to(draw(st.sampled_from(DTYPES))), scheme


@settings(max_examples=60, deadline=None)
@given(cases())
def test_quantize_is_the_table_of_the_method(case: tuple[torch.Tensor, WeightScheme]) -> None:
    weight, scheme = case
    fast, slow = quantize(weight, scheme), slow_quantize(weight, scheme)
    assert torch.equal(fast.codes.long(), slow.codes)
    assert torch.equal(fast.scale, slow.scale)
    if not scheme.symmetric:
        assert torch.equal(fast.zero_point.long(), slow.zero_point)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_the_search_sees_the_weights_that_are_shipped(case: tuple[torch.Tensor, WeightScheme]) -> None:
    weight, scheme = case
    q = quantize(weight, scheme)
    fake = fake_quantize(weight, scheme)
    assert fake.dtype == weight.dtype
    assert torch.equal(fake, dequantize(q))
    for row in range(weight.shape[0]):  # and what is shipped is (code - zero) * scale, rounded once
        for column in range(weight.shape[1]):
            group = column * q.scale.shape[1] // weight.shape[1]
            zero = 0 if q.zero_point is None else int(q.zero_point[row, group])
            value = (int(q.codes[row, column]) - zero) * q.scale[row, group].float()
            assert fake[row, column] == value.to(weight.dtype)


def test_error_is_at_most_half_a_step_inside_the_range() -> None:
    torch.manual_seed(0)
    weight = torch.randn(32, 256)
    for bits in (2, 3, 4, 8):
        q = quantize(weight, WeightScheme(bits, False, 128))
        step = q.scale.repeat_interleave(128, dim=1)
        assert ((dequantize(q) - weight).abs() <= step * 1.0001).all()  # the zero point is rounded: half a step more
        symmetric = quantize(weight, WeightScheme(bits, True, None))
        assert ((dequantize(symmetric) - weight).abs() <= symmetric.scale * 0.5001).all()


def test_a_weight_on_the_grid_is_kept() -> None:
    codes = torch.arange(8.0).repeat(2, 4)
    weight = (codes - torch.tensor([[3.0], [5.0]])) * 0.25
    assert torch.equal(fake_quantize(weight, WeightScheme(3, False, 8)), weight)


def test_ties_go_to_the_even_code() -> None:
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, 7.0, -7.0]])  # scale 1
    assert quantize(weight, WeightScheme(4, True, None)).codes.tolist() == [[0, 2, 2, 0, 7, -7]]


def test_a_group_of_one_sign_loses_its_offset() -> None:
    """The zero point is clamped, as released: an all-positive group saturates at max - min."""
    weight = torch.tensor([[10.0, 11.0, 12.0, 13.0]])
    q = quantize(weight, WeightScheme(2, False, 4))
    assert q.zero_point.tolist() == [[0]]
    assert dequantize(q).tolist() == [[3.0, 3.0, 3.0, 3.0]]


def test_more_bits_and_smaller_groups_are_closer() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 512)

    def error(bits: int, size: int | None) -> float:
        return (fake_quantize(weight, WeightScheme(bits, False, size)) - weight).square().mean().item()

    assert error(8, 128) < error(4, 128) < error(3, 128) < error(2, 128)
    assert error(3, 32) < error(3, 128) < error(3, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_activations_have_a_scale_a_token(bits: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(2, 3, 17) * torch.logspace(-6, 2, 3)[:, None]).to(dtype)
    codes, scale = quantize_activations(x, ActivationScheme(bits))
    fake = fake_quantize_activations(x, ActivationScheme(bits))
    assert codes.dtype == torch.int8
    assert fake.dtype == dtype
    most = 2 ** (bits - 1) - 1
    for batch in range(2):
        for token in range(3):
            values = x[batch, token].float()
            step = max(values.abs().max() / most, torch.tensor(1e-5))
            assert scale[batch, token, 0] == step
            for i, value in enumerate(values):
                code = min(max(round(float(value / step)), -most - 1), most)
                assert codes[batch, token, i] == code
                assert fake[batch, token, i] == (code * step).to(dtype)


def test_a_zero_weight_and_a_zero_token_stay_zero() -> None:
    assert fake_quantize(torch.zeros(2, 8), WeightScheme(3, False, 4)).count_nonzero() == 0
    assert fake_quantize(torch.zeros(2, 8), WeightScheme(3, True, None)).count_nonzero() == 0
    assert fake_quantize_activations(torch.zeros(1, 8), ActivationScheme(8)).count_nonzero() == 0


def test_a_width_that_is_no_multiple_of_the_group_size_is_refused() -> None:
    for quantizer in (quantize, fake_quantize):
        with pytest.raises(MBQError, match=r"width of 100 is no multiple of the group size 64; choose .*--group-size"):
            quantizer(torch.randn(2, 100), WeightScheme(3, False, 64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_that_are_no_numbers_are_refused(bad: float, symmetric: bool) -> None:
    weight = torch.randn(4, 8)
    weight[2, 3] = bad
    with pytest.raises(MBQError, match="NaN, infinite"):
        quantize(weight, WeightScheme(4, symmetric, None if symmetric else 4))


def test_the_weight_is_not_changed() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(4, 8), torch.randn(4, 8)
    before = weight.clone(), x.clone()
    for scheme in (WeightScheme(3, False, 4), WeightScheme(4, True, None)):
        fake_quantize(weight, scheme)
        quantize(weight, scheme)
    fake_quantize_activations(x, ActivationScheme(8))
    assert torch.equal(weight, before[0])
    assert torch.equal(x, before[1])
