"""Every option of a quantization, in one frozen dataclass that becomes recipe.yaml."""

from __future__ import annotations

import math
import platform
import re
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from mbq.errors import MBQError
from mbq.scheme import Scheme, scheme_named

PACKAGES = ("mbq", "torch", "torchvision", "transformers", "compressed-tensors", "safetensors", "tokenizers")


def _one_of(default: str | None, *choices: str | None) -> Any:
    return field(default=default, metadata={"choices": choices})


def _at_least(least: int, default: int) -> Any:
    return field(default=default, metadata={"least": least})


@dataclass(frozen=True)
class Recipe:
    """What is done to a model. The command line's options are these fields, with dashes.

    scheme                   a name in SCHEMES
    method                   a name in METHODS
    data, images             the calibration rows, and the folder that their image paths are relative to
    num_calibration_samples  rows drawn from the data
    max_seq_length           tokens of a sample; a longer one is cut off at its end
    batch_size               samples that go through the model at once
    seed                     of the draw
    group_size               input channels that share a scale, in place of the scheme's 128 (weight-only schemes)
    ignore                   linears that stay 16-bit: full names, or regular expressions after "re:"
    formatting               how samples become sequences (the paper's section on calibration data)
    text                     the plain text that "interleaved" puts between two samples
    norm                     of the search's loss, whatever the method: "mae", or "mse" (which AWQ's own paper takes)
    objective                of the method "mbq": the released one, or the paper's eq. 14-17
    floor                    the least vision-to-language ratio of the method "mbq"; None is the median over blocks
    vision_weight            weight of a vision token for the method "fixed"; an answer token has 1
    smooth_alpha             SmoothQuant's alpha: how much of the activations' range goes into the weights
    gqa_fold                 fold o_proj's vector into v_proj under grouped-query attention too
    distorted_input          the search sees the quantized blocks' output, not the float model's
    parity                   reproduce the released search choice by choice
    search_tokens            on which all candidates are compared; the best of them again on more (successive halving).
                             0 compares all candidates on all tokens, as parity does
    vision_tower             scheme of the vision tower, or None to keep it in 16 bits
    max_shard_size           of a safetensors file: a number and KB, MB, GB or TB
    device, dtype            of the float model; "auto" is the GPU if there is one, and the folder's dtype
    offload                  "blocks" keeps all decoder blocks but one in the CPU's memory, "none" puts the whole model
                             on the device; "auto" decides by what is free there
    activations              where those are stored that a block needs again: on the "device", in the memory of the
                             "cpu" or on "disk"; "auto" is the first of them that has room
    offload_folder           where on disk; None is beside the output, or the system's folder for temporary files
    trust_remote_code        run the Python files of the model's folder

    Raises MBQError for a value that no option has.
    """

    scheme: str = "W3A16"
    method: str = "mbq"
    data: str | None = None
    images: str | None = None
    num_calibration_samples: int = _at_least(1, 128)
    max_seq_length: int = _at_least(1, 2048)
    batch_size: int = _at_least(1, 1)
    seed: int = _at_least(0, 0)
    group_size: int | None = None
    ignore: tuple[str, ...] = ()
    formatting: str = _one_of("plain", "plain", "few-shot", "interleaved")
    text: str | None = None
    norm: str = _one_of("mae", "mae", "mse")
    objective: str = _one_of("released", "released", "paper")
    floor: float | None = None
    vision_weight: float = 0.1
    smooth_alpha: float = 0.5
    gqa_fold: bool = False
    distorted_input: bool = False
    parity: bool = False
    search_tokens: int = _at_least(0, 512)
    vision_tower: str | None = _one_of(None, None, "W8A8", "W4A8")
    max_shard_size: str = "5GB"
    device: str = "auto"
    dtype: str = _one_of("auto", "auto", "bfloat16", "float16", "float32")
    offload: str = _one_of("auto", "auto", "blocks", "none")
    activations: str = _one_of("auto", "auto", "device", "cpu", "disk")
    offload_folder: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for option in fields(self):
            _check(option.name, getattr(self, option.name), option.metadata)
        if not re.fullmatch(r"(?=.*[1-9])\d+(\.\d+)?[KMGT]B", self.max_shard_size):
            raise MBQError(f"--max-shard-size is {self.max_shard_size!r}; give a size such as 5GB or 500MB.")
        if not 0 <= self.vision_weight < math.inf:
            raise MBQError(f"--vision-weight is {self.vision_weight}; give a number from 0 up, such as 0.1.")
        if self.floor is not None and not 0 <= self.floor < math.inf:
            raise MBQError(f"--floor is {self.floor}; give a number from 0 up, or leave it out for the median.")
        if not 0 <= self.smooth_alpha <= 1:
            raise MBQError(f"--smooth-alpha is {self.smooth_alpha}; give a number from 0 to 1, such as 0.5.")
        if self.parity and self.gqa_fold:
            raise MBQError("--parity reproduces a search without the v to o fold; leave --gqa-fold out.")
        if self.formatting == "interleaved" and self.text is None:
            raise MBQError("--formatting interleaved puts plain text between samples; give a file with --text.")
        _ = self.numbers  # an unknown scheme or an impossible group size

    @classmethod
    def of(cls, **options: Any) -> Recipe:
        """The recipe with these options. Raises MBQError for a name that no option has."""
        known = {option.name for option in fields(cls)}
        for name in options:
            if name not in known:
                raise MBQError(f"Unknown option {name!r}; choose from {', '.join(sorted(known))}.")
        if isinstance(options.get("ignore"), str):
            options["ignore"] = (options["ignore"],)
        if "ignore" in options:
            options["ignore"] = tuple(options["ignore"])
        for name in ("data", "images", "text", "offload_folder"):
            if options.get(name) is not None:
                options[name] = str(options[name])
        return cls(**options)

    @property
    def numbers(self) -> Scheme:
        """The scheme with this recipe's group size."""
        return scheme_named(self.scheme, self.group_size)

    @property
    def needs_data(self) -> bool:
        """Whether anything is measured on samples: only rounding to nearest needs none."""
        return self.method != "rtn" or self.vision_tower is not None


def _check(name: str, value: Any, rule: Any) -> None:
    option = "--" + name.replace("_", "-")
    if "choices" in rule and value not in rule["choices"]:
        choices = ", ".join(choice for choice in rule["choices"] if choice is not None)
        raise MBQError(f"{option} is {value!r}; choose one of {choices}.")
    if "least" in rule and (not isinstance(value, int) or value < rule["least"]):
        raise MBQError(f"{option} is {value!r}; give a whole number from {rule['least']} up.")


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def recipe_yaml(recipe: Recipe, base_model: str, data_hash: str | None) -> str:
    """recipe.yaml: every option, the model's name, a hash of the data and package versions.

    Folders are the machine's own business: of a path, only the last part is written.
    """
    options = asdict(recipe) | {"ignore": list(recipe.ignore), "group_size": recipe.numbers.weights.group_size}
    options |= {name: _last_part(options[name]) for name in ("data", "images", "text", "offload_folder")}
    content = {"model": base_model, **options, "data_sha256": data_hash, "versions": package_versions()}
    return yaml.safe_dump(content, sort_keys=False)


def _last_part(path: str | None) -> str | None:
    return Path(path).name if path else path
