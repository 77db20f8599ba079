"""The compressed-tensors checkpoint format: ``quantization_config`` and the tensors of a folder.

``pack-quantized``  dense int32 words (``packing``), for everything but
``int-quantized``   int8 codes, for 8-bit weights with 8-bit activations

Every group of the config names its own format: compressed-tensors would otherwise expect unpacked codes wherever
activations are quantized. A model whose linears are ``QuantLinear`` saves with ``save_model`` under the names of the
original checkpoint, because transformers reverses its renaming of keys on saving.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from compressed_tensors.utils import is_match
from torch import nn
from transformers import PreTrainedModel

from mbq.errors import MBQError
from mbq.kernels.packed import is_packed
from mbq.limits import time_limit
from mbq.qlinear import QuantLinear
from mbq.scheme import ActivationScheme, Scheme, WeightScheme

SECONDS = 60  # for matching patterns of others with the names of a model, which takes milliseconds


def quantization_config(
    scheme: Scheme, ignore: Sequence[str], others: Mapping[str, Scheme] | None = None
) -> dict[str, Any]:
    """What ``config.json`` says under ``quantization_config``, with every quantization argument spelled out.

    scheme  of every ``nn.Linear`` that ``ignore`` does not name
    ignore  paths of modules, or regular expressions as "re:.*visual.*", that stay in floating point
    others  schemes of further linears, by regular expression ("re:.*visual.*"); these must not be in ``ignore``

    ``dequantize`` is a loading option of transformers, which takes its default from here: without it the plain call of
    transformers 5.23 with compressed-tensors 0.20 cannot read packed zero points. Other readers skip the key.
    """
    targets = {**(others or {}), "Linear": scheme}
    groups = {f"group_{i}": _group(target, each) for i, (target, each) in enumerate(targets.items())}
    formats = {group["format"] for group in groups.values()}
    asymmetric = any(not each.weights.symmetric for each in targets.values())
    return {
        "quant_method": "compressed-tensors",
        **({"dequantize": True} if asymmetric else {}),
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def replace_linears(model: nn.Module, config: Mapping[str, Any]) -> list[str]:
    """Put an empty ``QuantLinear`` wherever ``config`` (a ``quantization_config``) says so; their names, in order.

    Raises MBQError for a config that mbq cannot run, one that matches no linear, and patterns that match for ever.
    """
    slow = f"The patterns of quantization_config in config.json take more than {SECONDS} seconds; write simpler ones."
    try:
        with time_limit(SECONDS, slow):
            layers = dict(_layers(model, config))
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, re.error) as error:
        raise MBQError(
            f"quantization_config in config.json cannot be read ({type(error).__name__}: {error}); copy it anew."
        ) from error
    if not layers:
        raise MBQError("quantization_config in config.json matches no linear of this model; check its ignore patterns.")
    for name, layer in layers.items():
        weight = model.get_parameter(f"{name}.weight")
        model.set_submodule(name, layer.to_empty(device=weight.device))
    return list(layers)


def checkpoint_bytes(model: nn.Module, config: Mapping[str, Any]) -> int:
    """Bytes of the tensors that a float ``model`` will have on disk once it is quantized as ``config`` says."""
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}  # tied ones once
    total = sum(tensor.nbytes for tensor in tensors.values())
    for name, layer in _layers(model, config):
        total += sum(tensor.nbytes for tensor in layer.state_dict().values())
        total -= sum(tensor.nbytes for tensor in model.get_submodule(name).state_dict().values())
    return total


def save_model(
    model: PreTrainedModel, folder: Path, config: Mapping[str, Any], max_shard_size: int | str = "5GB"
) -> None:
    """Write config.json, generation_config.json and sharded safetensors of ``model``, which has ``QuantLinear`` layers.

    config  the ``quantization_config``; it must name exactly the layers that are quantized, or MBQError is raised
    """
    check_names(model, config)
    before = getattr(model.config, "quantization_config", None)
    model.config.quantization_config = dict(config)
    try:
        model.save_pretrained(folder, state_dict=named_for_engines(model), max_shard_size=max_shard_size)
    finally:
        del model.config.quantization_config
        if before is not None:
            model.config.quantization_config = before


# transformers 5 has what is in this module one level higher than published checkpoints have, and reads both.
FLATTENED = ("CLIPVisionModel", "SiglipVisionModel", "Siglip2VisionModel")
INNER = "vision_model"


def named_for_engines(model: nn.Module) -> dict[str, Any]:
    """The state of ``model`` with its vision tower's tensors named as in published checkpoints.

    transformers saves a tower under the names that it was loaded from. Those of a model that it made itself lack a
    level, and engines such as vLLM refuse them.
    """
    towers = [
        f"{name}."
        for name, module in model.named_modules()
        if type(module).__name__ in FLATTENED and not hasattr(module, INNER)
    ]
    state: dict[str, Any] = {}
    for name, tensor in model.state_dict().items():
        tower = next((tower for tower in towers if name.startswith(tower)), "")
        state[f"{tower}{INNER}.{name.removeprefix(tower)}" if tower else name] = tensor
    return state


def check_names(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Raise MBQError if ``config`` would quantize a float linear of ``model``, or leave out a quantized one."""
    targets = [target for group in _groups(config) for target in group["targets"] if target != "Linear"]
    every = any("Linear" in group["targets"] for group in _groups(config))
    ignore = config.get("ignore") or []
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, QuantLinear)):
            continue
        named = every or is_match(name, module, targets)
        if (named and not is_match(name, module, ignore)) != isinstance(module, QuantLinear):
            state = "quantized" if isinstance(module, QuantLinear) else "not quantized"
            raise MBQError(f"{name} is {state}, but the ignore patterns {ignore} say otherwise; correct --ignore.")


