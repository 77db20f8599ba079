"""How much each input channel of each linear is worth, with tokens weighed as the search weighs them.

Means of squared activations are what an importance matrix of llama.cpp holds: rounding a weight by d changes a token's
output by d x, so the mean over tokens of x^2 is what a channel's squared rounding errors cost. llama.cpp counts every
token once. Here a token has its method's weight: under MBQ, vision tokens count by the block's sensitivity to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mbq.architecture import Binding
from mbq.blocks import capture, hooked, placed, reached, run
from mbq.calibration import CalibrationBatch
from mbq.equalization import uniform_weights
from mbq.methods.method import Method, SearchOptions
from mbq.search import token_roles, weighings
from mbq.sensitivity import Sensitivity
from mbq.storage import Keep, kept


@dataclass(frozen=True)
class Importance:
    """Means over tokens of squared inputs, by the full names of linears: [channel], float32, on the CPU.

    samples, tokens  on which they were measured, without padding
    """

    means: dict[str, torch.Tensor]
    samples: int
    tokens: int


@torch.no_grad()
def importance(
    binding: Binding,
    batches: Sequence[CalibrationBatch],
    method: Method,
    options: SearchOptions,
    sensitivity: Sensitivity | None = None,
    storage: Keep | None = None,
) -> Importance:
    """Sum over tokens of w_t x_t^2, by the sum of w_t, for the linears of the binding's groups.

    x is what a linear reads now, equalized if the model is; w_t are the token weights of ``method``, all the same where
    it has none (SmoothQuant), and for what is no token (the states of pictures). Linears of a group share a tensor;
    those of blocks that no sample goes through have none. ``sensitivity`` is what methods that weigh need; ``storage``
    keeps hidden states. All ``batches`` run here, of several ranks too.
    """
    roles = token_roles(batches, options.parity)
    weighing = weighings(sensitivity, options) if method.weighs else None
    hidden, calls = capture(binding, batches, storage)
    found: dict[str, torch.Tensor] = {}
    for index in range(len(binding.blocks)):
        reads = {}
        with placed(binding, index) as block, hooked() as hooks:
            for group in binding.kinds[index].groups:
                own = None if weighing is None else weighing[group.part][index]
                weights = method.token_weights(roles, own, options) if method.token_weights else uniform_weights(roles)
                weights = weights.double() * reached(calls[index], roles.lengths).to(weights.device)
                reads[group] = _Squares((weights / weights.sum()).split(list(roles.lengths)) if group.tokens else None)
                hooks.append(block.get_submodule(group.linears[0]).register_forward_pre_hook(reads[group].read))
            for number, call in enumerate(calls[index]):
                for read in reads.values():
                    read.batch = number
                hidden[number] = kept(run(block, hidden[number], call), storage)
        for group, read in reads.items():
            if not any(call.called for call in calls[index]):
                continue
            mean = (read.total / read.rows if read.weights is None else read.total).float().cpu()
            found |= dict.fromkeys((binding.name(index, path) for path in group.linears), mean)
    return Importance(found, sum(len(batch.labels) for batch in batches), int(roles.counted.sum()))


class _Squares:
    """A hook that adds up squares, weighted by the ``weights`` of the ``batch`` that runs; None: all rows the same.

    ``total`` [channel] in float64; ``rows``: how many these are.
    """

    batch = 0
    rows = 0

    def __init__(self, weights: Sequence[torch.Tensor] | None) -> None:
        self.weights = weights
        self.total = torch.zeros(())

    def read(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].flatten(0, -2).double()
        self.rows += len(x)
        weights = x.new_ones(len(x)) if self.weights is None else self.weights[self.batch].to(x.device)
        self.total = self.total.to(x.device) + weights @ x.square()
