"""The vision tower as a target: SmoothQuant at the two norms of each of its blocks (MBQ, arXiv 2412.19509, table 6).

What is quantized are the linears inside the tower's blocks. Patch embedding, merger and projector stay 16-bit.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mbq.architecture import Binding, LinearGroup, matches, vision_blocks
from mbq.blocks import evaluating, forward, hooked
from mbq.calibration import CalibrationBatch
from mbq.equalization import check_norm, fold, smoothquant_vector
from mbq.errors import MBQError


def tower_linears(binding: Binding, ignore: Sequence[str] = ()) -> list[str]:
    """Full paths of the linears inside the blocks of the vision tower, without those that ``ignore`` names.

    Raises MBQError for a tower whose blocks are none of those in families.py.
    """
    path, _ = _tower_blocks(binding)
    inside = [name for name in binding.kept if name.startswith(f"{path}.")]
    return [name for name in inside if not any(matches(name, pattern) for pattern in ignore)]


def tower_pattern(binding: Binding) -> str:
    """The linears of the tower's blocks as a compressed-tensors target: module names and checkpoint names match.

    Checkpoints put other modules before and after the tower's name ("vision_tower.vision_model.encoder.layers.0").
    """
    tower = binding.architecture.vision_tower.rpartition(".")[2]
    blocks = _tower_blocks(binding)[0].rpartition(".")[2]
    return rf"re:.*{re.escape(tower)}\.(.*\.)?{re.escape(blocks)}\.\d+\..*"


def tower_ignore(binding: Binding, ignore: Sequence[str] = ()) -> list[str]:
    """``binding.ignore(ignore)`` for a folder whose tower is quantized: its own patterns spare the tower's blocks."""
    spare = tower_pattern(binding).removeprefix("re:")
    kept = binding.architecture.kept
    return [
        f"re:(?!{spare}){pattern.removeprefix('re:')}" if pattern in kept and pattern.startswith("re:") else pattern
        for pattern in binding.ignore(ignore)
    ]


@torch.no_grad()
def smooth_vision_tower(
    binding: Binding, batches: Sequence[CalibrationBatch], ignore: Sequence[str] = (), alpha: float = 0.5
) -> list[str]:
    """Fold SmoothQuant's vectors into the tower, in place, and return the linears to quantize (``tower_linears``).

    E_j = max|X_j|^alpha / max|W_j|^(1 - alpha), X being what a norm gives to the linears behind it, over all images of
    ``batches`` (SmoothQuant, arXiv 2211.10438). The float function of the model stays. A group all of whose linears
    ``ignore`` names is left as it is.

    Raises MBQError where no batch has an image, and for a norm that nothing can be folded into.
    """
    names = tower_linears(binding, ignore)
    path, groups = _tower_blocks(binding)
    blocks = list(binding.model.get_submodule(path).children())
    largest = _largest_inputs(binding, batches, blocks, groups)
    for index, block in enumerate(blocks):
        for group in groups:
            if not any(f"{path}.{index}.{name}" in names for name in group.linears):
                continue
            norm = block.get_submodule(group.prev)
            check_norm(norm, f"{path}.{index}.{group.prev}")
            weights = [block.get_submodule(name).get_parameter("weight") for name in group.linears]
            vector = smoothquant_vector(largest[index, group.name], weights, alpha)
            fold(vector, torch.arange(len(vector)), list(norm.parameters(recurse=False)), weights)
    return names


def _tower_blocks(binding: Binding) -> tuple[str, tuple[LinearGroup, ...]]:
    found = [
        (path, groups)
        for path, groups in vision_blocks(binding.model, outside=binding.architecture.blocks)
        if path.startswith(f"{binding.architecture.vision_tower}.")
    ]
    if len(found) != 1:
        raise MBQError(
            f"The blocks of {type(binding.vision_tower).__name__} are none that --vision-tower knows; leave the option "
            "out, or add them to VISION_GROUPS in families.py."
        )
    return found[0]


class _Seen(Exception):
    """Ends a forward pass at the first decoder block: the tower has run by then."""


def _largest_inputs(
    binding: Binding,
    batches: Sequence[CalibrationBatch],
    blocks: Sequence[nn.Module],
    groups: Sequence[LinearGroup],
) -> dict[tuple[int, str], torch.Tensor]:
    """max|X| [channel] of each block and group, by block and the group's name."""
    largest: dict[tuple[int, str], torch.Tensor] = {}

    def read(key: tuple[int, str]) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            most = args[0].float().abs().flatten(0, -2).amax(0)
            largest[key] = torch.maximum(largest[key], most) if key in largest else most

        return hook

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        raise _Seen

    pictured = [batch for batch in batches if batch.vision.any() or "pixel_values" in batch.inputs]
    if not pictured:
        raise MBQError("--vision-tower calibrates on images, and the data has none; give rows with images.")
    with hooked() as hooks, evaluating(binding.model):
        for index, block in enumerate(blocks):
            for group in groups:
                linear = block.get_submodule(group.linears[0])
                hooks.append(linear.register_forward_pre_hook(read((index, group.name))))
        hooks.append(binding.blocks[0].register_forward_pre_hook(stop))
        for batch in pictured:
            try:
                forward(binding.model, batch)
            except _Seen:
                continue
    return largest