def loading_note(scheme: Scheme, others: Mapping[str, Scheme] | None = None) -> str:
    """Markdown for the model card: which call of transformers loads a folder of this scheme, and what it computes.

    others  as for ``quantization_config``
    """
    if not scheme.weights.symmetric and any(other != scheme for other in (others or {}).values()):
        return (
            "`mbq.load` loads this folder. transformers alone loads it up to 5.17 with compressed-tensors 0.18; "
            "transformers 5.23 with compressed-tensors 0.20 cannot, because there packed zero points need "
            "`dequantize=True`, which takes one scheme for the whole model."
        )
    if scheme.activations is None:
        return (
            "transformers alone loads this folder with the plain `from_pretrained`, to exactly the weights that "
            "`mbq.load` runs, unpacked to 16 bit (the same as `CompressedTensorsConfig(dequantize=True)`, which "
            "config.json asks for where zero points are packed)."
        )
    levels = 2**scheme.activations.bits - 1
    return (
        "transformers alone loads this folder with the plain `from_pretrained`, to exactly the weights that `mbq.load` "
        "runs, unpacked to 16 bit, and quantizes the activations; but compressed-tensors divides the largest value of "
        f"a token by {levels / 2} where `mbq.load` (and the paper) divide by {levels // 2}, so logits differ. With "
        "`quantization_config=CompressedTensorsConfig(dequantize=True)` transformers 5.23 leaves the activations in "
        "16 bit, and 5.17 does not."
    )


def serving_note(scheme: Scheme) -> str:
    """Markdown for the model card: what vLLM does with a folder of this scheme (docs/engines.md)."""
    if scheme.weights.bits not in (4, 8):
        return f"vLLM serves this folder on NVIDIA GPUs only; on a CPU it refuses {scheme.weights.bits}-bit weights."
    return float_activations(scheme) or "vLLM serves this folder."


def float_activations(scheme: Scheme) -> str:
    """A sentence where vLLM would silently leave in 16 bits the activations that the scheme rounds, or nothing."""
    if scheme.activations is None or not is_packed(scheme) or scheme.weights.bits != 4:
        return ""
    return (
        f"vLLM serves this folder with 16-bit activations, and does not say so: its kernels for packed 4-bit weights "
        f"round them as {scheme.name} does only with `--linear-backend humming` on an NVIDIA GPU. On a CPU with AMX "
        "they round them to 8 bits in a way of their own."
    )


def _layers(model: nn.Module, config: Mapping[str, Any]) -> Iterator[tuple[str, QuantLinear]]:
    """The float linears that ``config`` quantizes: names, and the layers on the meta device that take their place."""
    schemes = {target: _scheme(group, config) for group in _groups(config) for target in group["targets"]}
    ignore = config.get("ignore") or []
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or is_match(name, module, ignore):
            continue
        scheme = next((schemes[target] for target in schemes if is_match(name, module, target)), None)
        if scheme is not None:
            bias = module.bias is not None
            yield name, QuantLinear(module.in_features, module.out_features, scheme, bias, module.weight.dtype, "meta")


def _group(target: str, scheme: Scheme) -> dict[str, Any]:
    weights, activations = scheme.weights, scheme.activations
    return {
        "targets": [target],
        "format": "pack-quantized" if is_packed(scheme) else "int-quantized",
        "weights": {
            "num_bits": weights.bits,
            "type": "int",
            "symmetric": weights.symmetric,
            "strategy": "group" if weights.group_size else "channel",
            "group_size": weights.group_size,
            "dynamic": False,
        },
        "input_activations": activations
        and {
            "num_bits": activations.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "token",
            "group_size": None,
            "dynamic": True,
        },
        "output_activations": None,
    }


def _groups(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = config.get("config_groups") or {}
    if not groups or not all(isinstance(group, Mapping) and group.get("weights") for group in groups.values()):
        raise MBQError("quantization_config in config.json names no weights; mbq.load reads folders that mbq wrote.")
    return list(groups.values())


def _scheme(group: Mapping[str, Any], config: Mapping[str, Any]) -> Scheme:
    """The scheme of a group, or MBQError naming what is not supported."""
    weights, inputs = group["weights"], group.get("input_activations")
    size = weights.get("group_size") if weights.get("strategy") == "group" else None
    activations = None if inputs is None else ActivationScheme(inputs["num_bits"])
    name = f"W{weights['num_bits']}A{activations.bits if activations else 16}"
    scheme = Scheme(name, WeightScheme(weights["num_bits"], weights["symmetric"], size), activations)
    form = group.get("format") or config.get("format")
    if form != ("pack-quantized" if is_packed(scheme) else "int-quantized"):
        raise MBQError(f"Format {form!r} of {name} in config.json is not one that mbq.load reads; use transformers.")
    unsupported = {
        "weights": weights.get("type", "int") != "int" or weights.get("strategy") not in ("group", "channel"),
        "bits": weights["num_bits"] not in (2, 3, 4, 8),
        "act order": bool(weights.get("actorder")),
        "input_activations": inputs is not None
        and (inputs.get("strategy"), inputs.get("dynamic"), inputs.get("symmetric")) != ("token", True, True),
        "output_activations": bool(group.get("output_activations")),
    }
    for what, found in unsupported.items():
        if found:
            raise MBQError(
                f"The {what} of {name} in config.json are not of a kind that mbq.load runs; use transformers."
            )
    return scheme
