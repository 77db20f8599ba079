"""Random packed weights, and how far a product of one may be from float64."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch

from mbq.kernels import cuda
from mbq.kernels.packed import PackedWeight, pack_weight
from mbq.qtensor import QTensor, dequantize
from mbq.scheme import Scheme, WeightScheme

COMBINATIONS = list(itertools.product((2, 3, 4, 8), (32, 64, 128, None), (True, False)))


def weight_only(bits: int, group_size: int | None, symmetric: bool) -> Scheme:
    return Scheme(f"W{bits}A16", WeightScheme(bits, symmetric, group_size))


def random_weight(
    scheme: Scheme, outputs: int, inputs: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> tuple[QTensor, PackedWeight]:
    """Codes and zero points over their whole range, some scales zero."""
    generator = torch.Generator().manual_seed(seed)
    weights = scheme.weights
    groups = inputs // weights.group_size if weights.group_size else 1
    low, high = (-(2 ** (weights.bits - 1)), 2 ** (weights.bits - 1)) if weights.symmetric else (0, 2**weights.bits)
    codes = torch.randint(low, high, (outputs, inputs), generator=generator)
    scale = torch.rand(outputs, groups, generator=generator) * 0.02
    scale[torch.rand(outputs, groups, generator=generator) < 0.05] = 0
    zero = None
    if not weights.symmetric:
        zero = torch.randint(0, 2**weights.bits, (outputs, groups), generator=generator).to(torch.uint8).to(device)
    codes = codes.to(torch.int8 if weights.symmetric else torch.uint8)
    q = QTensor(codes.to(device), scale.to(dtype).to(device), zero, weights)
    return q, pack_weight(q, scheme)


def check_result(y: torch.Tensor, q: QTensor, x: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Within one rounding of the result, and that of float32 sums, or of the weight for many rows.

    On a GPU tensor cores cut float32 sums off instead of rounding them, and decode.cu adds up offset + code, where the
    offset is the mantissa's range at most, and takes off offset and zero, added up the same way: two such sums.
    """
    dense = dequantize(replace(q, scale=q.scale.double()))
    expected = x.double() @ dense.T + (0 if bias is None else bias.double())
    eps = torch.finfo(y.dtype).eps
    bound = eps * expected.abs() + 1e-6
    terms = x.double().abs() @ dense.abs().T
    if len(x) > cuda.PROMPT_ROWS:
        bound += eps * terms
    elif not x.is_cuda:
        bound += 1e-5 * terms
    else:
        scale = q.scale.double().repeat_interleave(x.shape[1] // q.scale.shape[1], dim=1)
        bound += 2 * 2.0**-23 * (1 / eps + 2**q.scheme.bits) * (x.double().abs() @ scale.T)
    assert ((y.double() - expected).abs() <= bound).all()
