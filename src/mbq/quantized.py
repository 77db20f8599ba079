"""Load a folder that ``mbq quantize`` wrote, with its weights packed; a float folder loads as it is."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from mbq import internvl_chat
from mbq.checkpoint.compressed_tensors import replace_linears
from mbq.checkpoint.safety import check_code, check_packed, check_size, stored_tensors
from mbq.checkpoint.single_experts import unmerged
from mbq.errors import MBQError
from mbq.experts import split_experts
from mbq.fuse import use_kernel
from mbq.kernels import KERNELS
from mbq.kernels.attention import use_attention
from mbq.loading import (
    check_finite,
    load_model,
    model_folder,
    read_config,
    torch_device,
    torch_dtype,
    transformers_config,
)
from mbq.qlinear import QuantLinear


def load(
    folder: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    kernel: str = "auto",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model of ``folder`` in eval mode, ready to ``generate``; quantized linears are ``QuantLinear``, packed.

    folder  what ``mbq quantize`` wrote, or a float model (a folder, or a name on the Hub, with "@revision" if wanted)
    device  None is the CPU, "auto" a GPU where there is one
    dtype   of the float parameters, the scales and the activations; None is the folder's own
    kernel  "auto" or a name of ``mbq.kernels.KERNELS``; all but "reference" arrange the weights for themselves, and
            q, k, v and gate, up run as one: such a model runs, and does not save. On a GPU its decode steps over a
            static cache use ``mbq.kernels.attention``

    With quantized activations a layer multiplies integer codes and scales the sum, where the search multiplied weights
    and activations rounded to the model's dtype: the same numbers before rounding, so results agree within it.

    Raises MBQError where the folder is no model, was quantized in a way that mbq does not run, or is damaged or hostile
    (``checkpoint.safety``).
    """
    if kernel != "auto" and kernel not in KERNELS:
        raise MBQError(f"Unknown kernel {kernel!r}; choose auto or one of {', '.join(KERNELS)}.")
    config = read_config(folder)
    quantized = config.get("quantization_config")
    target, wanted = torch_device(device or "cpu"), torch_dtype(dtype or "auto")
    if quantized is None:
        return load_model(folder, target, wanted, trust_remote_code)
    method = quantized.get("quant_method")
    if method != "compressed-tensors":
        raise MBQError(f"{folder} was quantized with {method!r}; mbq.load reads compressed-tensors only.")
    if config.get("auto_map") and not trust_remote_code:
        raise MBQError(f"{folder} runs code of its own (*.py); read it, then allow it with --trust-remote-code.")
    model = _load_packed(model_folder(folder), quantized, wanted, trust_remote_code)
    check_finite(model)  # scales above all
    model.to(target)  # type: ignore[arg-type]
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            _check_shape(name, layer, folder)
    if use_kernel(model, kernel):
        use_attention(model)
    return model.eval()


def _load_packed(
    folder: Path, quantized: Mapping[str, Any], dtype: str | torch.dtype, trust_remote_code: bool
) -> PreTrainedModel:
    tensors = stored_tensors(folder)
    check_packed(tensors, folder)
    check_code(folder, trust_remote_code)
    config = transformers_config(folder, trust_remote_code)
    model_class = _model_class(config, folder, trust_remote_code)
    del config.quantization_config  # or transformers would load the folder in its own way
    packed_class = _packed_class(model_class, quantized)
    if not trust_remote_code:
        check_size(_without_weights(packed_class, config, folder), tensors, folder)
    model = _from_pretrained(packed_class, folder, config, dtype, trust_remote_code)
    model.__class__ = model_class
    model.config.quantization_config = dict(quantized)
    if model_class.__name__ == internvl_chat.MODEL_CLASS:
        internvl_chat.adapt(model, AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code))
    return model


def _model_class(config: Any, folder: Path, trust_remote_code: bool) -> type[PreTrainedModel]:
    """The class that ``architectures`` of config.json names, from transformers or from the folder's own code."""
    names = config.architectures or []
    if trust_remote_code:
        for reference in (getattr(config, "auto_map", None) or {}).values():
            if isinstance(reference, str) and reference.split(".")[-1] in names:
                return get_class_from_dynamic_module(reference, str(folder))
    if not names or names[0] not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values():
        raise MBQError(
            f"config.json of {folder} names the classes {names}, no vision-language models of transformers; update it."
        )
    return getattr(transformers, names[0])


def _packed_class(model_class: type[PreTrainedModel], quantized: Mapping[str, Any]) -> type[PreTrainedModel]:
    """``model_class`` whose constructor ends by splitting experts and replacing linears by empty packed layers.

    transformers' own loading (renamed keys, shards, tied weights, dtype) then does the rest. Name and module are the
    original's: transformers looks up its key renaming by them.
    """

    def __init__(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, *args, **kwargs)
        split_experts(self)
        for name in replace_linears(self, quantized):
            # SigLIP initializes its linears' weights through the module around them, and packed layers have none.
            self.get_submodule(name.rpartition(".")[0])._is_hf_initialized = True  # type: ignore[assignment]

    body = {"__init__": __init__, "__module__": model_class.__module__, "__qualname__": model_class.__qualname__}
    return type(model_class.__name__, (model_class,), body)


def _without_weights(model_class: type[PreTrainedModel], config: Any, folder: Path) -> PreTrainedModel:
    """A model of shapes alone. Raises MBQError where the class does not make one of this configuration."""
    try:
        with torch.device("meta"):
            return model_class(copy.deepcopy(config))
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise MBQError(f"config.json of {folder} makes no model ({_first_line(error)}); copy it anew.") from error


def _from_pretrained(
    model_class: type[PreTrainedModel], folder: Path, config: Any, dtype: str | torch.dtype, trust_remote_code: bool
) -> PreTrainedModel:
    """The filled model, or MBQError where a tensor is missing, left over or of the wrong shape."""
    try:
        with unmerged():
            loaded: Any = model_class.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise MBQError(
            f"The weights in {folder} cannot be loaded ({_first_line(error)}); copy the folder anew."
        ) from error
    model, info = loaded
    kinds = {"missing_keys": "missing", "mismatched_keys": "of the wrong shape", "unexpected_keys": "left over"}
    for key, what in kinds.items():
        names = sorted(str(name[0]) if isinstance(name, tuple) else str(name) for name in info[key])
        if names:
            raise MBQError(f"{folder} is damaged: {len(names)} tensors are {what}, {names[0]} first; copy it anew.")
    return model


def _check_shape(name: str, layer: QuantLinear, folder: str | Path) -> None:
    shape = [layer.out_features, layer.in_features]
    if "weight_shape" in layer._buffers and layer.weight_shape.tolist() != shape:
        found = layer.weight_shape.tolist()
        raise MBQError(f"{folder} is damaged: weight_shape of {name} is {found}, not {shape}; copy it anew.")


def _first_line(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return text.strip().splitlines()[0][:200].rstrip(".")
