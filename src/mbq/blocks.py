"""The one place that runs a model block by block: what goes in, what comes out, and with other weights.

Hidden states and activations are lists with one tensor a calibration batch, because batches have different lengths.
``storage`` keeps them (None: where they were made), and they are brought to the block's device for each run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from mbq.architecture import Binding
from mbq.calibration import CalibrationBatch
from mbq.storage import Keep, kept

_CACHES = ("past_key_value", "past_key_values")
_TUPLES: dict[type, bool] = {}  # classes of blocks: whether they return a tuple


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a module, without the hidden states where the module is a block.

    added   what the model adds to a block's hidden states before the call (the visual features of early blocks)
    called  False where the model leaves the block out (cross-attention of a text without pictures), which gives what it
            gets
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    added: torch.Tensor | None = None
    called: bool = True

    def to(self, device: torch.device) -> Call:
        memo: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        args, kwargs, added = (moved(each, _to(device), memo) for each in (self.args, self.kwargs, self.added))
        return Call(args, kwargs, added, self.called)

    def tensors(self) -> list[torch.Tensor]:
        """Those among the arguments, in order."""
        found: list[torch.Tensor] = []
        _mapped((self.args, self.kwargs), found.append)
        return found

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> Call:
        """The same call with others in their places."""
        left = iter(tensors)
        return Call(*_mapped((self.args, self.kwargs), lambda _: next(left)))

    def form(self) -> str:
        """The same for calls that differ in the numbers of their tensors alone."""
        return repr(_mapped((self.args, self.kwargs), lambda tensor: (tensor.dtype, tuple(tensor.shape))))


# Hidden states that go into the first block, a batch; and ``calls[block][batch]``.
Inputs = tuple[list[torch.Tensor], list[list[Call]]]


@torch.no_grad()
def capture(binding: Binding, batches: Sequence[CalibrationBatch], storage: Keep | None = None) -> Inputs:
    """The first block's hidden states [batch, token, channel] a batch, and ``calls[block][batch]`` of every block.

    The model runs without its blocks, which are let through as zeros: what a later block gets is what the model added.
    It may leave out any block but the first.
    Caches are off.
    """
    hidden: list[torch.Tensor] = []
    calls: list[list[Call]] = [[] for _ in binding.blocks]
    memo: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def before(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states, call = _split(args, kwargs)
        added = None
        if index == 0:
            hidden.append(kept(states, storage))
        elif bool(states.any()):
            added = states
        calls[index].append(Call(*(moved(each, storage, memo) for each in (call.args, call.kwargs, added))))
        if index == len(calls) - 1:
            raise _LastBlock

    with hooked() as hooks, evaluating(binding.model), passing(binding, torch.zeros_like):
        for index, block in enumerate(binding.blocks):
            hook = _before(before, index)
            hooks.append(block.register_forward_pre_hook(hook, with_kwargs=True))
        for batch in batches:
            memo.clear()
            with suppress(_LastBlock):
                forward(binding.model, batch)
            for each in calls:
                each.extend([Call((), {}, called=False)] * (len(hidden) - len(each)))
    return hidden, calls


@contextmanager
def passing(binding: Binding, states: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Inside, a block computes nothing: it returns ``states`` of its hidden states."""
    blocks = list(binding.blocks)

    def instead(*args: Any, **kwargs: Any) -> Any:
        if type(blocks[0]) not in _TUPLES:  # what a class returns is seen once, in its first block
            with placed(binding, 0) as block, torch.no_grad():
                _TUPLES[type(block)] = isinstance(type(block).forward(block, *args, **kwargs), tuple)
        given = states(_split(args, kwargs)[0])
        return (given,) if _TUPLES[type(blocks[0])] else given

    own = [vars(block).get("forward") for block in blocks]  # an instance may have one: accelerate's hooks are such
    try:
        for block in blocks:
            block.forward = instead
        yield
    finally:
        for block, before in zip(blocks, own, strict=True):
            del block.forward
            if before is not None:
                block.forward = before


@contextmanager
def placed(binding: Binding, index: int, changes: bool = False) -> Iterator[nn.Module]:
    """A block, on the model's device for as long as this lasts, if it waits on the CPU.

    changes  its weights are changed meanwhile, and copied back. Else they are again what they were: views of a file
             that is mapped into memory, which all processes of a host share, where a copy would be the process's own
    """
    block, device = binding.blocks[index], device_of(binding.model)
    waiting = device_of(block).type == "cpu" and device.type != "cpu"
    before = [] if changes else [(parameter, parameter.data) for parameter in block.parameters()]
    if waiting:
        block.to(device)
    try:
        yield block
    finally:
        if waiting:
            for parameter, data in before:
                parameter.data = data
            block.to("cpu")


