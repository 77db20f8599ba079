"""Channels that dwarf the others in what a linear reads, and massive activations of first tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mbq.architecture import LinearGroup

MODALITIES = ("language", "vision")
# A massive activation, as its discoverers define it (Sun et al., Massive Activations in Large Language Models, 2024).
MASSIVE_VALUE, MASSIVE_RATIO = 100.0, 1000.0


@dataclass(frozen=True)
class Outlier:
    """The most extreme channel of what a group of linears of one block reads, over the tokens of one modality.

    part   "attn" or "mlp", whose output they make
    ratio  its max|x| over the median channel's max|x|: the robust scale, which no few channels move
    share  its part of the sum of squares of all channels
    """

    block: int
    part: str
    linears: tuple[str, ...]
    modality: str
    channel: int
    ratio: float
    share: float


@dataclass(frozen=True)
class Spike:
    """The largest |number| in a block's output at the tokens that open the samples, and how many times the median of
    its token's |numbers| it is; ``others`` is that ratio at all other tokens.
    """

    block: int
    value: float
    ratio: float
    others: float

    @property
    def massive(self) -> bool:
        return self.value > MASSIVE_VALUE and self.ratio > MASSIVE_RATIO


class Inputs:
    """Maxima and sums of squares of the channels that a group's linears read, batch after batch."""

    def __init__(self, group: LinearGroup) -> None:
        self.group = group
        self.maxima: dict[str, torch.Tensor] = {}
        self.squares: dict[str, torch.Tensor] = {}

    def hook(self, masks: Mapping[str, torch.Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def read(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().float()
            x = x.reshape(-1, x.shape[-1])
            for modality in MODALITIES:
                chosen = x[masks[modality].flatten().to(x.device)]
                if len(chosen):
                    self._add(modality, chosen)

        return read

    def _add(self, modality: str, x: torch.Tensor) -> None:
        maxima, squares = x.abs().amax(0), x.double().square().sum(0)
        if modality in self.maxima:
            maxima = torch.maximum(maxima, self.maxima[modality])
            squares = squares + self.squares[modality]
        self.maxima[modality], self.squares[modality] = maxima, squares

    def outliers(self, block: int) -> list[Outlier]:
        found = []
        for modality, maxima in self.maxima.items():
            channel = int(maxima.argmax())
            squares = self.squares[modality]
            ratio = float(maxima[channel] / maxima.median().clamp(min=1e-30))
            share = float(squares[channel] / squares.sum().clamp(min=1e-60))
            found.append(Outlier(block, self.group.part, self.group.linears, modality, channel, ratio, share))
        return found


class Residual:
    """The largest number in a block's output, batch after batch: value and ratio at first tokens, ratio at others."""

    def __init__(self) -> None:
        self.value = self.ratio = self.others = 0.0

    def add(self, output: torch.Tensor, masks: Mapping[str, torch.Tensor]) -> None:
        sizes = output.float().abs()
        largest = sizes.amax(-1)
        ratios = largest / sizes.median(-1).values.clamp(min=1e-30)
        first = masks["first"].to(output.device)
        self.value = max(self.value, float(largest[first].max()))
        self.ratio = max(self.ratio, float(ratios[first].max()))
        rest = (masks["language"] | masks["vision"]).to(output.device) & ~first
        if rest.any():
            self.others = max(self.others, float(ratios[rest].max()))

    def spike(self, block: int) -> Spike:
        return Spike(block, self.value, self.ratio, self.others)
