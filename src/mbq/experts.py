"""Mixtures of experts, expert by expert. transformers keeps all experts of a block in two 3-D tensors, and what
quantizes works on linears: ``split_experts`` makes them linears over the same numbers, ``joined`` tensors for a while.

An expert here is a gated MLP, as in the Qwen and GLM families: down(activation(gate(x)) * up(x)).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# Of transformers' modules (``use_experts_implementation``): gate's rows before up's, [expert, out, in], no biases.
FUSED = ("gate_up_proj", "down_proj")
LAYOUT = {"has_gate": True, "is_concatenated": True, "is_transposed": False, "has_bias": False}


class Expert(nn.Module):
    """One expert: [token, channel] to [token, channel]."""

    def __init__(self, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, act_fn: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = _linear(gate), _linear(up), _linear(down)
        self.act_fn = act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return found


class Experts(nn.ModuleList):
    """The experts of a block, called as transformers' module is, and computing the same."""

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x [token, channel]; the experts ``chosen`` [token, choice] for each, and their ``weights``."""
        total = torch.zeros_like(x)
        for number in chosen.unique().tolist():
            tokens, places = (chosen == number).nonzero(as_tuple=True)
            made = self[number](x[tokens]) * weights[tokens, places, None]
            total.index_add_(0, tokens, made.to(total.dtype))
        return total


def split_experts(model: nn.Module) -> None:
    """Put ``Experts`` in the place of each of transformers' modules; the linears are views of its tensors."""
    for name, module in _whole(model).items():
        gate, up = module.gate_up_proj.chunk(2, dim=1)
        experts = zip(gate, up, module.down_proj, strict=True)
        model.set_submodule(name, Experts(Expert(*tensors, module.act_fn) for tensors in experts))


@contextmanager
def left_whole(model: nn.Module) -> Iterator[None]:
    """What ``split_experts`` replaces inside is put back."""
    before = _whole(model)
    try:
        yield
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)


def has_experts(model: nn.Module) -> bool:
    """Whether ``model`` has been split."""
    return any(isinstance(module, Experts) for module in model.modules())


def merged_bytes(model: nn.Module) -> int:
    """Of single experts: transformers merges or turns their tensors when it loads them, into the CPU's memory."""
    weights = (each for module in model.modules() if isinstance(module, Experts) for each in module.parameters())
    return sum(weight.nbytes for weight in weights)


@contextmanager
def joined(model: nn.Module) -> Iterator[None]:
    """Inside, the float experts of each block are two tensors again, so that transformers saves them as its own."""
    single: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    try:
        for name, experts in single.items():
            whole = nn.Module()
            both = [torch.cat([each.gate_proj.weight, each.up_proj.weight]) for each in experts]
            whole.gate_up_proj = nn.Parameter(torch.stack(both), requires_grad=False)
            down = torch.stack([each.down_proj.weight for each in experts])
            whole.down_proj = nn.Parameter(down, requires_grad=False)
            model.set_submodule(name, whole)
        yield
    finally:
        for name, module in single.items():
            model.set_submodule(name, module)


def _whole(model: nn.Module) -> dict[str, Any]:
    """transformers' modules of experts that are of the layout above, by their names."""
    return {
        name: module
        for name, module in model.named_modules()
        if tuple(path for path, each in module.named_parameters(recurse=False) if each.ndim == 3) == FUSED
        and all(getattr(module, key, None) == value for key, value in LAYOUT.items())
        and not getattr(module, "has_post_expert_norm", False)
    }


def _linear(weight: torch.Tensor) -> nn.Linear:
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    return layer
