"""The tensors of a packed weight, as a kernel gets them."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from mbq.packing import pack, unpack
from mbq.qtensor import QTensor
from mbq.scheme import Scheme


@dataclass(frozen=True)
class PackedWeight:
    """A quantized weight of ``shape`` [out, in] as the checkpoint stores it.

    words       int32 [out, ceil(in · b / 32)]; at 8 bits with a scale a row, int8 codes [out, in] (``int-quantized``)
    scale       [out, groups], or [out, 1] for one scale a row
    zero_point  int32 [ceil(out · b / 32), groups], packed along the output channels; None where symmetric
    """

    words: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    shape: tuple[int, int]
    scheme: Scheme


class Pointers(ctypes.Structure):
    """A weight that the CUDA kernels prepared, as they get it: ``struct Weight`` of ``codes.cuh``."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("words", "sets")]

    @classmethod
    def of(cls, weight: PackedWeight) -> Pointers:
        return cls(weight.words.data_ptr(), weight.scale.data_ptr())


def is_packed(scheme: Scheme) -> bool:
    """Whether codes are packed into words. Symmetric 8-bit codes with 8-bit activations are stored as int8 instead."""
    return scheme.activations is None or not scheme.weights.symmetric or scheme.weights.bits != 8


def pack_weight(q: QTensor, scheme: Scheme) -> PackedWeight:
    """``q`` in the checkpoint's layout; ``scheme.weights`` is ``q.scheme``."""
    bits, shape = q.scheme.bits, (q.codes.shape[0], q.codes.shape[1])
    if not is_packed(scheme):
        return PackedWeight(q.codes, q.scale, None, shape, scheme)
    if q.zero_point is None:
        return PackedWeight(pack(q.codes.to(torch.int16) + 2 ** (bits - 1), bits), q.scale, None, shape, scheme)
    zero_point = pack(q.zero_point.T, bits).T.contiguous()
    return PackedWeight(pack(q.codes, bits), q.scale, zero_point, shape, scheme)


def unpack_weight(weight: PackedWeight) -> QTensor:
    """The inverse of ``pack_weight``."""
    bits, (rows, columns) = weight.scheme.weights.bits, weight.shape
    if not is_packed(weight.scheme):
        return QTensor(weight.words, weight.scale, None, weight.scheme.weights)
    codes = unpack(weight.words, bits, columns)
    if weight.zero_point is None:
        signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
        return QTensor(signed, weight.scale, None, weight.scheme.weights)
    zero_point = unpack(weight.zero_point.T, bits, rows).T
    return QTensor(codes, weight.scale, zero_point, weight.scheme.weights)
