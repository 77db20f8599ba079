"""A linear layer whose weight stays packed in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mbq.errors import MBQError
from mbq.kernels import KERNELS, choose
from mbq.kernels.operator import linear
from mbq.kernels.packed import PackedWeight, is_packed, pack_weight
from mbq.qtensor import QTensor
from mbq.scheme import Scheme


class QuantLinear(nn.Module):
    """``nn.Linear`` [in_features -> out_features] with a quantized weight, and activations where the scheme says so.

    The buffers are the tensors of a compressed-tensors checkpoint under their names there, so that a model of these
    layers saves and loads as it is: ``weight_packed`` (int32) and ``weight_shape``, or ``weight`` (int8) at 8 bits with
    8-bit activations; ``weight_scale``; ``weight_zero_point`` (int32) where asymmetric; ``bias``.

    A new layer is empty; ``from_qtensor`` or loading fills it. Inference only: the weight gets no gradient.
    """

    weight_packed: torch.Tensor
    weight_shape: torch.Tensor
    weight: torch.Tensor
    weight_scale: torch.Tensor
    weight_zero_point: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        self.kernel, self.rearranged = "reference", False
        bits, size = scheme.weights.bits, scheme.weights.group_size
        groups = in_features // size if size else 1

        def empty(*shape: int, dtype: torch.dtype | None) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        if is_packed(scheme):
            packed_width = -(-in_features * bits // 32)
            self.register_buffer("weight_packed", empty(out_features, packed_width, dtype=torch.int32))
            self.register_buffer("weight_shape", empty(2, dtype=torch.int64))
        else:
            self.register_buffer("weight", empty(out_features, in_features, dtype=torch.int8))
        self.register_buffer("weight_scale", empty(out_features, groups, dtype=dtype))
        zero_point = None
        if not scheme.weights.symmetric:
            zero_point = empty(-(-out_features * bits // 32), groups, dtype=torch.int32)
        self.register_buffer("weight_zero_point", zero_point)
        self.bias = nn.Parameter(empty(out_features, dtype=dtype), requires_grad=False) if bias else None

    @classmethod
    def from_qtensor(cls, q: QTensor, scheme: Scheme, bias: torch.Tensor | None = None) -> QuantLinear:
        """The layer of a quantized weight; ``scheme.weights`` is ``q.scheme``."""
        return cls.from_packed(pack_weight(q, scheme), None if bias is None else bias.detach().clone())

    @classmethod
    def from_packed(cls, packed: PackedWeight, bias: torch.Tensor | None = None) -> QuantLinear:
        """The layer of a weight in the checkpoint's layout, and of ``bias`` [out]."""
        outputs, inputs = packed.shape
        layer = cls(inputs, outputs, packed.scheme, bias is not None, packed.scale.dtype, "meta")
        if is_packed(packed.scheme):
            layer.weight_packed = packed.words
            layer.weight_shape = torch.tensor(packed.shape, device=packed.words.device)
        else:
            layer.weight = packed.words
        layer.weight_scale = packed.scale.contiguous()
        layer.weight_zero_point = packed.zero_point
        if bias is not None:
            layer.bias = nn.Parameter(bias, requires_grad=False)
        return layer

    @property
    def packed(self) -> PackedWeight:
        """The buffers as a kernel takes them."""
        words = self.weight_packed if is_packed(self.scheme) else self.weight
        shape = (self.out_features, self.in_features)
        return PackedWeight(words, self.weight_scale, self.weight_zero_point, shape, self.scheme)

    def use(self, kernel: str) -> None:
        """Choose the kernel ("auto" or a name of ``KERNELS``) and let it arrange the weight, once, after loading.

        Raises MBQError where the named kernel does not support this layer.
        """
        if self.rearranged:
            raise MBQError(f"This layer runs in the kernel {self.kernel!r} already; load the model anew for another.")
        given = self.packed
        self.kernel = choose(kernel, self.scheme, given.shape, given.words.device, given.scale.dtype)
        packed = KERNELS[self.kernel].prepare(given)
        self.rearranged = packed is not given
        setattr(self, "weight_packed" if is_packed(self.scheme) else "weight", packed.words)
        self.weight_scale, self.weight_zero_point = packed.scale, packed.zero_point

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantLinear:
        """What ``to``, ``half`` and ``cpu`` do; refused where words are arranged for one dtype and kind of device."""
        scale = self.weight_scale[:0]
        changed = fn(scale) if self.rearranged else scale
        if changed.dtype != scale.dtype or changed.device.type != scale.device.type:
            raise MBQError(
                f"This model's weights are arranged for {scale.dtype} on {scale.device.type}; load it anew with the "
                "dtype and device that you want.".replace("torch.", "")
            )
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self.rearranged:
            raise MBQError(
                f"This model's weights are arranged for the kernel {self.kernel!r} and no longer those of its folder; "
                "to save it, load it anew with kernel='reference'."
            )
        super()._save_to_state_dict(*args, **kwargs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.packed, self.bias, self.kernel)

    def extra_repr(self) -> str:
        scheme, size = self.scheme, self.scheme.weights.group_size
        group = f", group_size={size}" if size else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scheme={scheme.name}{group}, kernel={self.kernel}"
        )
