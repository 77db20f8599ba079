"""A model card's front matter: what the Hub lists, filters and links a model by."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData, metadata_load

from mbq.errors import MBQError
from mbq.hub import LICENSES, NAME
from mbq.loading import model_folder

# What a float model's card says that holds for what is made of it, too; a license can be a list on old cards only.
INHERITED = ("language", "license", "license_name", "license_link", "datasets")
LARGEST_CARD = 2**20


def front_matter(
    base_model: str, inherited: dict[str, Any], *, library: str, tags: Sequence[str], relation: str | None = None
) -> str:
    """The YAML between a card's dashes, with a line break at its end.

    base_model  "owner/model", perhaps "@revision"; a folder's name, which means nothing on the Hub, is left out
    inherited   what ``inherited_fields`` found
    relation    of the model to its base, one of the Hub's words, such as "quantized"
    """
    repository, address = on_the_hub(base_model)
    data = ModelCardData(
        **inherited,
        base_model=repository if address else None,
        base_model_relation=relation if address else None,
        library_name=library,
        pipeline_tag="image-text-to-text",
        tags=list(tags),
    )
    return data.to_yaml() + "\n"


def on_the_hub(base_model: str) -> tuple[str, str | None]:
    """The repository of "owner/model" or "owner/model@revision", and its address; a folder's name has none."""
    if "/" not in base_model:
        return base_model, None
    repository, _, revision = base_model.partition("@")
    return repository, f"https://huggingface.co/{repository}" + (f"/tree/{revision}" if revision else "")


def base_name(name: str) -> str:
    """How a card and a recipe call the float model: its hub id, or the last part of a folder's path.

    A folder of the Hub's cache has the id, and the commit as its revision.
    """
    if not os.path.isdir(name) and re.fullmatch(NAME, name):
        return name
    parts = Path(os.path.abspath(name)).parts
    if len(parts) > 3 and parts[-2] == "snapshots" and parts[-3].count("--") == 2:
        return f"{'/'.join(parts[-3].split('--')[1:])}@{parts[-1]}"
    return parts[-1]


def files_of(name: str) -> Path | None:
    """The folder of the float model ``name``, on this disk or from the Hub; None where it has none."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return model_folder(name, weights=False)
    except MBQError:  # a model that was given loaded has a name, and perhaps no files
        return None


def inherited_fields(name: str) -> dict[str, Any]:
    """The fields of the float model's own card that its quantized model's card repeats; {} where it has no card.

    The card is a stranger's: what is no short text is left out. A link to a file becomes one to the Hub's file, or
    stays where the file is copied.
    """
    folder = files_of(name)
    card = None if folder is None else folder / "README.md"
    if folder is None or card is None or not card.is_file() or card.stat().st_size > LARGEST_CARD:
        return {}
    try:
        stated = metadata_load(card) or {}
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    found = {field: stated[field] for field in INHERITED if _short(stated.get(field))}
    link = found.get("license_link")
    if isinstance(link, str) and not re.match(r"https?://", link):
        repository, address = on_the_hub(base_name(name))
        if address:
            revision = base_name(name).partition("@")[2] or "main"
            found["license_link"] = f"https://huggingface.co/{repository}/blob/{revision}/{link}"
        elif not any(file.name == link for file in license_files(folder)):
            del found["license_link"]
    return found


def license_files(folder: Path) -> list[Path]:
    """The texts that a license wants passed on with the model."""
    found = {file for pattern in LICENSES for file in folder.glob(pattern)}
    return sorted(file for file in found if file.is_file() and file.stat().st_size <= LARGEST_CARD)


def _short(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and len(value) <= 200 and all(isinstance(each, str) and len(each) <= 200 for each in value)
    return isinstance(value, str) and 0 < len(value) <= 200
