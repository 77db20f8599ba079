"""What stands outside the decoder blocks and is not quantized: it should be the float model's, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mbq.architecture import Binding
from mbq.blocks import evaluating, forward, passing
from mbq.calibration import CalibrationBatch, language_mask


@dataclass(frozen=True)
class Outside:
    """How the rest of the quantized model differs from the float model's.

    tensors  those that differ, and by how much: ||quantized - float|| / ||float||; a quantized tower's are left out
    logits   relative difference of the logits at language tokens where both models let their blocks through
    rounding of the dtype: what is below it is no difference
    """

    tensors: dict[str, float]
    logits: float
    rounding: float

    @property
    def differs(self) -> bool:
        return bool(self.tensors) or self.logits > self.rounding


@torch.no_grad()
def compare_outside(
    reference: Binding, quantized: Binding, batch: CalibrationBatch, tower_quantized: bool = False
) -> Outside:
    """``batch`` is one sample: logits of all its tokens are made."""
    skipped = [reference.architecture.blocks]
    skipped += [reference.architecture.vision_tower] if tower_quantized else []
    wanted, found = ([*each.model.named_parameters(), *each.model.named_buffers()] for each in (reference, quantized))
    own, tensors = dict(found), {}
    for name, tensor in wanted:
        if name not in own or not tensor.is_floating_point() or any(name.startswith(f"{part}.") for part in skipped):
            continue
        ours = own[name].to(tensor.device)
        if ours.shape != tensor.shape:
            tensors[name] = float("inf")
        elif not torch.equal(ours.to(tensor.dtype), tensor):
            tensors[name] = _relative(ours, tensor)
    theirs, ours = (_logits(each, batch) for each in (reference, quantized))
    rounding = torch.finfo(next(reference.blocks.parameters()).dtype).eps
    return Outside(tensors, _relative(ours.to(theirs.device), theirs), rounding)


def _logits(binding: Binding, batch: CalibrationBatch) -> torch.Tensor:
    """[language token, vocabulary], the blocks being the identity."""
    with evaluating(binding.model), passing(binding, lambda states: states):
        logits: torch.Tensor = forward(binding.model, batch).logits
    return logits[language_mask(batch).to(logits.device)]


def _relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-30))
