"""What a written folder holds besides weights: everything to load it, to judge it and to make it again."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mbq.architecture import Binding
from mbq.checkpoint.compressed_tensors import (
    checkpoint_bytes,
    loading_note,
    quantization_config,
    save_model,
    serving_note,
)
from mbq.checkpoint.folder import new_folder
from mbq.checkpoint.single_experts import single_experts_note
from mbq.errors import MBQError
from mbq.experts import has_experts
from mbq.importance import Importance
from mbq.loading import model_folder
from mbq.model_card import model_card
from mbq.recipe import Recipe, recipe_yaml
from mbq.scheme import SCHEMES, Scheme
from mbq.search import GroupSearch
from mbq.sensitivity import Sensitivity
from mbq.vision_tower import tower_ignore, tower_pattern


@dataclass(frozen=True)
class Measured:
    """What the run found out, for the files beside the weights.

    data_hash       SHA-256 of the rows that were drawn and of their pictures, or None without data
    bytes_before    of the float model's tensors
    bytes_after     of what it has become
    importance      of input channels, by linear, where the product asks for it
    measurements    measurements.json
    """

    data_hash: str | None
    sensitivity: Sensitivity | None
    search: list[GroupSearch]
    bytes_before: int
    bytes_after: int
    importance: Importance | None = None
    measurements: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Product:
    """What a run makes of the model that it has equalized.

    name    of the product; a run does not go on with the blocks of another's
    packs   whether the linears that the search quantizes become packed ones, or stay float with the vectors folded in
    size    (binding, processor, recipe) -> bytes of the tensors that are written; MBQError, before the search, for a
            model that it cannot be made of
    write   (output, binding, processor, recipe, name of the float model, what was found) -> the folder; MBQError
    measures  the importance of input channels as well
    """

    name: str
    packs: bool
    size: Callable[[Binding, Any, Recipe], int]
    write: Callable[[Path, Binding, Any, Recipe, str, Measured], Path]
    measures: bool = False


def write_folder(
    output: Path, binding: Binding, processor: Any, recipe: Recipe, name: str, found: Measured, report: bool = True
) -> Path:
    """Write the folder, whole or not at all: weights, configs, tokenizer, processor, recipe, measurements, card.

    ``name`` is the folder or hub id of the float model; ``report`` adds report.html. Raises MBQError as ``new_folder``
    does.
    """
    model: Any = binding.model
    base_model = base_name(name)
    ignore, others = ignored(binding, recipe)
    with new_folder(output, needs=found.bytes_after) as folder:
        save_model(model, folder, quantization_config(recipe.numbers, ignore, others), recipe.max_shard_size)
        write_processor(folder, processor, recipe, name)
        text = write_records(folder, recipe, base_model, found)
        write_json(folder / "measurements.json", found.measurements)
        if report:
            _write_report(folder, output.name)
        card = model_card(
            recipe,
            text,
            base_model=base_model,
            folder_name=output.name,
            loading_note=_other_readers(model, recipe.numbers, others),
            kept=tuple(ignore),
            files=tuple(file.name for file in sorted(folder.iterdir())),
            megabytes=(found.bytes_before / 1e6, sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 1e6),
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    return output


def _other_readers(model: Any, scheme: Scheme, others: Mapping[str, Scheme]) -> str:
    """Markdown for the card: what transformers alone and vLLM make of the folder."""
    if has_experts(model):
        return single_experts_note(model.config.model_type, scheme)
    return f"{loading_note(scheme, others)}\n\n{serving_note(scheme)}"


def _quantized_bytes(binding: Binding, processor: Any, recipe: Recipe) -> int:
    return checkpoint_bytes(binding.model, quantization_config(recipe.numbers, *ignored(binding, recipe)))


QUANTIZED = Product("quantized", packs=True, size=_quantized_bytes, write=write_folder)


def base_name(name: str) -> str:
    """How a card and a recipe call the float model: a folder by its last part, else the hub id."""
    return Path(name).name if Path(name).is_dir() else name


def write_processor(folder: Path, processor: Any, recipe: Recipe, name: str) -> None:
    """Tokenizer, image processor and chat template, and the code that the float model's folder ``name`` brings."""
    processor.save_pretrained(folder)
    _copy_code(name, folder, recipe.trust_remote_code)


def write_records(folder: Path, recipe: Recipe, base_model: str, found: Measured) -> str:
    """recipe.yaml, whose text it returns, sensitivity.json and search.json."""
    text = recipe_yaml(recipe, base_model, found.data_hash)
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    if found.sensitivity is not None:
        write_json(folder / "sensitivity.json", found.sensitivity.to_json())
    if found.search:
        write_json(folder / "search.json", [row.to_json() for row in found.search])
    return text


def _write_report(folder: Path, name: str) -> None:
    """report.html, on what the folder holds by now. ``name`` is what the folder will have."""
    from mbq.report import write
    from mbq.report.page import page
    from mbq.report.subjects import read_subject

    write(page([read_subject(folder, name)]), folder / "report.html")


def ignored(binding: Binding, recipe: Recipe) -> tuple[list[str], dict[str, Scheme]]:
    """What ``quantization_config`` says beside the scheme: what stays in 16 bits, and what has a scheme of its own."""
    if recipe.vision_tower is None:
        return binding.ignore(recipe.ignore), {}
    return tower_ignore(binding, recipe.ignore), {tower_pattern(binding): SCHEMES[recipe.vision_tower]}


def _copy_code(name: str, folder: Path, trusted: bool) -> None:
    """Remote code travels with the model; what transformers copied already stays."""
    source = Path(name)
    if trusted and not source.is_dir():
        with suppress(MBQError):  # a model that was given loaded has a name, and perhaps no files
            source = model_folder(name, weights=False)
    for file in sorted(source.glob("*.py")) if source.is_dir() else ():
        if not (folder / file.name).exists():
            shutil.copy(file, folder / file.name)


def write_json(path: Path, content: Any) -> None:
    """A list gets an item a line, so that people and diff can read it. NaN and infinity, which JSON lacks, are null."""
    content = _finite(content)
    if isinstance(content, list):
        text = "[\n" + ",\n".join(json.dumps(item) for item in content) + "\n]\n"
    else:
        text = json.dumps(content, indent=2) + "\n"
    path.write_text(text, encoding="utf-8")


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
