"""What a written folder holds besides weights: everything to load it, to judge it and to make it again."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
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
from mbq.checkpoint.single_experts import transformers_note, vllm_note
from mbq.experts import has_experts
from mbq.front_matter import base_name, files_of, inherited_fields, license_files
from mbq.importance import Importance
from mbq.model_card import model_card, with_plain_call, with_serve_command
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
        transformers, vllm = _engine_sections(model, recipe, others, output.name)
        card = model_card(
            recipe,
            text,
            base_model=base_model,
            inherited=inherited_fields(name),
            folder_name=output.name,
            transformers=transformers,
            vllm=vllm,
            kept=tuple(ignore),
            files=(*(file.name for file in sorted(folder.iterdir())), *(["report.html"] if report else [])),
            megabytes=(found.bytes_before / 1e6, sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 1e6),
            balanced=found.sensitivity is None or found.sensitivity.vision is not None,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        if report:
            _write_report(folder, output.name)
    return output


def _engine_sections(model: Any, recipe: Recipe, others: Mapping[str, Scheme], folder_name: str) -> tuple[str, str]:
    """Markdown for the card: what transformers alone and vLLM make of the folder."""
    scheme = recipe.numbers
    if has_experts(model):
        return transformers_note(model.config.model_type, scheme), vllm_note(scheme)
    return (
        with_plain_call(recipe, folder_name, loading_note(scheme, others)),
        with_serve_command(recipe, folder_name, serving_note(scheme)),
    )


def _quantized_bytes(binding: Binding, processor: Any, recipe: Recipe) -> int:
    return checkpoint_bytes(binding.model, quantization_config(recipe.numbers, *ignored(binding, recipe)))


QUANTIZED = Product("quantized", packs=True, size=_quantized_bytes, write=write_folder)


def write_processor(folder: Path, processor: Any, recipe: Recipe, name: str) -> None:
    """Tokenizer, image processor, chat template, and what goes with every copy of the float model: code, licenses."""
    processor.save_pretrained(folder)
    source = files_of(name)
    if source is not None and (recipe.trust_remote_code or Path(name).is_dir()):
        _copy(sorted(source.glob("*.py")), folder)
    write_licenses(folder, name)


def write_licenses(folder: Path, name: str) -> None:
    """The texts of the float model's license."""
    source = files_of(name)
    _copy([] if source is None else license_files(source), folder)


def _copy(files: Iterable[Path], folder: Path) -> None:
    for file in files:
        if not (folder / file.name).exists():  # what transformers wrote already stays
            shutil.copy(file, folder / file.name)


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
