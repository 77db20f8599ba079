"""What becomes of a block that is searched and folded: packed layers, and a file that another run can go on from."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import nn

from mbq.architecture import Binding
from mbq.blocks import placed
from mbq.checkpoint.state import RunState
from mbq.methods import Method
from mbq.progress import Progress
from mbq.qlinear import QuantLinear
from mbq.scheme import Scheme
from mbq.search import GroupSearch


class FinishedBlocks:
    """Target linears are packed as soon as their block is done, the float weights freed; ``state`` keeps the block."""

    def __init__(self, binding: Binding, targets: Mapping[str, Scheme], method: Method, state: RunState | None) -> None:
        self.binding, self.targets, self.method, self.state = binding, targets, method, state
        self.kept: tuple[int, dict[str, torch.Tensor]] | None = None

    def rows(self, index: int) -> list[GroupSearch] | None:
        """The block's rows where an earlier run has finished it."""
        found = self.state.kept(index) if self.state is not None else None
        if found is None:
            return None
        self.kept = (index, found[0])
        return [GroupSearch.from_json(row) for row in found[1]]

    def restore(self, index: int) -> None:
        """Put what ``rows`` has just found in the place of the block's layers."""
        assert self.kept is not None
        assert self.kept[0] == index
        for name in self.names(index):
            linear, scheme = linear_of(self.binding.model, name), self.targets[name]
            weight, bias = linear.weight, linear.bias is not None
            shape = (linear.in_features, linear.out_features)
            self.binding.model.set_submodule(name, QuantLinear(*shape, scheme, bias, weight.dtype, weight.device))
        self.binding.blocks[index].load_state_dict(self.kept[1])
        self.kept = None

    def keep(self, index: int, rows: list[GroupSearch]) -> None:
        """The block is searched and folded; its float weights are not looked at again."""
        for name in self.names(index):
            self.pack(name)
        if self.state is not None:
            self.state.keep(index, self.binding.blocks[index].state_dict(), [row.to_json() for row in rows])

    def names(self, index: int) -> list[str]:
        """The targets in a block."""
        return [name for name in self.targets if name.startswith(self.binding.name(index, ""))]

    @torch.no_grad()
    def pack(self, name: str) -> None:
        linear, scheme = linear_of(self.binding.model, name), self.targets[name]
        layer = QuantLinear.from_qtensor(self.method.round(linear.weight, scheme.weights), scheme, linear.bias)
        self.binding.model.set_submodule(name, layer)

    def pack_rest(self, progress: Progress) -> None:
        """What no search has packed: everything where nothing is searched, else the vision tower."""
        blocks = [self.names(index) for index in range(len(self.binding.blocks))]
        inside = {name for names in blocks for name in names}
        done = 0
        for index, names in enumerate([*blocks, [name for name in self.targets if name not in inside]]):
            with placed(self.binding, index, changes=True) if index < len(blocks) else nullcontext():
                for name in names:
                    if not isinstance(self.binding.model.get_submodule(name), QuantLinear):
                        self.pack(name)
                    done += 1
                    progress("quantize", done, len(self.targets), name)


def linear_of(model: nn.Module, name: str) -> nn.Linear:
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear
