"""What the groups of a block see in one forward pass: statistics of all tokens, and of the others what a search needs.

A search compares a few thousand tokens of a hundred thousand, and knows which before the block runs. Only these are
kept, and where tokens see each other the batches that they are in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mbq.architecture import Binding, LinearGroup
from mbq.blocks import Call, evaluating, first, hooked, moved, run
from mbq.errors import MBQError
from mbq.storage import Keep, kept


@dataclass(frozen=True)
class Look:
    """The tokens of a trace that matter; bool [token], one process's batches one after the other, on the CPU.

    counted   in statistics of what goes in
    compared  in what comes out; what of others nobody needs is not kept
    alone     the inspected module treats each token alone; else what is kept are whole batches
    routed    those that an expert gets, in order: the group's linears see no others; None: they see all
    """

    counted: torch.Tensor
    compared: torch.Tensor
    alone: bool
    routed: torch.Tensor | None = None


@dataclass(frozen=True)
class GroupTrace:
    """What one group of one block saw; ``trace`` fills it. A tensor or call for each of the ``batches`` that are kept.

    look     None: all batches are kept, and no statistics
    batches  their numbers
    inputs   [batch, token, channel]: what the group's linears read; [token, channel] of the compared, where alone
    calls    how the block called the group's inspected module
    outputs  [batch, token, channel]: what the inspected module returned; [token, channel] where alone
    sums, maxima  [channel], of every batch with counted tokens: of |input| over these, in float32
    finite   [], of every call: whether the inspected module's output is
    """

    group: LinearGroup
    look: Look | None = None
    batches: list[int] = field(default_factory=list)
    inputs: list[torch.Tensor] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)
    sums: list[torch.Tensor] = field(default_factory=list)
    maxima: list[torch.Tensor] = field(default_factory=list)
    finite: list[torch.Tensor] = field(default_factory=list)


def check_finite(binding: Binding, index: int, finite: Sequence[torch.Tensor], group: str = "") -> None:
    """Raise MBQError, with the names of the block and of its ``group``, unless all of ``finite`` [] are true."""
    if not finite or bool(torch.stack(list(finite)).all()):  # an expert may have no calls
        return
    block = binding.blocks[index]
    path, dtype = binding.name(index, "").rstrip("."), str(next(block.parameters()).dtype).removeprefix("torch.")
    raise MBQError(
        f"The output of {f'block {index}, {group}, in ' if group else ''}{path} is not finite in {dtype}; "
        f"{'give --dtype bfloat16 or float32' if dtype == 'float16' else 'check the checkpoint'}."
    )


@torch.no_grad()
def trace(
    block: nn.Module,
    traces: Sequence[GroupTrace],
    hidden: Sequence[torch.Tensor],
    calls: Sequence[Call],
    storage: Keep | None = None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """One forward of the block a batch: fills the ``traces``; the block's outputs, and whether each is finite, []."""
    outputs, finite = [], []
    memo: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # what several groups see is kept once
    lengths = [states.shape[:-1].numel() for states in hidden]
    recorders = [_Recorder(found, lengths, storage, memo) for found in traces]
    with hooked() as hooks, evaluating(block):
        for found, recorder in zip(traces, recorders, strict=True):
            inspected = block.get_submodule(found.group.inspect)
            linear = block.get_submodule(found.group.linears[0])
            hooks.append(linear.register_forward_pre_hook(recorder.read))
            hooks.append(inspected.register_forward_pre_hook(recorder.called, with_kwargs=True))
            hooks.append(inspected.register_forward_hook(recorder.returned))
        for number, (states, call) in enumerate(zip(hidden, calls, strict=True)):
            memo.clear()
            for recorder in recorders:
                recorder.batch = number
            output = run(block, states, call)
            finite.append(torch.isfinite(output).all())
            outputs.append(kept(output, storage))
    return outputs, finite


class _Recorder:
    """Hooks that fill a trace; ``batch`` is the number of the one that runs."""

    batch = 0

    def __init__(
        self,
        found: GroupTrace,
        lengths: Sequence[int],
        storage: Keep | None,
        memo: dict[int, tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        self.found, self.storage, self.memo = found, storage, memo
        look = found.look
        self.counted = _rows(look, look.counted, lengths) if look else []
        self.compared = _rows(look, look.compared, lengths) if look else []

    def read(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.found.look is not None and len(self.counted[self.batch]):
            sizes = _only(args[0], self.counted[self.batch]).float().abs()
            self.found.sums.append(sizes.sum(0))
            self.found.maxima.append(sizes.amax(0))
        if self.keeps:
            self.found.batches.append(self.batch)
            self.found.inputs.append(self._kept(args[0]))

    def called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.keeps and not self.alone:
            self.found.calls.append(Call(*(moved(each, self.storage, self.memo) for each in (args, kwargs))))

    def returned(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        output = first(output)
        if self.keeps:
            self.found.outputs.append(self._kept(output))
        self.found.finite.append(torch.isfinite(output).all())

    @property
    def alone(self) -> bool:
        return self.found.look is not None and self.found.look.alone

    @property
    def keeps(self) -> bool:
        return self.found.look is None or len(self.compared[self.batch]) > 0

    def _kept(self, tensor: torch.Tensor) -> torch.Tensor:
        rows = _only(tensor, self.compared[self.batch]) if self.alone else tensor
        found: torch.Tensor = moved(rows, self.storage, self.memo)
        return found


def _rows(look: Look, wanted: torch.Tensor, lengths: Sequence[int]) -> list[torch.Tensor]:
    """The ``wanted`` tokens of each batch, as rows of what the group's linears read."""
    if look.routed is None:
        return [each.nonzero().flatten() for each in wanted.split(lengths)]
    pairs = zip(wanted.split(lengths), look.routed.split(lengths), strict=True)
    return [each[routed].nonzero().flatten() for each, routed in pairs]


def _only(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[token, channel]: these rows of all samples, counted through; a view where that is all of them."""
    flat = tensor.flatten(0, -2)
    return flat if len(rows) == len(flat) else flat[rows.to(flat.device)]
