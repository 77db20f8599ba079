"""The released search choice by choice: a slow reference, written from the definitions, without the package's code.

It never folds and never runs a block alone: every group of every block is seen in forward passes of the whole float
model, which is the same, because a fold leaves the function as it is and the search looks at unfolded blocks.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch

from mbq.methods import METHODS, SearchOptions
from mbq.scheme import scheme_named
from mbq.search import equalize_model
from mbq.sensitivity import measure
from tests.calibrated import calibrated
from tests.tiny import FAMILY_NAMES


def quantized_weight(weight, bits, group_size):
    """Asymmetric in groups of columns, or symmetric in rows where there is no group size."""
    if group_size is None:
        scale = (weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)).clamp(min=1e-5)
        return (weight / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale
    columns = []
    for start in range(0, weight.shape[1], group_size):
        values = weight[:, start : start + group_size]
        low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
        scale = ((high - low) / (2**bits - 1)).clamp(min=1e-5)
        zero = (-low / scale).round().clamp(0, 2**bits - 1)
        codes = ((values / scale).round() + zero).clamp(0, 2**bits - 1)
        columns.append((codes - zero) * scale)
    return torch.cat(columns, 1)


def quantized_activation(x, bits):
    scale = (x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)).clamp(min=1e-5)
    return (x / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale


class Reading(torch.nn.Module):
    """A linear whose input is divided by E and quantized."""

    def __init__(self, linear, vector, bits):
        super().__init__()
        self.linear, self.vector, self.bits = linear, vector, bits

    def forward(self, x):
        return self.linear(quantized_activation(x / self.vector, self.bits))


def first(output):
    return output[0] if isinstance(output, tuple) else output


def watch(binding, batch, block, group):
    """X, and arguments and output of the inspected module, in one forward pass of the model."""
    seen = {}
    linear = binding.blocks[block].get_submodule(group.linears[0])
    inspected = binding.blocks[block].get_submodule(group.inspect)

    def called(module, args, kwargs, output):
        seen.update(args=args, kwargs=kwargs, target=first(output))

    handles = [
        linear.register_forward_pre_hook(lambda module, args: seen.update(x=args[0])),
        inspected.register_forward_hook(called, with_kwargs=True),
    ]
    binding.model(**batch.inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def reference_ratios(gradients):
    """r of each block, at least the median over the blocks."""
    raw = [vision / language for vision, language in zip(*gradients, strict=True)]
    ordered, middle = sorted(raw), len(raw) // 2
    median = ordered[middle] if len(raw) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return [max(ratio, median) for ratio in raw]


def reference_loss(difference, answer, vision, ratio, norm):
    """difference [batch, token, channel]; masks [batch, token]; ratio None is plain equalization."""
    error = (difference.abs() if norm == "mae" else difference**2).mean(-1)
    if ratio is None:
        return error.mean().item()
    if norm == "mae":
        total = error[answer].sum() + ratio * error[vision].sum()
        return (total / (answer.sum() + vision.sum())).item()
    return (error[answer].mean() + ratio * error[vision].mean()).item()


def reference_group(binding, batch, block, group, ratio, norm, scheme):
    """The loss at every alpha, or None where rows and columns do not match."""
    linear = binding.blocks[block].get_submodule(group.linears[0])
    if binding.blocks[block].get_submodule(group.prev).weight.shape[0] != linear.weight.shape[1]:
        return None
    seen = watch(binding, batch, block, group)
    mean = seen["x"].abs().flatten(0, 1).mean(0)
    answer, vision = batch.labels != -100, batch.vision
    losses = []
    for step in range(20):
        vector = (mean ** (step / 20)).clamp(min=1e-4)
        vector = vector / math.sqrt(vector.max().item() * vector.min().item())
        changed = copy.deepcopy(binding.blocks[block])
        for path in group.linears:
            linear = changed.get_submodule(path)
            rounded = quantized_weight(linear.weight.data * vector, scheme.weights.bits, scheme.weights.group_size)
            if scheme.activations is None:
                linear.weight.data = rounded / vector
            else:
                linear.weight.data = rounded
                changed.set_submodule(path, Reading(linear, vector, scheme.activations.bits))
        output = first(changed.get_submodule(group.inspect)(*seen["args"], **seen["kwargs"]))
        losses.append(reference_loss(seen["target"] - output, answer, vision, ratio, norm))
    return losses


CASES = [
    (family, scheme, method, norm)
    for family in FAMILY_NAMES
    for scheme, method, norm in (
        ("W3A16", "awq", "mse"),
        ("W3A16", "awq", "mae"),
        ("W3A16", "mbq", "mae"),
        ("W3A16", "mbq", "mse"),
        ("W4A8", "awq", "mae"),
        ("W4A8", "awq", "mse"),
        ("W4A8", "mbq", "mae"),
        ("W4A8", "mbq", "mse"),
    )
]


@pytest.mark.parametrize(("family", "scheme", "method", "norm"), CASES)
def test_the_same_alpha_for_every_group(family, scheme, method, norm):
    check(family, scheme, method, norm, hidden=64)


@pytest.mark.parametrize("family", ["llava_onevision", "internvl"])
def test_the_same_alpha_without_grouped_query_attention(family):
    check(family, "W3A16", "mbq", "mae", hidden=64, kv_heads=2)


@torch.no_grad()
def check(family, scheme_name, method, norm, **overrides):
    binding, (batch,) = calibrated(family, batch_size=4, **{"kv_heads": 1, **overrides})
    scheme = scheme_named(scheme_name, 32 if scheme_name.endswith("A16") else None)
    sensitivity = measure(binding, [batch], parity=True)
    found = {}
    for part in ("attn", "mlp"):
        found[part] = reference_ratios((sensitivity.vision[part], sensitivity.language[part]))
    expected = {
        (block, group.name): reference_group(
            binding, batch, block, group, found[group.part][block] if method == "mbq" else None, norm, scheme
        )
        for block in range(len(binding.blocks))
        for group in binding.architecture.groups
    }
    options = SearchOptions(norm=norm, parity=True)
    rows = equalize_model(binding, [batch], METHODS[method], scheme, options, sensitivity=sensitivity)

    assert [(row.block, row.group) for row in rows] == list(expected)
    for row in rows:
        losses = expected[row.block, row.group]
        if losses is None:
            assert row.alpha is None
            assert "gqa_fold" in row.skipped
            assert row.group == "o"
        else:
            assert row.losses == pytest.approx(losses, rel=1e-3)
            assert row.alpha == losses.index(min(losses)) / 20
    skipped = sum(row.alpha is None for row in rows)
    assert skipped == (0 if overrides.get("kv_heads") == 2 else len(binding.blocks))
    assert len({row.alpha for row in rows}) > 1  # the searches have something to choose
