"""What a folder must not do to those who open it, checked before transformers reads it.

A folder is taken for what a stranger wrote: its links, its index, its numbers, its code. Each check ends in one
sentence where it fails, reads no tensor, and takes time in proportion to the size of the small files.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import nn

from mbq import ranks
from mbq.errors import MBQError

INDEX = "model.safetensors.index.json"
AUDIO = "audio_tokenizer_config.json"  # transformers loads the model that it names, from wherever, pickles too
LARGEST_TEXT = 100 * 2**20  # tokenizers take up to 40 MB
# Reading a configuration makes lists as long as these numbers say, so they have bounds; models stay far below.
MOST = {re.compile(r"(layers?|depths?|blocks)$"): 1_000, re.compile(r"(labels|experts)$"): 100_000}
SPARE = 2**28  # buffers that a model makes itself: numbers beyond those that its files hold
_PACKED = {
    ".weight_packed": ("I32",),
    ".weight_zero_point": ("I32",),
    ".weight_shape": ("I64",),
    ".weight_scale": ("F16", "BF16", "F32"),
}

_told: set[tuple[str, str]] = set()


class Stored(NamedTuple):
    """What a safetensors header says of a tensor: its dtype ("BF16") and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numbers(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


def check_folder(folder: Path) -> None:
    """Raise MBQError for links that leave ``folder``, for what is neither a file nor a folder, and for huge texts.

    The Hub's cache keeps its files in models--NAME/blobs and links to them; these links stay.
    """
    inside = [folder.resolve()]
    if inside[0].parent.name == "snapshots":
        inside.append(inside[0].parent.parent / "blobs")
    for file in sorted([*folder.iterdir(), *_code(folder)]):
        real = file.resolve()
        if not any(real.is_relative_to(each) for each in inside):
            raise MBQError(f"{file} is a link out of its folder; put a copy of the file in its place.")
        if real.exists() and not (real.is_file() or real.is_dir()):
            raise MBQError(f"{file} is neither a file nor a folder; remove it.")
        if file.suffix in (".json", ".jinja", ".txt", ".py") and real.is_file() and real.stat().st_size > LARGEST_TEXT:
            raise MBQError(f"{file} has more than {LARGEST_TEXT >> 20} MiB, which no model needs; download it again.")
    if (folder / "adapter_config.json").exists():
        raise MBQError(f"{folder} holds an adapter; merge it into its model, and give that.")
    processor = folder / "processor_config.json"
    if (folder / AUDIO).exists() or (processor.exists() and "audio_tokenizer" in read_json(processor)):
        raise MBQError(f"The processor of {folder} loads another model for audio; remove that from its settings.")


def read_json(file: Path) -> dict[str, Any]:
    """The object in ``file``. Raises MBQError where it is no JSON, or no object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise MBQError(f"{file} is not JSON ({reason}); mend it or download the model again.") from error
    if not isinstance(content, dict):
        raise MBQError(f"{file} holds no JSON object; download the model again.")
    return content


def check_config(config: Mapping[str, Any], source: str | Path) -> None:
    """Raise MBQError for a config.json that claims absurd counts, names other weights files, or code on the Hub."""
    kinds = {"model_type": str, "architectures": list, "auto_map": dict, "quantization_config": dict}
    for key, kind in kinds.items():
        if not isinstance(config.get(key), kind | None):
            raise MBQError(f"config.json of {source} has {key} = {config[key]!r}, no {kind.__name__}; mend it.")
    for key, value in _items(config):
        for pattern, most in MOST.items():
            if isinstance(value, int | float) and value > most and pattern.search(key):
                raise MBQError(f"config.json of {source} claims {key} = {value}, and no model has more than {most}.")
        if key.endswith("_implementation") and isinstance(value, str) and "/" in value:
            raise MBQError(f"config.json of {source} asks for code from the Hub ({key} = {value!r}); remove the entry.")
        if key == "transformers_weights" and value is not None:
            raise MBQError(
                f"config.json of {source} names weights of its own ({value!r}); call them model.safetensors."
            )


def check_code(folder: Path, trusted: bool) -> None:
    """Print on stderr which Python files of ``folder`` may run, once; raise MBQError for references to other places.

    Nothing is done unless ``trusted``: then no code runs.
    """
    if not trusted:
        return
    for file in sorted(folder.glob("*config.json")):
        for reference in _references(read_json(file)):
            if "--" in reference:
                raise MBQError(
                    f"{file} runs code of another repository ({reference}); read it, copy its files into the model's "
                    "folder, and name them there."
                )
            if not re.fullmatch(r"[\w-]+(/[\w-]+)*\.\w+", reference):
                raise MBQError(
                    f"{file} names code outside its folder ({reference}); take the model from another place."
                )
    hashes = [(file, hashlib.sha256(file.read_bytes()).hexdigest()) for file in _code(folder)]
    key = (str(folder.resolve()), " ".join(digest for _, digest in hashes))
    if hashes and key not in _told and ranks.rank() == 0:
        _told.add(key)
        print(f"mbq: --trust-remote-code lets these files of {folder} run:", file=sys.stderr)
        for file, digest in hashes:
            print(f"  {file.relative_to(folder)}  {file.stat().st_size} bytes  sha256 {digest}", file=sys.stderr)


def weight_files(folder: Path) -> list[str]:
    """Names of the model's safetensors files. Raises MBQError for an index that is damaged or leads elsewhere."""
    index = folder / INDEX
    if not index.is_file():
        return ["model.safetensors"]
    names = sorted(set(_weight_map(index).values()))
    if "model.safetensors" not in names and (folder / "model.safetensors").exists():  # which transformers would take
        raise MBQError(f"{folder} holds model.safetensors and an index of other files; remove one of them.")
    return names


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of the model's safetensors files, from their headers.

    Raises MBQError where a file is missing, cut off or damaged (its tensors overlap, or leave gaps), where there are
    only pickles, and where files and index do not agree.
    """
    found: dict[str, Stored] = {}
    places: dict[str, str] = {}
    for name in weight_files(folder):
        if not (folder / name).is_file():
            raise _missing(folder, name)
        tensors = _header(folder / name)
        twice = sorted(found.keys() & tensors.keys())
        if twice:
            raise MBQError(f"{folder} holds {twice[0]} twice, in {places[twice[0]]} and {name}; download it again.")
        found.update(tensors)
        places.update(dict.fromkeys(tensors, name))
    index = folder / INDEX
    for tensor, name in (_weight_map(index) if index.is_file() else {}).items():
        if places.get(tensor) != name:
            raise MBQError(f"{index} says that {tensor} is in {name}, where it is not; download the model again.")
    return found


def check_packed(tensors: Mapping[str, Stored], folder: Path) -> None:
    """Raise MBQError for tensors of a quantized layer that are of another dtype than the format's.

    Packed words hold codes and zero points of so many bits and no others. Numbers of another dtype may be out of range,
    or NaN, and loading would cast them.
    """
    for name, tensor in tensors.items():
        stem, dot, kind = name.rpartition(".")
        wanted = _PACKED.get(dot + kind)
        if kind == "weight" and f"{stem}.weight_scale" in tensors:
            wanted = ("I8",)
        if wanted is not None and tensor.dtype not in wanted:
            raise MBQError(f"{folder} is damaged: {name} is {tensor.dtype}, not {' or '.join(wanted)}; copy it anew.")


def check_size(model: nn.Module, tensors: Mapping[str, Stored], source: str | Path) -> None:
    """Raise MBQError where ``model``, which may be on the meta device, has many more numbers than its files hold."""
    unique = {id(tensor): tensor.numel() for tensor in [*model.parameters(), *model.buffers()]}
    needed, held = sum(unique.values()), sum(tensor.numbers for tensor in tensors.values())
    if needed > held + SPARE:
        raise MBQError(
            f"config.json of {source} describes a model of {needed:.3g} numbers, but its files hold {held:.3g}; "
            "download it again."
        )


def _header(file: Path) -> dict[str, Stored]:
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
            return {name: Stored(each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}
    except (SafetensorError, OSError) as error:
        raise MBQError(f"{file} is damaged ({error}); download the model again.") from error


def _missing(folder: Path, name: str) -> MBQError:
    if (folder / INDEX).is_file():
        return MBQError(f"{folder} lacks the weights file {name}; download the model again.")
    pickles = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(kind))
    if pickles:
        return MBQError(
            f"{folder} holds no weights (*.safetensors) but {pickles[0]}, a pickle, which can run code and is never "
            "loaded; give weights in safetensors."
        )
    return MBQError(f"{folder} holds no weights ({name}); download the model again, or convert its weights.")


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise MBQError(f"{index} is damaged (it has no weight_map); download the model again.")
    for name in found.values():
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
            raise MBQError(f"{index} names {name!r}, which is no safetensors file beside it; download the model again.")
    return found


def _code(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*.py") if not any(p[0] == "." for p in file.relative_to(folder).parts))


def _items(config: Any) -> Iterator[tuple[str, Any]]:
    """All that a nested config holds, each value under the key that is nearest to it; without recursion."""
    waiting = [("", config)]
    while waiting:
        key, value = waiting.pop()
        yield key, value
        if isinstance(value, Mapping):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += [(key, each) for each in value]


def _references(config: Any) -> Iterator[str]:
    """Classes that an ``auto_map`` anywhere in a nested config names."""
    for key, value in _items(config):
        if key == "auto_map":
            yield from (text for _, text in _items(value) if isinstance(text, str))
