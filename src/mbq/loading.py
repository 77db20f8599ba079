"""Float models and their processors from folders (or the Hub), with one sentence for each way that can fail."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Blip2Processor,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from mbq import blip2, internvl_chat
from mbq.checkpoint.safety import check_code, check_config, check_folder, check_size, read_json, stored_tensors
from mbq.errors import MBQError
from mbq.hub import hub_folder

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The float vision-language model in ``path``, in eval mode on ``device``.

    path     a folder, or a name on the Hub ("llava-hf/llava-onevision-qwen2-7b-ov-hf"), with "@revision" if wanted
    device   "auto" is a GPU where there is one
    dtype    "auto" is the folder's own

    Raises MBQError for a folder that is missing, incomplete, damaged, hostile (``checkpoint.safety``), quantized
    already or a text-only model, for code that is not trusted, and for weights that are not finite.
    """
    config = read_config(path)
    if config.get("quantization_config") is not None:
        method = config["quantization_config"].get("quant_method", "an unknown method")
        raise MBQError(f"{path} is quantized already ({method}); give the float model that it was made from.")
    loads = auto_class(path, config, trust_remote_code)
    target, folder = torch_device(device), model_folder(path)
    tensors = stored_tensors(folder)
    check_code(folder, trust_remote_code)
    if loads is AutoModelForImageTextToText and not trust_remote_code:
        check_size(without_weights(path, loads), tensors, path)
    options = {"dtype": torch_dtype(dtype), "trust_remote_code": trust_remote_code, "use_safetensors": True}
    try:
        model, info = loads.from_pretrained(folder, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise MBQError(f"{path} cannot be loaded: {_first_line(error)}; check that it is complete.") from error
    except (AttributeError, TypeError, KeyError) as error:
        if loads is AutoModelForImageTextToText:
            raise
        raise MBQError(
            f"The code in {path} does not run with transformers {transformers.__version__} "
            f"({type(error).__name__}: {_first_line(error)}); give the same model in transformers' own format."
        ) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise MBQError(f"{path} has no weights for {missing[0]} ({len(missing)} missing in all); download it again.")
    if type(model).__name__ == internvl_chat.MODEL_CLASS:
        internvl_chat.adapt(model, _tokenizer(folder, trust_remote_code))
    check_finite(model)
    return model.eval().to(target)


def load_processor(path: str | Path, trust_remote_code: bool = False) -> ProcessorMixin:
    """The processor (tokenizer, image processor and chat template) of the model in ``path``.

    Raises MBQError where there is none that takes images, or where it has no chat template.
    """
    config, folder = read_config(path), model_folder(path, weights=False)
    check_code(folder, trust_remote_code)
    if internvl_chat.MODEL_CLASS in (config.get("architectures") or ()):
        return internvl_chat.processor_for(config, _tokenizer(folder, trust_remote_code))
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, AttributeError, KeyError, TypeError) as error:
        raise _not_loaded(f"The processor of {path}", error) from error
    if isinstance(processor, Blip2Processor):
        blip2.adapt(processor)
    if getattr(processor, "image_processor", None) is None:
        raise MBQError(f"{path} has no image processor; add its preprocessor_config.json or processor_config.json.")
    if not processor.chat_template:
        raise MBQError(f"The processor of {path} has no chat template; add its chat_template.jinja.")
    return processor


def read_config(path: str | Path) -> dict[str, Any]:
    """config.json of a folder or of a model on the Hub.

    Raises MBQError if there is none, if it is not JSON, and for what ``checkpoint.safety`` refuses in it or its folder.
    """
    folder = model_folder(path, weights=False)
    file = folder / "config.json"
    if not file.is_file():
        raise MBQError(f"{path} has no config.json; give the folder of a Hugging Face model.")
    check_folder(folder)
    config = read_json(file)
    check_config(config, path)
    return config


