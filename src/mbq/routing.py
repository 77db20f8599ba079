"""Which tokens a router sends to which expert, and what its output counts: known before a search draws tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mbq import ranks
from mbq.blocks import Call, evaluating, hooked, run
from mbq.equalization import TokenRoles


@dataclass(frozen=True)
class Routing:
    """Where a block's router sends the tokens of the whole calibration set.

    chosen   [token, choice]: numbers of experts
    weights  [token, choice]: what their outputs are multiplied by
    """

    chosen: torch.Tensor
    weights: torch.Tensor

    def to(self, expert: int) -> torch.Tensor:
        """bool [token]: which are sent to the expert."""
        return (self.chosen == expert).any(1)

    def share(self, expert: int) -> torch.Tensor:
        """[token]: what the expert's output is multiplied by, 0 for tokens that are not sent there."""
        return self.weights.masked_fill(self.chosen != expert, 0).sum(1)


@torch.no_grad()
def routing(
    block: nn.Module, path: str, hidden: Sequence[torch.Tensor], calls: Sequence[Call], roles: TokenRoles
) -> Routing:
    """Run the block up to its experts, at ``path`` in it, on this process's batches; of all processes together."""
    found: list[list[torch.Tensor]] = []

    def called(module: nn.Module, args: tuple[Any, ...]) -> None:
        found.append([each.detach() for each in args[1:3]])
        raise _Routed

    with hooked() as hooks, evaluating(block):
        hooks.append(block.get_submodule(path).register_forward_pre_hook(called))
        for states, call in zip(hidden, calls, strict=True):
            try:
                run(block, states, call)
            except _Routed:
                continue
    device = roles.counted.device
    own = [torch.cat(each).double().to(device) for each in zip(*found, strict=True)]
    every = [torch.zeros(len(roles.counted), each.shape[1], dtype=torch.float64, device=device) for each in own]
    for whole, part in zip(every, own, strict=True):
        whole[roles.own] = part
    chosen, weights = (ranks.total(each) for each in every)
    return Routing(chosen.long(), weights)


class _Routed(Exception):
    """Ends a forward pass that has shown where tokens go."""
