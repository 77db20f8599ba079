"""Channels that dwarf the others in what a linear reads, and massive activations of first tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mbq.architecture import LinearGroup
from mbq.scheme import ActivationScheme

MODALITIES = ("language", "vision")
# A massive activation, as its discoverers define it (Sun et al., Massive Activations in Large Language Models, 2024).
MASSIVE_VALUE, MASSIVE_RATIO = 100.0, 1000.0
HALF = 0.5


@dataclass(frozen=True)
class Outlier:
    """The most extreme channel of what a group of linears of one block reads, over the tokens of one modality.

    part      "attn" or "mlp", whose output they make
    ratio     its max|x| over the median channel's max|x|: the robust scale, which no few channels move
    share     its part of the sum of squares of all channels
    channels  those that do harm: one with more of the sum of squares than all others together, so that the rounding
              of its column decides the output's error; and where activations are quantized, those so large that the
              median channel's largest value is below one step of their token
    """

    block: int
    part: str
    linears: tuple[str, ...]
    modality: str
    channel: int
    ratio: float
    share: float
    channels: tuple[int, ...] = ()


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
    """Maxima and sums of squares of the channels that a group's linears read, batch after batch.

    activations  how the linears quantize what they read, None where they do not
    """

    def __init__(self, group: LinearGroup, activations: ActivationScheme | None) -> None:
        self.group = group
        self.steps = math.inf if activations is None else 2 ** (activations.bits - 1) - 1
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
            channel, squares = int(maxima.argmax()), self.squares[modality]
            ratios = maxima / maxima.median().clamp(min=1e-30)
            shares = squares / squares.sum().clamp(min=1e-60)
            harmful = ((ratios > self.steps) | (shares > HALF)).nonzero().flatten().tolist()
            figures = (channel, float(ratios[channel]), float(shares[channel]), tuple(harmful))
            found.append(Outlier(block, self.group.part, self.group.linears, modality, *figures))
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
