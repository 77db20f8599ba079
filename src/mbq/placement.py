"""Where the weights are while a model is calibrated: on the device, or there one block at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from mbq.architecture import Binding

# Of the free memory, for weights; the rest is for activations and for what a search works with.
WEIGHTS_SHARE = 0.6


@dataclass(frozen=True)
class Placement:
    """What was chosen.

    device   that computes
    blocks   whether blocks wait in the CPU's memory and come to the device one at a time
    storage  where activations are kept between blocks; None is where they are made
    """

    device: torch.device
    blocks: bool = False

    @property
    def storage(self) -> torch.device | None:
        return torch.device("cpu") if self.blocks else None

    def __str__(self) -> str:
        if self.blocks:
            return f"weights and activations in the CPU's memory, one block at a time on {self.device}"
        return f"the whole model on {self.device}"


def place(binding: Binding, device: torch.device, offload: str = "auto") -> Placement:
    """Move the model, which is on the CPU, to where it will be calibrated.

    offload  "blocks": all but the decoder blocks go to the device; "none": everything; "auto": blocks stay where the
             weights would take more than 60 % of the device's free memory
    """
    apart = device.type == "cuda" and (offload == "blocks" or (offload == "auto" and not _fits(binding.model, device)))
    if apart:
        blocks = set(binding.blocks.modules())
        for module in binding.model.modules():
            if module not in blocks:
                _move_own(module, device)
    else:
        binding.model.to(device)
    return Placement(device, apart)


def weight_bytes(module: nn.Module) -> int:
    """Of parameters and buffers; tied ones once."""
    return sum(each.nbytes for each in {id(each): each for each in (*module.parameters(), *module.buffers())}.values())


def _fits(model: nn.Module, device: torch.device) -> bool:
    return weight_bytes(model) <= WEIGHTS_SHARE * torch.cuda.mem_get_info(device)[0]


def _move_own(module: nn.Module, device: torch.device) -> None:
    """The module's own parameters and buffers, not its children's."""
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.to(device)
    for name, buffer in module.named_buffers(recurse=False):
        module._buffers[name] = buffer.to(device)
