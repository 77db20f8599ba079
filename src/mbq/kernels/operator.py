"""``mbq::linear``, the one torch operator in front of all kernels: eager, torch.compile and CUDA graphs alike."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

from mbq.errors import MBQError
from mbq.kernels import KERNELS
from mbq.kernels.packed import PackedWeight
from mbq.scheme import ActivationScheme, Scheme, WeightScheme

LIBRARY = torch.library.Library("mbq", "DEF")
LIBRARY.define(
    "linear(Tensor x, Tensor words, Tensor scale, Tensor? zero_point, Tensor? bias, SymInt outputs, SymInt inputs, "
    "str kernel, int bits, bool symmetric, int? group_size, int? activation_bits) -> Tensor"
)


@cache
def _scheme(bits: int, symmetric: bool, group_size: int | None, activation_bits: int | None) -> Scheme:
    activations = None if activation_bits is None else ActivationScheme(activation_bits)
    return Scheme(f"W{bits}A{activation_bits or 16}", WeightScheme(bits, symmetric, group_size), activations)


def _linear(
    x: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    bias: torch.Tensor | None,
    outputs: int,
    inputs: int,
    kernel: str,
    bits: int,
    symmetric: bool,
    group_size: int | None,
    activation_bits: int | None,
) -> torch.Tensor:
    if x.shape[-1] != inputs:
        raise MBQError(f"x has {x.shape[-1]} inputs, and the weight has {inputs}.")
    if x.device != words.device:
        raise MBQError(f"x is on {x.device}, and the weight on {words.device}; move one of them.")
    if not x.dtype.is_floating_point:
        raise MBQError(f"x is {x.dtype}; a quantized linear takes floats.".replace("torch.", ""))
    scheme = _scheme(bits, symmetric, group_size, activation_bits)
    weight = PackedWeight(words, scale, zero_point, (outputs, inputs), scheme)
    with current_device(x.device):
        return KERNELS[kernel].linear(x, weight, bias)


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Kernels are launched on the current device."""
    return torch.get_device_module(device).device(device) if device.type in ("cuda", "xpu") else nullcontext()


def _shape_of_linear(
    x: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    bias: torch.Tensor | None,
    outputs: int,
    *rest: Any,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


LIBRARY.impl("linear", _linear, "CompositeExplicitAutograd")
torch.library.register_fake("mbq::linear", _shape_of_linear, lib=LIBRARY)


def linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, kernel: str) -> torch.Tensor:
    """x [..., inputs] to [..., outputs] in x's dtype, by ``KERNELS[kernel]``, whose ``prepare`` made ``weight``.

    No gradient flows. Raises MBQError where x is of the wrong width, on another device or not a float.
    """
    weights, activations = weight.scheme.weights, weight.scheme.activations
    return torch.ops.mbq.linear(
        x,
        weight.words,
        weight.scale,
        weight.zero_point,
        bias,
        *weight.shape,
        kernel,
        weights.bits,
        weights.symmetric,
        weights.group_size,
        activations and activations.bits,
    )
