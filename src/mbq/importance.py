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
from mbq.blocks import capture, hooked, placed, run
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
    it has none (SmoothQuant). Linears of a group share a tensor. ``sensitivity`` is what methods that weigh need;
    ``storage`` keeps hidden states. All ``batches`` run here, of several ranks too.
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
                reads[group] = _Squares(weights.double() / weights.double().sum(), roles.lengths)
                hooks.append(block.get_submodule(group.linears[0]).register_forward_pre_hook(reads[group].read))
            hidden = [kept(run(block, x, call), storage) for x, call in zip(hidden, calls[index], strict=True)]
        for group, read in reads.items():
            mean = read.total.float().cpu()
            found |= dict.fromkeys((binding.name(index, path) for path in group.linears), mean)
    return Importance(found, sum(len(batch.labels) for batch in batches), int(roles.counted.sum()))


class _Squares:
    """A hook that adds up weighted squares, batch after batch; ``total`` [channel] in float64."""

    def __init__(self, weights: torch.Tensor, lengths: Sequence[int]) -> None:
        self.waiting = iter(weights.split(list(lengths)))
        self.total = torch.zeros(())

    def read(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].flatten(0, -2).double()
        self.total = self.total.to(x.device) + next(self.waiting).to(x.device) @ x.square()
