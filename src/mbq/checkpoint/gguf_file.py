"""The GGUF files of llama.cpp: a language model, and an importance matrix for its quantizer.

Names of tensors and keys, and the writing, are those of the ``gguf`` package (the extra ``mbq[gguf]``). ggml's
docs/gguf.md describes the format, llama.cpp's tools/imatrix the matrix: ``NAME.in_sum2`` holds sums over tokens of
squared inputs and ``NAME.counts`` of how many, for each weight; llama-quantize takes the quotient.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mbq.architecture import Binding
from mbq.errors import MBQError
from mbq.importance import Importance

ARCHITECTURES = {  # transformers' model_type: gguf's
    "qwen2": "QWEN2",
    "qwen2_vl_text": "QWEN2VL",
    "qwen2_5_vl_text": "QWEN2VL",
    "qwen3_vl_text": "QWEN3VL",
    "llama": "LLAMA",
}
INTERLEAVED = ("LLAMA",)  # llama.cpp rotates neighbouring channels there, transformers those half a head apart

# How a byte-level tokenizer splits text before it merges: the expression in tokenizer.json, llama.cpp's name for it.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {QWEN2_SPLIT: "qwen2"}
_INSTEAD = "export --format equalized, and convert that folder with llama.cpp's own convert_hf_to_gguf.py"


@dataclass(frozen=True)
class LanguageModel:
    """What a GGUF file holds of a vision-language model.

    architecture  a name of gguf's MODEL_ARCH
    config        of the language model, as transformers has it
    tensors       by llama.cpp's names
    names         llama.cpp's names by the full names of modules: "blk.0.attn_q.weight" of the linear that it is of
    deepstack     behind how many blocks features of the vision tower are added (Qwen3-VL)
    """

    architecture: str
    config: Any
    tensors: dict[str, torch.Tensor]
    names: dict[str, str]
    deepstack: int = 0


def gguf_package() -> Any:
    """The module ``gguf``. Raises MBQError where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise MBQError("--format gguf needs the gguf package; install it with pip install 'mbq[gguf]'.") from error
    return gguf


def language_model(binding: Binding) -> LanguageModel:
    """The language model of ``binding`` under llama.cpp's names.

    Raises MBQError for one that llama.cpp would compute otherwise, or that this file has not been checked with.
    """
    gguf = gguf_package()
    root = binding.architecture.blocks.rpartition(".")[0]
    language = binding.model.get_submodule(root)
    config: Any = getattr(language, "config", None)
    _check_config(config, type(language).__name__)
    architecture = ARCHITECTURES[config.model_type]
    found = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture], len(binding.blocks))
    head = next(name for name in binding.kept if name.rpartition(".")[2] == "lm_head")
    parameters = dict(binding.model.named_parameters())  # tied ones once, as the embeddings
    tensors, names = {}, {}
    for full, parameter in parameters.items():
        module, _, kind = full.rpartition(".")
        if module != head and not full.startswith(f"{root}."):
            continue
        known = "lm_head" if module == head else f"model.{module.removeprefix(f'{root}.')}"
        name = found.get_name(known)
        if name is None:
            raise MBQError(f"llama.cpp has no place for {full} in a {config.model_type}; {_INSTEAD}.")
        tensors[f"{name}.{kind}"] = _rotated(parameter.detach(), known, config, architecture)
        names[module] = f"{name}.weight"
    vision: Any = getattr(binding.model.config, "vision_config", None)
    deepstack = len(getattr(vision, "deepstack_visual_indexes", None) or ())
    return LanguageModel(architecture, config, tensors, names, deepstack)


