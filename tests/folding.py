"""Random vectors folded into every group of a model."""

from __future__ import annotations

import torch
from torch import nn

from mbq.architecture import Binding
from mbq.equalization import fold, value_rows

HEAD_DIM = 32  # of all tiny models


def fold_everything(binding: Binding) -> None:
    """In place. Vectors are between 0.25 and 4.25, a number for each row of what comes before."""
    architecture, generator = binding.architecture, torch.Generator().manual_seed(1)
    for index in range(len(binding.blocks)):
        for group in (each for each in binding.kinds[index].groups if each.prev):
            linears = [binding.module(index, path).weight for path in group.linears]
            prev = binding.module(index, group.prev)
            channels = linears[0].shape[1]
            sources = torch.arange(channels)
            if group.name == "o":
                found = value_rows(len(prev.weight), channels, HEAD_DIM, architecture.fused_qkv)
                assert found is not None
                sources = found
            elif group.name in ("down", "out") and len(prev.weight) != channels:  # GLM's gate and up, LFM2's B, C and x
                sources = channels + sources
            row_vector = torch.rand(len(prev.weight), generator=generator) * 4 + 0.25
            offset = 0.0 if isinstance(prev, nn.Linear) else architecture.norm_offset
            fold(row_vector[sources], sources, list(prev.parameters(recurse=False)), linears, offset)
