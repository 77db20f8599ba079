"""The fused candidate of a search against torch's operations: the same numbers, bit for bit."""

from __future__ import annotations

import os

import pytest
import torch

from mbq.errors import MBQWarning
from mbq.kernels import candidates as module
from mbq.kernels.candidates import candidates, fused, plain
from mbq.qtensor import fake_quantize
from mbq.scheme import WeightScheme

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU or Triton's interpreter"
)
DTYPES = [torch.float16, torch.float32] + ([torch.bfloat16] if DEVICE == "cuda" else [])
SCHEMES = [
    WeightScheme(bits, symmetric, size)
    for bits in (2, 3, 4, 8)
    for symmetric in (False, True)
    for size in (32, 128, None)
]


def a_weight(outputs: int, inputs: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """With rows of zeros, of one value, of positive values, and with an outlier; and three candidates."""
    weight = torch.randn(outputs, inputs) * 0.05
    weight[0], weight[1], weight[2] = 0, 3.0, weight[2].abs() + 0.1
    weight[3, 5] = 1e4
    vectors = torch.stack([torch.ones(inputs), torch.rand(inputs) * 3 + 0.05, torch.logspace(-4, 3, inputs)])
    return weight.to(DEVICE, dtype), vectors.to(DEVICE)


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_one_kernel_gives_torchs_numbers(scheme: WeightScheme, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, vectors = a_weight(41, 384, dtype)
    for divided in (True, False):
        wanted = plain(weight, vectors, scheme, divided)
        found = fused(weight, vectors, scheme, divided)
        assert torch.equal(found.isnan(), wanted.isnan())  # 1e4 times 1e3 is too much for float16
        assert torch.equal(found.nan_to_num(), wanted.nan_to_num())


@needs_triton
@pytest.mark.gpu
def test_rows_of_any_length_and_weights_that_are_not_contiguous() -> None:
    torch.manual_seed(0)
    wide = torch.randn(7, 600, device=DEVICE).half()
    vectors = torch.rand(2, 200, device=DEVICE) + 0.5
    scheme = WeightScheme(4, True, None)
    for weight in (wide[:, :200], wide[:, ::3], wide[::2, 100:300]):
        assert torch.equal(fused(weight, vectors, scheme, True), plain(weight, vectors, scheme, True))


@needs_triton
def test_a_nan_is_not_hidden() -> None:
    weight = torch.ones(2, 64, device=DEVICE)
    weight[1, 3] = float("nan")
    found = fused(weight, torch.ones(1, 64, device=DEVICE), WeightScheme(3, False, 32), True)
    assert bool(found[0, 1, 3].isnan())
    assert bool(found[0, 0].isfinite().all())


@pytest.mark.parametrize("scheme", SCHEMES[:6], ids=str)
def test_plain_candidates_are_quantized_weights_with_e_taken_out_again(scheme: WeightScheme) -> None:
    torch.manual_seed(0)
    weight, vectors = torch.randn(8, 256), torch.rand(3, 256) + 0.5
    whole, divided = (candidates(weight, vectors, scheme, each) for each in (False, True))
    for number, vector in enumerate(vectors):
        assert torch.equal(whole[number], fake_quantize(weight * vector, scheme))
        assert torch.equal(divided[number], whole[number] / vector)


def test_a_compiler_that_is_missing_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> torch.Tensor:
        raise RuntimeError("Failed to find C compiler.\nPlease specify one")

    monkeypatch.setattr(module, "fused", fails)
    module._compiles.cache_clear()
    with pytest.warns(MBQWarning, match=r"slower: Failed to find C compiler\.$"):
        assert not module._compiles(torch.device("cpu"), torch.float32)
    assert not module._compiles(torch.device("cpu"), torch.float32)
    module._compiles.cache_clear()