def check_tokenizer(tokenizer: Any) -> str:
    """llama.cpp's name for how the tokenizer splits text. Raises MBQError for one that it does not know."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = json.loads(backend.to_str()) if backend is not None else {"model": {}, "pre_tokenizer": None}
    steps = (content["pre_tokenizer"] or {}).get("pretokenizers", [])
    expressions = [step["pattern"].get("Regex") for step in steps if step["type"] == "Split"]
    if content["model"].get("type") != "BPE" or len(expressions) != 1 or expressions[0] not in SPLITS:
        raise MBQError(f"The tokenizer splits text in another way than Qwen2's, the only one written here; {_INSTEAD}.")
    return SPLITS[expressions[0]]


def write_model(path: Path, model: LanguageModel, processor: Any, name: str) -> None:
    """Write the model with its tokenizer and chat template: matrices in their dtype, vectors in float32."""
    gguf = gguf_package()
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[model.architecture]])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_config(writer, model.config)
    if model.deepstack:
        writer.add_num_deepstack_layers(model.deepstack)
    _add_tokenizer(writer, processor, rows=len(model.tensors["token_embd.weight"]))
    dtype = model.tensors["blk.0.attn_q.weight"].dtype
    kinds = {torch.float32: "ALL_F32", torch.float16: "MOSTLY_F16", torch.bfloat16: "MOSTLY_BF16"}
    writer.add_file_type(gguf.LlamaFileType[kinds[dtype]])
    _write(writer, model.tensors)


def write_importance(path: Path, model: LanguageModel, measured: Importance, data: str) -> None:
    """Write the importance matrix of the linears of ``model``; ``data`` is the name of what it was measured on."""
    gguf = gguf_package()
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[model.architecture]])
    writer.add_type(gguf.GGUFType.IMATRIX)
    writer.add_array("imatrix.datasets", [data])
    writer.add_uint32("imatrix.chunk_count", measured.samples)
    writer.add_uint32("imatrix.chunk_size", measured.tokens // measured.samples)
    tensors = {}
    for linear, mean in measured.means.items():
        tensors[f"{model.names[linear]}.in_sum2"] = (mean * measured.tokens)[None]
        tensors[f"{model.names[linear]}.counts"] = torch.full((1, 1), float(measured.tokens))
    _write(writer, tensors)


def _check_config(config: Any, name: str) -> None:
    kind, rope = getattr(config, "model_type", name), getattr(config, "rope_parameters", None) or {}
    if kind not in ARCHITECTURES:
        raise MBQError(
            f"--format gguf writes language models of the types {', '.join(ARCHITECTURES)}, not {kind}; {_INSTEAD}."
        )
    if rope.get("rope_type", "default") != "default":
        raise MBQError(f"--format gguf does not write rotary scaling ({rope['rope_type']}); {_INSTEAD}.")
    if config.hidden_act != "silu" or "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise MBQError(f"This {kind} has an activation or a sliding window that is not written; {_INSTEAD}.")


def _add_config(writer: Any, config: Any) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    sections = config.rope_parameters.get("mrope_section")
    if sections:  # time, height, width, and a fourth that models of text and pictures lack
        writer.add_rope_dimension_sections([*sections, *[0] * (4 - len(sections))])


def _add_tokenizer(writer: Any, processor: Any, rows: int) -> None:
    """Every row of the embeddings gets a token, also those that the tokenizer has none for."""
    gguf, tokenizer = gguf_package(), processor.tokenizer
    added, special = tokenizer.added_tokens_decoder, set(tokenizer.all_special_ids)
    texts = {index: text for text, index in tokenizer.get_vocab().items()}
    tokens, types = [], []
    for index in range(rows):
        tokens.append(texts.get(index, f"<unused {index}>"))
        if index not in texts:
            types.append(gguf.TokenType.UNUSED)
        elif index not in added:
            types.append(gguf.TokenType.NORMAL)
        elif index in special or added[index].special:
            types.append(gguf.TokenType.CONTROL)
        else:
            types.append(gguf.TokenType.USER_DEFINED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(check_tokenizer(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    with tempfile.TemporaryDirectory(prefix="mbq-") as folder:
        tokenizer.save_pretrained(folder)
        rest = gguf.SpecialVocab(folder, load_merges=True, n_vocab=rows)
    rest.add_special_token.setdefault("bos", False)
    rest.chat_template = processor.chat_template
    rest.add_to_gguf(writer, quiet=True)


def _rotated(weight: torch.Tensor, name: str, config: Any, architecture: str) -> torch.Tensor:
    """Rows of q and k in the order in which llama.cpp rotates them: i and i + d/2 of a head side by side."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.rpartition(".")[2])
    if architecture not in INTERLEAVED or heads is None:
        return weight
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _write(writer: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """One tensor after the other, so that none is copied before its turn."""
    gguf = gguf_package()
    try:
        for name, tensor in tensors.items():
            dtype = torch.float32 if tensor.ndim == 1 else tensor.dtype
            kind = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
            shape, size = list(tensor.shape), tensor.numel() * dtype.itemsize
            if kind == "BF16":  # which numpy lacks
                shape[-1] *= dtype.itemsize
            numbers = {"F32": np.float32, "F16": np.float16, "BF16": np.uint8}[kind]
            writer.add_tensor_info(name, shape, np.dtype(numbers), size, gguf.GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors.values():
            values = (tensor.float() if tensor.ndim == 1 else tensor).cpu().contiguous()
            writer.write_tensor_data(values.view(torch.uint8).numpy())
    finally:
        writer.close()
