"""Norms and gates in one kernel: against torch's own operations, and inside models."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mbq
from mbq.fuse import one_kernel_each, use_kernel
from mbq.kernels import int8
from mbq.kernels.elementwise import gated, rms_norm
from mbq.kernels.operator import linear
from mbq.kernels.packed import pack_weight
from mbq.qlinear import QuantLinear
from mbq.qtensor import quantize
from mbq.scheme import SCHEMES
from tests import tiny

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or Triton's interpreter", allow_module_level=True)
DTYPES = [torch.float16, torch.float32] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def nearly(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Float32 sums and exponentials differ in some last places; 16 bits then mostly round to the same."""
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    eps, least = torch.finfo(wanted.dtype).eps, torch.finfo(wanted.dtype).tiny
    roundings = 2 if wanted.dtype != torch.float32 else 16
    assert ((found.double() - wanted.double()).abs() <= roundings * eps * wanted.double().abs() + least).all()
    if wanted.numel() and wanted.dtype != torch.float32:
        assert (found == wanted).double().mean() > 0.98


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gate_is_torchs(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    wide = torch.randn(5, 2600, dtype=dtype, device=DEVICE) * 4
    for x in (wide[:, :2600], wide[:, 100:2500], wide[None, :, :16], wide[:1], wide[:, ::2], wide[:0]):
        half = x.shape[-1] // 2
        nearly(gated(x), F.silu(x[..., :half]) * x[..., half:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_norm_is_transformers(dtype: torch.dtype) -> None:
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    torch.manual_seed(0)
    for inputs in (64, 896, 3584, 5000):
        norm = Qwen2RMSNorm(inputs, eps=1e-6).to(DEVICE, dtype)
        norm.weight.data = torch.randn(inputs, device=DEVICE).to(dtype)
        wide = torch.randn(7, inputs + 8, device=DEVICE).to(dtype)
        wide *= 10 ** torch.linspace(-3, 2, 7, device=DEVICE).unsqueeze(1).to(dtype)
        for x in (wide[:, :inputs], wide[None, :, 8:], wide[:1, :inputs], wide[:0, :inputs]):
            nearly(rms_norm(x, norm.weight, norm.variance_epsilon), norm(x).detach())


@pytest.mark.parametrize("scheme", ["W4A8", "W8A8", "W4A4"])
def test_a_gate_is_quantized_as_if_it_had_been_written(scheme: str) -> None:
    torch.manual_seed(0)
    chosen = SCHEMES[scheme]
    for rows, inputs in ((1, 256), (9, 1096), (40, 384)):
        packed = pack_weight(quantize(torch.randn(24, inputs, device=DEVICE), chosen.weights), chosen)
        weight, x = int8.prepare(packed), torch.randn(2, rows, 2 * inputs, device=DEVICE)
        found = int8.linear(x, weight, None, gated=True)
        assert torch.equal(found, linear(gated(x), weight, None, "triton"))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_norm_is_quantized_as_it_is_written(dtype: torch.dtype, bits: int) -> None:
    from mbq.kernels import int8_source

    torch.manual_seed(0)
    for rows, inputs in ((1, 64), (9, 1096), (5, 3584)):
        x, weight = torch.randn(2, rows, inputs, device=DEVICE).to(dtype), torch.randn(inputs, device=DEVICE).to(dtype)
        y, (codes, scale) = int8.rms_norm(x, weight, 1e-6, bits)
        nearly(y, rms_norm(x, weight, 1e-6))
        wanted, wanted_scale = int8_source.quantize(y.flatten(0, 1), bits)
        assert torch.equal(codes, wanted)
        assert torch.equal(scale, wanted_scale)


class MLP(nn.Module):
    """A gated MLP as transformers' code writes it; ``swapped``: with the gate on the other linear."""

    def __init__(self, scheme: str, swapped: bool = False) -> None:
        super().__init__()
        self.swapped = swapped
        chosen = SCHEMES[scheme]
        for name, outputs, inputs in (("gate_proj", 256, 128), ("up_proj", 256, 128), ("down_proj", 128, 256)):
            q = quantize(torch.randn(outputs, inputs) * 0.1, chosen.weights)
            self.add_module(name, QuantLinear.from_qtensor(q, chosen))
        self.act_fn = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(self.act_fn(up) * gate if self.swapped else self.act_fn(gate) * up)


class Block(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp


@pytest.mark.parametrize("scheme", ["W3A16", "W4A8"])
def test_a_gated_mlp_is_three_kernels(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    block = Block(MLP(scheme)).to(DEVICE)
    x = torch.randn(3, 128, device=DEVICE)
    wanted = block.mlp(x)
    use_kernel(block, "triton")
    torch.testing.assert_close(block.mlp(x), wanted, rtol=1e-3, atol=1e-3)
    monkeypatch.setattr(nn.SiLU, "forward", None)  # nobody calls it any more
    torch.testing.assert_close(block.mlp(x), wanted, rtol=1e-3, atol=1e-3)


class Layer(nn.Module):
    """A norm and the MLP that reads it, under transformers' names; ``touched``: what the MLP gets is another tensor."""

    def __init__(self, scheme: str, touched: bool = False) -> None:
        super().__init__()
        from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

        self.post_attention_layernorm, self.mlp, self.touched = Qwen2RMSNorm(128), MLP(scheme), touched

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.post_attention_layernorm(x)
        return self.mlp(normed * 2 if self.touched else normed)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("scheme", ["W4A8", "W8A8"])
def test_what_a_norm_quantized_is_not_quantized_again(scheme: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from mbq.kernels import int8_source

    torch.manual_seed(0)
    layer = Layer(scheme).to(DEVICE)
    layer.post_attention_layernorm.weight.data.uniform_(0.5, 2)
    x = torch.randn(2, rows, 128, device=DEVICE)
    wanted = layer(x)
    use_kernel(layer, "triton")
    calls, quantize_rows = [], int8_source.quantize

    def counted(*args: Any) -> Any:
        calls.append(args[0].shape)
        return quantize_rows(*args)

    monkeypatch.setattr(int8_source, "quantize", counted)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-3, atol=1e-3)
    assert calls == [(2 * rows, 512)]  # the gate, of two halves
    other = copy.deepcopy(layer)
    other.touched = True
    torch.testing.assert_close(other(x), layer.mlp(2 * layer.post_attention_layernorm(x)), rtol=1e-3, atol=1e-3)
    y = layer.post_attention_layernorm(x)
    y.mul_(2)  # not what was quantized any more
    torch.testing.assert_close(layer.mlp(y), other(x), rtol=1e-3, atol=1e-3)


def test_what_computes_otherwise_is_left_alone() -> None:
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    class OnePlus(Qwen2RMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) + self.weight

    torch.manual_seed(0)
    block = Block(MLP("W3A16", swapped=True)).to(DEVICE)
    block.norm, block.other = OnePlus(128).to(DEVICE), Qwen2RMSNorm(128).to(DEVICE)
    use_kernel(block, "triton")
    assert "forward" in vars(block.other)
    assert "forward" not in vars(block.norm)
    assert "forward" not in vars(block.mlp)


def test_gradients_and_compiled_code_see_transformers_own() -> None:
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    model = nn.Sequential(Qwen2RMSNorm(64)).to(DEVICE)
    one_kernel_each(model)
    assert "forward" in vars(model[0])
    x = torch.randn(3, 64, device=DEVICE, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
def test_norms_and_mlps_of_every_family(
    family: str, float_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mbq.quantize(float_folder(family), method="rtn", output=tmp_path / "out")
    options = {"dtype": "float32", "device": DEVICE}
    plain = mbq.load(tmp_path / "out", kernel="reference", **options)
    model = mbq.load(tmp_path / "out", kernel="triton", **options)
    changed = [name for name, module in model.named_modules() if "forward" in vars(module)]
    layers = len(model.get_decoder().layers)
    assert sum(name.endswith("mlp") for name in changed) == layers
    assert sum(name.endswith("norm") for name in changed) == 2 * layers + 1
    given = tiny.inputs(mbq.load_processor(tmp_path / "out")).to(DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(model(**given).logits, plain(**given).logits, rtol=1e-3, atol=1e-3)
