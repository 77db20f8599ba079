"""What a linear multiplies with under a candidate vector E: Q(W E), which a search makes twenty times and more.

A dozen of torch's operations, each of which reads and writes the whole weight, mostly in float32: 88 bytes of memory a
16-bit weight, where 4 are needed. On a GPU that Triton compiles for it is one kernel with the same roundings.
"""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache

import torch

from mbq.errors import MBQWarning
from mbq.kernels.operator import current_device
from mbq.qtensor import LEAST_SCALE, fake_quantize
from mbq.scheme import WeightScheme


def candidates(weight: torch.Tensor, vectors: torch.Tensor, scheme: WeightScheme, divided: bool) -> torch.Tensor:
    """Q(W E), or Q(W E) / E where ``divided``, for every E: [candidate, out, in] in the weight's dtype.

    weight [out, in]; vectors [candidate, in] in float32. A NaN of the weight comes out as one.
    """
    if weight.device.type in ("cuda", "xpu") and _compiles(weight.device, weight.dtype):
        return fused(weight, vectors, scheme, divided)
    return plain(weight, vectors, scheme, divided)


def plain(weight: torch.Tensor, vectors: torch.Tensor, scheme: WeightScheme, divided: bool) -> torch.Tensor:
    """The same by torch's operations, one vector after the other."""
    made = weight.new_empty(len(vectors), *weight.shape)
    for number, vector in enumerate(vectors):
        quantized = fake_quantize((weight.float() * vector).to(weight.dtype), scheme)
        made[number] = quantized.float() / vector if divided else quantized
    return made


def fused(weight: torch.Tensor, vectors: torch.Tensor, scheme: WeightScheme, divided: bool) -> torch.Tensor:
    """The same in one kernel."""
    from mbq.kernels import candidates_source as source

    made = weight.new_empty(len(vectors), *weight.shape)
    with current_device(weight.device):
        source.launch(weight.contiguous(), vectors.float().contiguous(), made, scheme, LEAST_SCALE, divided)
    return made


@cache
def _compiles(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton is there and its kernel gives the plain operations' numbers in a trial; else one warning."""
    if importlib.util.find_spec("triton") is None:
        return False
    weight = torch.linspace(-3, 2, 64 * 96, device=device).sin().view(64, 96).to(dtype)
    trial = weight, torch.linspace(0.5, 2, 2 * 96, device=device).view(2, 96), WeightScheme(3, False, 32), True
    try:
        reason = "" if torch.equal(fused(*trial), plain(*trial)) else "it gives other numbers than torch"
    except Exception as error:  # whatever a compiler that is missing, or too old, makes Triton raise
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
    if reason:
        warnings.warn(f"The search runs without its Triton kernel, slower: {reason}.", MBQWarning, stacklevel=2)
    return not reason
