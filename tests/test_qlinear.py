"""The packed linear layer against fake quantization, for every kernel."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from mbq.errors import MBQError
from mbq.kernels import KERNELS, choose
from mbq.kernels.packed import PackedWeight, pack_weight, unpack_weight
from mbq.qlinear import QuantLinear
from mbq.qtensor import dequantize, fake_quantize, fake_quantize_activations, quantize
from mbq.scheme import SCHEMES, Scheme, WeightScheme

ODD = Scheme("W3A16", WeightScheme(3, symmetric=False, group_size=40))
ALL = [*SCHEMES.values(), ODD]


def layer(scheme: Scheme, dtype: torch.dtype, bias: bool = True) -> tuple[QuantLinear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    width = 3 * (scheme.weights.group_size or 100)
    weight = (torch.randn(37, width) * 0.05).to(dtype)
    offset = torch.randn(37).to(dtype) if bias else None
    return QuantLinear.from_qtensor(quantize(weight, scheme.weights), scheme, offset), weight, offset


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scheme", ALL, ids=lambda scheme: scheme.name)
def test_output_is_that_of_fake_quantization(scheme: Scheme, bias: bool, kernel: str) -> None:
    ran = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        linear, weight, offset = layer(scheme, dtype, bias)
        reason = KERNELS[kernel].supports(scheme, (37, weight.shape[1]), weight.device, dtype)
        if reason is not None:
            continue
        ran += 1
        linear.use(kernel)
        x = torch.randn(2, 5, weight.shape[1]).to(dtype)
        if scheme.activations is None:
            x_rounded, fake = x.double(), fake_quantize(weight, scheme.weights).double()
        else:  # integers times integers: the scales come in afterwards, so nothing is rounded to x's dtype before
            q = quantize(weight, scheme.weights)
            x_rounded = fake_quantize_activations(x.float(), scheme.activations).double()
            fake = dequantize(replace(q, scale=q.scale.double()))
        shift = torch.zeros(37) if offset is None else offset
        expected = x_rounded @ fake.T + shift.double()
        terms = x_rounded.abs() @ fake.abs().T
        output = linear(x)
        assert output.dtype == dtype
        # One rounding of the product and one of the sum; everything before is exact or in float32.
        bound = torch.finfo(dtype).eps * (expected.abs() + shift.abs()) + 1e-6 * terms
        assert ((output.double() - expected).abs() <= bound).all()
    if not ran:
        pytest.skip(str(reason))


@pytest.mark.parametrize("scheme", ALL, ids=lambda scheme: scheme.name)
def test_packing_loses_nothing(scheme: Scheme) -> None:
    torch.manual_seed(0)
    weight = torch.randn(37, 3 * (scheme.weights.group_size or 100)).bfloat16()
    before = quantize(weight, scheme.weights)
    after = unpack_weight(pack_weight(before, scheme))
    assert torch.equal(before.codes, after.codes)
    assert torch.equal(before.scale, after.scale)
    assert torch.equal(dequantize(after), fake_quantize(weight, scheme.weights))


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda scheme: scheme.name)
def test_memory_is_the_counted_bits(scheme: Scheme) -> None:
    rows, width, bits = 64, 384, scheme.weights.bits
    linear = QuantLinear(width, rows, scheme, dtype=torch.bfloat16)
    groups = width // scheme.weights.group_size if scheme.weights.group_size else 1
    counted = rows * width * bits + rows * groups * 16 + (0 if scheme.weights.symmetric else rows * groups * bits)
    held = {name: tensor.nbytes * 8 for name, tensor in linear.state_dict().items() if name != "weight_shape"}
    assert sum(held.values()) == counted


def test_running_leaves_the_layer_packed() -> None:
    linear, weight, _ = layer(SCHEMES["W3A16"], torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    linear(torch.randn(2, weight.shape[1]).bfloat16())
    assert linear.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in linear.state_dict().items())
    assert not any(tensor.shape == weight.shape for tensor in vars(linear).values() if isinstance(tensor, torch.Tensor))


def test_activations_are_quantized_token_by_token() -> None:
    """A large token does not change the output of its neighbours."""
    linear, weight, _ = layer(SCHEMES["W4A4"], torch.float32)
    x = torch.randn(1, 2, weight.shape[1])
    alone = linear(x)[0, 0]
    x[0, 1] *= 1000
    assert torch.equal(linear(x)[0, 0], alone)


def test_repr_names_scheme_and_kernel() -> None:
    text = repr(layer(SCHEMES["W3A16"], torch.float32)[0])
    assert "scheme=W3A16, group_size=128, kernel=reference" in text
    assert "in_features=384, out_features=37" in text


def test_a_rearranged_layer_keeps_its_dtype_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words in a kernel's order mean nothing to another dtype's kernel, or on another kind of device."""

    class Turned:
        """A kernel with an order of its own."""

        @staticmethod
        def supports(*place: object) -> None:
            return None

        @staticmethod
        def prepare(weight: PackedWeight) -> PackedWeight:
            return replace(weight, words=weight.words.flip(0))

    monkeypatch.setitem(KERNELS, "turned", Turned)
    made = layer(SCHEMES["W3A16"], torch.float32)[0]
    made.half().float()  # as long as it is as it was loaded
    made.use("turned")
    for change in (lambda: made.half(), lambda: made.to("meta"), lambda: nn.Sequential(made).to(torch.bfloat16)):
        with pytest.raises(MBQError, match="arranged for float32 on cpu; load it anew with the dtype and device that"):
            change()
    assert made.to("cpu", torch.float32) is made
    with pytest.raises(MBQError, match="runs in the kernel 'turned' already; load the model anew"):
        made.use("reference")


def test_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(
        MBQError, match="Unknown kernel 'marlin'; choose auto or one of cuda, triton, humming, reference"
    ):
        layer(SCHEMES["W3A16"], torch.float32)[0].use("marlin")


def test_a_kernel_that_does_not_support_the_layer_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    class Picky:
        @staticmethod
        def supports(scheme: Scheme, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> str | None:
            return None if scheme.weights.bits == 4 else "it knows 4 bits only"

    monkeypatch.setitem(KERNELS, "picky", Picky)
    place = (8, 128), torch.device("cpu"), torch.float32
    assert choose("picky", SCHEMES["W4A16"], *place) == "picky"
    assert choose("auto", SCHEMES["W3A16"], *place) == "reference"
    with pytest.raises(MBQError, match="it knows 4 bits only"):
        choose("picky", SCHEMES["W3A16"], *place)
