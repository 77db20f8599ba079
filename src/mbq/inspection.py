"""What a quantization would do to a model, from its configuration alone: no weight is read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import nn
from transformers import AutoConfig

from mbq.architecture import bind
from mbq.checkpoint.compressed_tensors import checkpoint_bytes, quantization_config
from mbq.errors import MBQError
from mbq.loading import auto_class, read_config, torch_dtype
from mbq.output import ignored
from mbq.pipeline import target_schemes
from mbq.placement import weight_bytes
from mbq.recipe import Recipe


@dataclass(frozen=True)
class Inspection:
    """Counted in a model that has shapes and no weights.

    quantized      (scheme, [outputs, inputs]) -> how many linears
    kept           the same of the linears that stay in 16 bits
    bytes_before   of all tensors
    bytes_after    of the quantized checkpoint's
    bytes_apart    of what ``--offload blocks`` keeps on the device: all but the blocks, and the largest block
    bytes_inputs   of the inputs of all blocks for all samples, at their full length: what the sensitivity stores
    """

    quantized: Counter[tuple[str, tuple[int, int]]]
    kept: Counter[tuple[int, int]]
    bytes_before: int
    bytes_after: int
    bytes_apart: int
    bytes_inputs: int


def inspect(model: str | Path, **options: Any) -> Inspection:
    """``options`` are those of ``quantize``. Raises MBQError as it does, as far as a configuration shows."""
    recipe = Recipe.of(**options)
    binding = bind(_shapes(model, recipe))
    targets = target_schemes(binding, recipe)
    linears = {name: each for name, each in binding.model.named_modules() if isinstance(each, nn.Linear)}
    shapes = {name: (each.out_features, each.in_features) for name, each in linears.items()}
    ignore, others = ignored(binding, recipe)
    before = weight_bytes(binding.model)
    blocks = [weight_bytes(block) for block in binding.blocks]
    tokens = recipe.num_calibration_samples * recipe.max_seq_length
    config: Any = binding.model.config
    hidden = (getattr(config, "llm_config", None) or config.get_text_config()).hidden_size
    state = hidden * next(binding.blocks.parameters()).itemsize
    return Inspection(
        quantized=Counter((scheme.name, shapes[name]) for name, scheme in targets.items()),
        kept=Counter(shapes[name] for name in linears if name not in targets),
        bytes_before=before,
        bytes_after=checkpoint_bytes(binding.model, quantization_config(recipe.numbers, ignore, others)),
        bytes_apart=before - sum(blocks) + max(blocks),
        bytes_inputs=tokens * state * len(blocks),
    )


def _shapes(model: str | Path, recipe: Recipe) -> Any:
    """The model without weights. Raises MBQError where its code does not make one from a configuration."""
    config = read_config(model)
    if "quantization_config" in config:
        raise MBQError(f"{model} is quantized already; give the float model that it was made from.")
    made, trust = auto_class(model, config, recipe.trust_remote_code), recipe.trust_remote_code
    full = AutoConfig.from_pretrained(model, trust_remote_code=trust)
    wanted = torch_dtype(recipe.dtype)
    dtype = (full.dtype or torch.float32) if wanted == "auto" else wanted
    try:
        with torch.device("meta"):
            return made.from_config(full, trust_remote_code=trust, dtype=dtype)
    except (RuntimeError, NotImplementedError, AttributeError, TypeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MBQError(
            f"The code of {model} makes no model without weights ({first}); it cannot be inspected."
        ) from error


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
    before, after, apart, inputs = (
        _gigabytes(each) for each in (found.bytes_before, found.bytes_after, found.bytes_apart, found.bytes_inputs)
    )
    return (
        f"{before} become {after} on disk.\n"
        f"On the device: {before}, or {apart} with --offload blocks; beside it, what one block's search works with.\n"
        f"Where modalities are weighed, the inputs of all blocks are kept: up to {inputs}, with samples of full length."
    )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e7 else f"{count / 1e6:,.2f} MB"