@contextmanager
def streamed(binding: Binding) -> Iterator[None]:
    """Inside, a block that waits on the CPU comes to the model's device when it is called, and goes back afterwards.

    The model runs as if it were there whole; each pass takes as long as its weights take to travel.
    """
    here: dict[int, ExitStack] = {}

    def arrive(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            here[index] = ExitStack()
            here[index].enter_context(placed(binding, index))

        return hook

    def leave(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            here.pop(index).close()

        return hook

    with hooked() as hooks:
        for index, block in enumerate(binding.blocks):
            hooks.append(block.register_forward_pre_hook(arrive(index)))
            hooks.append(block.register_forward_hook(leave(index)))
        try:
            yield
        finally:
            for stack in here.values():  # of a pass that failed
                stack.close()


def forward(model: nn.Module, batch: CalibrationBatch) -> Any:
    """The model's output for a batch, on the model's device and without a cache."""
    return model(**moved(batch.inputs, _to(device_of(model)), {}), use_cache=False)


def run(block: nn.Module, hidden: torch.Tensor, call: Call) -> torch.Tensor:
    """The block's output [batch, token, channel], on the block's device."""
    device = device_of(block)
    call, hidden = call.to(device), hidden.to(device)
    if not call.called:
        return hidden
    if call.added is not None:
        hidden = hidden + call.added
    return first(block(hidden, *call.args, **call.kwargs))


def reached(calls: Sequence[Call], lengths: Sequence[int]) -> torch.Tensor:
    """bool [token]: those that a block is called with, batches of these ``lengths`` one after the other."""
    called = [torch.full((length,), call.called) for call, length in zip(calls, lengths, strict=True)]
    return torch.cat(called) if called else torch.zeros(0, dtype=torch.bool)


@torch.no_grad()
def run_with(
    module: nn.Module,
    call: Call,
    weights: Mapping[str, torch.Tensor],
    read: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """The module's output with other weights in some of its linears, which then read ``read(input)``.

    ``weights`` maps a linear's path in the module ("" where the module is the linear) to its weight [out, in]. The
    module itself stays as it is.
    """
    parameters = {f"{name}.weight" if name else "weight": weight for name, weight in weights.items()}
    call = call.to(device_of(module))
    with hooked() as hooks, evaluating(module):
        if read is not None:
            for name in weights:
                hook = _reading(read)
                hooks.append(module.get_submodule(name).register_forward_pre_hook(hook))
        return first(torch.func.functional_call(module, parameters, call.args, call.kwargs))


def device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


class _LastBlock(Exception):
    """Ends a forward pass that has shown all that was asked for."""


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, Call]:
    """Hidden states and the rest of a block's arguments, with the cache taken out."""
    kwargs = {name: None if name in _CACHES else value for name, value in kwargs.items()}
    if "use_cache" in kwargs:
        kwargs["use_cache"] = False
    hidden = args[0] if args else kwargs.pop("hidden_states")
    return hidden, Call(tuple(args[1:]), kwargs)


def _before(record: Callable[..., None], subject: Any) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        record(subject, args, kwargs)

    return hook


def _reading(read: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., tuple[torch.Tensor]]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[torch.Tensor]:
        return (read(args[0]),)

    return hook


def first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _to(device: torch.device) -> Keep:
    return lambda tensor: tensor.to(device)


def moved(value: Any, move: Keep | None, memo: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> Any:
    """``value`` with its tensors moved (None: where they are).

    A tensor that blocks share stays shared: ``memo`` maps its id to itself (so that the id stays taken) and its copy.
    """
    if move is None:
        return value

    def once(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in memo:
            memo[id(tensor)] = (tensor, move(tensor))
        return memo[id(tensor)][1]

    return _mapped(value, once)


def _mapped(value: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """``value`` with ``function`` of each tensor in its place, in dictionaries, lists and tuples too."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {name: _mapped(item, function) for name, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_mapped(item, function) for item in value)
    return value


@contextmanager
def hooked() -> Iterator[list[RemovableHandle]]:
    handles: list[RemovableHandle] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
