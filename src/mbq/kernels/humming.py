"""humming-kernels, where it is installed: what vLLM multiplies 4-bit weights and 8-bit activations with.

Optional (``pip install 'mbq[humming]'``). x is quantized as everywhere here (``int8_source.quantize``), so that the
products are the same integers; Humming multiplies and scales. Its 8-bit weights are slower than ``int8.py``'s.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch

from mbq.kernels.packed import PackedWeight
from mbq.scheme import Scheme

OUTPUTS, INPUTS = 64, 128  # it takes multiples of these
WHOLE_SUMS = {"use_batch_invariant": True}  # else few rows' products are more than three roundings off


def supports(scheme: Scheme, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec("humming") is None:
        return "humming-kernels is not installed (pip install 'mbq[humming]')"
    if device.type != "cuda" or torch.version.hip is not None:
        return "it needs an NVIDIA GPU"
    activations, weights = scheme.activations, scheme.weights
    if activations is None or activations.bits != 8 or weights.bits != 4 or not weights.symmetric or weights.group_size:
        return "it is used for 4-bit weights with one symmetric scale a row and 8-bit activations"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 or bfloat16, not in {dtype}".replace("torch.", "")
    if shape[0] % OUTPUTS or shape[1] % INPUTS:
        return f"it needs multiples of {OUTPUTS} outputs and {INPUTS} inputs, not {shape[0]} and {shape[1]}"
    return None


def prepare(weight: PackedWeight) -> PackedWeight:
    """Words and scales in Humming's order. In the place of zero points: its locks, left at zero by every product."""
    from humming.layer import HummingLayer

    with torch.cuda.device(weight.words.device), torch.device(weight.words.device):
        layer = HummingLayer(
            *weight.shape,
            weight_config={"dtype": "uint4"},
            input_config={"dtype": "int8"},
            torch_dtype=weight.scale.dtype,
        )
        layer.load_from_tensors({"weight": weight.words, "weight_scale": weight.scale})
        layer.transform()
    return PackedWeight(layer.weight.data, layer.weight_scale.data, layer.locks, weight.shape, weight.scheme)


@cache
def _config(shape: tuple[int, int], dtype: torch.dtype, index: int, bias: bool) -> Any:
    from humming import dtypes
    from humming.schema import HummingInputSchema, HummingWeightSchema
    from humming.transform import prepare_layer_config

    return prepare_layer_config(
        shape_n=shape[0],
        shape_k=shape[1],
        weight_schema=HummingWeightSchema(b_dtype=dtypes.DataType.from_str("uint4")),
        input_schema=HummingInputSchema(a_dtype=dtypes.DataType.from_str("int8")),
        has_bias=bias,
        torch_dtype=dtype,
        device=index,
    )


@cache
def _order(outputs: int, device: torch.device) -> torch.Tensor:
    """[outputs]: which number of a bias stands where in the order of the products."""
    from humming.transform import transform_humming_bias

    return transform_humming_bias(torch.arange(outputs, device=device))


def linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, gated: bool = False) -> torch.Tensor:
    """x [..., inputs] to [..., outputs] in x's dtype; ``gated`` as in ``int8.linear``."""
    from humming.forward import humming_forward

    from mbq.kernels import int8_source as source

    flat = x.reshape(-1, x.shape[-1])
    if not len(flat):
        return x.new_empty(*x.shape[:-1], weight.shape[0])
    rows = flat if flat.stride(1) == 1 else flat.contiguous()
    codes, scales = source.quantize(rows, 8, gated=gated)
    y = humming_forward(
        _config(weight.shape, x.dtype, x.device.index or 0, bias is not None),
        inputs=codes,
        weight=weight.words,
        weight_scale=weight.scale,
        input_scale=scales[:, None],
        bias=None if bias is None else bias[_order(len(bias), bias.device)],
        locks=weight.zero_point,
        compute_config=WHOLE_SUMS,
    )
    return y.view(*x.shape[:-1], weight.shape[0])