def model_folder(path: str | Path, weights: bool = True) -> Path:
    """Where the files of a folder, or of a model on the Hub, lie; ``weights``: its safetensors, too.

    Raises MBQError where there is no such folder, and where the Hub does not give the model.
    """
    return Path(path) if Path(path).is_dir() else hub_folder(str(path), weights)


def transformers_config(path: str | Path, trust_remote_code: bool = False) -> Any:
    """transformers' own reading of config.json, once ``read_config`` has passed it. Raises MBQError where it fails."""
    folder = model_folder(path, weights=False)
    check_code(folder, trust_remote_code)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # what is wrong in it can go wrong in as many ways
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise MBQError(f"config.json of {path} cannot be read ({reason}); download the model again.") from error


def without_weights(
    path: str | Path, loads: Any, dtype: str | torch.dtype = "auto", trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model of ``path`` with shapes and no weights, made by ``loads``, one of transformers' Auto classes.

    Raises MBQError where its code does not make one from a configuration.
    """
    config = transformers_config(path, trust_remote_code)
    wanted = (config.dtype or torch.float32) if dtype == "auto" else dtype
    try:
        with torch.device("meta"):
            return loads.from_config(config, trust_remote_code=trust_remote_code, dtype=wanted)
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise MBQError(
            f"The configuration of {path} makes no model without weights ({_first_line(error)}); take the model from "
            "another place."
        ) from error


def check_finite(model: nn.Module) -> None:
    """Raises MBQError that names the first parameter or buffer that holds a NaN or an infinity."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise MBQError(
                f"{name} holds {bad} values that are NaN or infinite; the weights are damaged: download them again."
            )


def torch_device(device: str | torch.device) -> torch.device:
    """``device`` as torch knows it; "auto" is a GPU where there is one. Raises MBQError if it is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise MBQError(f"--device {device} is no device; give cpu, cuda, cuda:1 or auto.") from error
    if target.type not in ("cpu", "cuda"):
        raise MBQError(f"--device {device} is not one that mbq runs on; give cpu, cuda, cuda:1 or auto.")
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise MBQError(f"--device {device}, but this machine has {torch.cuda.device_count()} GPUs; give cpu or auto.")
    return target


def torch_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """``dtype`` as from_pretrained takes it: "auto" or a torch dtype. Raises MBQError for an unknown name."""
    if dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise MBQError(f"--dtype {dtype} is unknown; give auto, {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def auto_class(path: str | Path, config: Mapping[str, Any], trust_remote_code: bool) -> Any:
    """Which of transformers' Auto classes loads the model, once it is clear that it takes images and may be run."""
    model_type = config.get("model_type")
    if model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return AutoModelForImageTextToText
    auto_map = config.get("auto_map")
    name = (config.get("architectures") or [model_type or "model of unknown type"])[0]
    if auto_map is None or model_type in CONFIG_MAPPING_NAMES:
        raise MBQError(f"{path} holds a {name}, which takes no images; give a vision-language model.")
    if not trust_remote_code:
        files = ", ".join(sorted({f"{value.split('--')[-1].split('.')[0]}.py" for value in auto_map.values()}))
        raise MBQError(
            f"{path} ({name}) runs code of its own ({files}); read it, then allow it with --trust-remote-code."
        )
    classes = {"AutoModelForImageTextToText": AutoModelForImageTextToText, "AutoModel": AutoModel}
    return next((auto for key, auto in classes.items() if key in auto_map), AutoModelForCausalLM)


def _tokenizer(path: str | Path, trust_remote_code: bool) -> Any:
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, AttributeError, KeyError, TypeError) as error:
        raise _not_loaded(f"The tokenizer of {path}", error) from error


def _not_loaded(what: str, error: Exception) -> MBQError:
    if "trust_remote_code=True" in str(error):
        return MBQError(f"{what} runs code of its own; read it, then allow it with --trust-remote-code.")
    return MBQError(f"{what} cannot be loaded: {_first_line(error)}; add its files.")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
