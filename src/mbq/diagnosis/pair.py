"""The two models that are compared: how they are loaded, and where they are while they run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import yaml
from torch import nn

import mbq
from mbq.architecture import Binding, bind
from mbq.blocks import device_of, streamed
from mbq.cost import weight_bytes
from mbq.errors import MBQError
from mbq.loading import load_model, load_processor, model_folder, read_config, torch_device
from mbq.placement import WEIGHTS_SHARE, Plan, place
from mbq.qlinear import QuantLinear
from mbq.room import device_free
from mbq.scheme import Scheme


@dataclass(frozen=True)
class Loading:
    """How folders are loaded.

    device, dtype  as ``mbq.load`` takes them; "auto" is a GPU where there is one, and the folder's dtype
    offload        "blocks": decoder blocks come to the GPU one at a time; "none": both models are there as a whole;
                   "auto": they are where they take at most 60 % of its free memory

    Raises MBQError for an unknown ``offload``.
    """

    device: str = "auto"
    dtype: str = "auto"
    offload: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.offload not in ("auto", "blocks", "none"):
            raise MBQError(f"--offload is {self.offload!r}; choose one of auto, blocks, none.")


@dataclass(frozen=True)
class Pair:
    """The float model and the quantized one, which has the float one's names; ``processor`` is the float model's.

    names    as they were given: (quantized, float)
    recipe   recipe.yaml of the quantized folder, {} without one
    folder   of the quantized model, None where it was given loaded
    blocks   whether decoder blocks wait on the CPU, and come to the device one at a time
    loading  how the folder is loaded once more
    """

    reference: Binding
    quantized: Binding
    processor: Any
    names: tuple[str, str]
    recipe: dict[str, Any]
    folder: str | None
    blocks: bool
    loading: Loading

    @property
    def scheme(self) -> Scheme:
        """That of the decoder's first packed layer."""
        return next(layer.scheme for layer in self.quantized.blocks.modules() if isinstance(layer, QuantLinear))

    @property
    def tower_quantized(self) -> bool:
        return any(isinstance(layer, QuantLinear) for layer in self.quantized.vision_tower.modules())

    @contextmanager
    def running_quantized(self) -> Iterator[Binding]:
        """The quantized model as a user gets it: whole, in the kernel that "auto" chooses on this device."""
        if self.folder is None or device_of(self.quantized.model).type == "cpu":
            yield self.quantized
            return
        self.quantized.model.to("cpu")
        own = self.loading
        model = mbq.load(self.folder, own.device, own.dtype, trust_remote_code=own.trust_remote_code)
        yield replace(self.quantized, model=model, blocks=_blocks(model, self.reference))

    @contextmanager
    def running_reference(self) -> Iterator[Binding]:
        """The float model; where it does not fit, its blocks come to the device for each pass."""
        if not self.blocks:
            yield self.reference
            return
        with streamed(self.reference):
            yield self.reference


def load_pair(
    model: str | Path | nn.Module, baseline: str | Path | nn.Module, processor: Any, loading: Loading
) -> Pair:
    """Load both, or take them as they were given. Raises MBQError where they cannot be compared."""
    names = (_name(model), _name(baseline))
    if not isinstance(model, nn.Module) and read_config(model).get("quantization_config") is None:
        raise MBQError(f"{model} is not quantized, so there is nothing to diagnose; give a folder of mbq quantize.")
    trust = loading.trust_remote_code
    if processor is None:
        if isinstance(baseline, nn.Module):
            raise MBQError("A loaded model comes with its processor; give diagnose(model, baseline, processor, ...).")
        processor = load_processor(baseline, trust)
    given = isinstance(baseline, nn.Module)
    original = baseline if isinstance(baseline, nn.Module) else load_model(baseline, "cpu", loading.dtype, trust)
    ours = model if isinstance(model, nn.Module) else mbq.load(model, "cpu", loading.dtype, "reference", trust)
    reference = bind(original)
    quantized = _bound(ours, reference, names)
    whole = given or _placed(reference, quantized, loading)
    folder = None if isinstance(model, nn.Module) else str(model)
    return Pair(reference, quantized, processor, names, _recipe(folder), folder, not whole, loading)


def _bound(model: Any, reference: Binding, names: tuple[str, str]) -> Binding:
    """The quantized model under the float model's names, which bind() need not find among packed layers."""
    differ = f"{names[0]} was not made from {names[1]}"
    try:
        blocks = _blocks(model, reference)
    except AttributeError:
        raise MBQError(f"{differ}: its decoder is built otherwise; give the float model of the same class.") from None
    if type(model).__name__ != type(reference.model).__name__ or len(blocks) != len(reference.blocks):
        raise MBQError(
            f"{differ}: a {type(model).__name__} of {len(blocks)} blocks is not a {type(reference.model).__name__} of "
            f"{len(reference.blocks)}; give the float model that recipe.yaml of the folder names."
        )
    if not any(isinstance(layer, QuantLinear) for layer in blocks.modules()):
        raise MBQError(f"{names[0]} has no packed layer in its decoder, so there is nothing to diagnose.")
    for name, layer in blocks.named_modules():
        if isinstance(layer, QuantLinear):
            shape = tuple(reference.blocks.get_submodule(name).get_parameter("weight").shape)
            if shape != (layer.out_features, layer.in_features):
                raise MBQError(f"{differ}: {name} has other shapes; give the float model that recipe.yaml names.")
    return replace(reference, model=model, blocks=blocks)


def _blocks(model: nn.Module, reference: Binding) -> nn.ModuleList:
    return cast(nn.ModuleList, model.get_submodule(reference.architecture.blocks))


def _placed(reference: Binding, quantized: Binding, loading: Loading) -> bool:
    """Move both to the device, whole where they fit, else without their blocks; whether they are whole."""
    device = torch_device(loading.device)
    if device.type == "cpu":
        return True
    size = weight_bytes(reference.model) + weight_bytes(quantized.model)
    whole = loading.offload == "none" or (loading.offload == "auto" and size <= WEIGHTS_SHARE * device_free(device))
    for binding in (reference, quantized):
        place(binding, Plan(device, blocks=not whole))
    return whole


def _name(model: str | Path | nn.Module) -> str:
    if isinstance(model, nn.Module):
        return str(getattr(model, "name_or_path", "") or type(model).__name__)
    return str(model).rstrip("/")


def _recipe(folder: str | None) -> dict[str, Any]:
    """The recipe's plain options. Whoever wrote the folder wrote it: what would not print in a command is left out."""
    if folder is None or not (path := model_folder(folder, weights=False) / "recipe.yaml").is_file():
        return {}
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MBQError(f"recipe.yaml of {folder} cannot be read; copy the folder anew.") from error
    items = found.items() if isinstance(found, dict) else ()
    return {name: value for name, value in items if _plain(value)}


def _plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(each, str) and each.isprintable() for each in value)
    return isinstance(value, int | float) or (isinstance(value, str) and value.isprintable())
