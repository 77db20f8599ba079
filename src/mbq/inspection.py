"""What a quantization would do to a model, from its configuration alone: no weight is read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import nn

from mbq.architecture import bind
from mbq.checkpoint.compressed_tensors import checkpoint_bytes, quantization_config
from mbq.cost import Cost, cost_of, speed
from mbq.errors import MBQError
from mbq.experts import merged_bytes
from mbq.loading import auto_class, read_config, torch_device, torch_dtype, without_weights
from mbq.output import ignored
from mbq.pipeline import target_schemes
from mbq.placement import Plan, gigabytes, make_plan
from mbq.recipe import Recipe
from mbq.room import room, storing_folder


@dataclass(frozen=True)
class Inspection:
    """Counted in a model that has shapes and no weights.

    quantized      (scheme, [outputs, inputs]) -> how many linears
    kept           the same of the linears that stay in 16 bits
    cost           bytes and operations, every sample at its full length
    plan           where everything would be on this machine, or the sentence why it does not fit
    """

    quantized: Counter[tuple[str, tuple[int, int]]]
    kept: Counter[tuple[int, int]]
    cost: Cost
    plan: Plan | str


def inspect(model: str | Path, **options: Any) -> Inspection:
    """``options`` are those of ``quantize``. Raises MBQError as it does, as far as a configuration shows."""
    recipe = Recipe.of(**options)
    binding = bind(_shapes(model, recipe))
    targets = target_schemes(binding, recipe)
    linears = {name: each for name, each in binding.model.named_modules() if isinstance(each, nn.Linear)}
    shapes = {name: (each.out_features, each.in_features) for name, each in linears.items()}
    ignore, others = ignored(binding, recipe)
    packed = checkpoint_bytes(binding.model, quantization_config(recipe.numbers, ignore, others))
    cost = cost_of(binding, _full_lengths(recipe), recipe, packed)
    return Inspection(
        quantized=Counter((scheme.name, shapes[name]) for name, scheme in targets.items()),
        kept=Counter(shapes[name] for name in linears if name not in targets),
        cost=cost,
        plan=_plan_here(cost, recipe, next(binding.blocks.parameters()).dtype, merged_bytes(binding.model)),
    )


def _full_lengths(recipe: Recipe) -> list[tuple[int, int]]:
    samples, each = recipe.num_calibration_samples, recipe.batch_size
    return [(min(each, samples - first), recipe.max_seq_length) for first in range(0, samples, each)]


def _plan_here(cost: Cost, recipe: Recipe, dtype: torch.dtype, loaded: int) -> Plan | str:
    """``loaded`` are bytes that the model takes of the CPU's memory, where other weights are mapped files."""
    device = torch_device(recipe.device)
    free = room(device, storing_folder(recipe.offload_folder, Path.cwd() / "output"))
    free = replace(free, cpu=max(0, free.cpu - loaded))
    try:
        return make_plan(
            cost,
            free,
            device,
            offload=recipe.offload,
            activations=recipe.activations,
            samples=recipe.num_calibration_samples,
            speed=speed(device, dtype) if cost.search else None,
        )
    except MBQError as error:
        return str(error)


def _shapes(model: str | Path, recipe: Recipe) -> Any:
    """The model without weights. Raises MBQError where its code does not make one from a configuration."""
    config = read_config(model)
    if config.get("quantization_config") is not None:
        raise MBQError(f"{model} is quantized already; give the float model that it was made from.")
    made = auto_class(model, config, recipe.trust_remote_code)
    return without_weights(model, made, torch_dtype(recipe.dtype), recipe.trust_remote_code)


def inspection_table(found: Inspection) -> Table:
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("linears", "outputs x inputs", "scheme"):
        made.add_column(name, justify="right" if name == "linears" else "left")
    for (scheme, (outputs, inputs)), count in found.quantized.items():
        made.add_row(str(count), f"{outputs} x {inputs}", scheme)
    for (outputs, inputs), count in found.kept.items():
        made.add_row(str(count), f"{outputs} x {inputs}", "kept")
    return made


def inspection_lines(found: Inspection) -> str:
    """Sizes and memory, a sentence a line."""
    cost = found.cost
    before, after, apart, working = (gigabytes(each) for each in (cost.weights, cost.packed, cost.apart, cost.working))
    return (
        f"{before} become {after} on disk.\n"
        f"On the device: {before}, or {apart} with --offload blocks; beside it, up to {working} for one step.\n"
        "On this machine, with every sample at its full length:\n"
        f"{found.plan}"
    )
