"""Random two-block models of each family, with real processors, small enough to run in a blink.

``tiny(family)`` returns ``(model, processor)`` in memory, ``save(family, folder)`` writes a folder that
``AutoModelForImageTextToText`` and ``AutoProcessor`` load. Families: "llava_onevision", "internvl" (``text="llama"``
for a Llama backbone), "qwen2_vl", and "internvl2_internlm2" (tests/internlm2, whose folder needs trust_remote_code;
``text="qwen2"`` and ``"llama"`` are its other language models).

Every parameter is random, norm weights and biases too, so that a fold into the wrong place changes the logits.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2Config,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3Config,
    Qwen3MoeConfig,
    SiglipVisionConfig,
)

from mbq.internvl_chat import adapt, processor_for
from tests.internlm2.configuration_internvl_chat import InternVLChatConfig
from tests.internlm2.modeling_internvl_chat import InternVLChatModel

FAMILY_NAMES = ("llava_onevision", "internvl", "qwen2_vl")
ALL_FAMILY_NAMES = (*FAMILY_NAMES, "internvl2_internlm2")

CORPUS = (
    "What is shown in the picture? A red circle is left of a blue square.",
    "Describe the image. The image shows two green triangles and the number 7.",
    "How many shapes are there? There are three shapes. Which color is the star? Yellow.",
    "You are a helpful assistant. Read the word. Answer with one word.",
)
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

# The one of the published LLaVA-OneVision folders: a space after the role, images first, and a generation prompt
# ("assistant\n") that differs from what stands before an answer ("assistant ").
LLAVA_ONEVISION_TEMPLATE = r"""{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + ' ' }}
{%- if message['content'] is string %}
{{- message['content'] }}
{%- else %}
{%- for part in message['content'] if part['type'] == 'image' %}{{- '<image>\n' }}{%- endfor %}
{%- for part in message['content'] if part['type'] == 'text' %}{{- part['text'] }}{%- endfor %}
{%- endif %}
{{- '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

CHATML_TEMPLATE = r"""{%- for message in messages %}
FIRST
{{- '<|im_start|>' + message['role'] + '\n' }}
{%- if message['content'] is string %}
{{- message['content'] }}
{%- else %}
{%- for part in message['content'] %}
{%- if part['type'] == 'image' %}{{- 'IMAGE' }}{%- else %}{{- part['text'] }}{%- endif %}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
_SYSTEM = r"""{%- if loop.first and message['role'] != 'system' %}
{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif %}"""
INTERNVL_TEMPLATE = CHATML_TEMPLATE.replace("FIRST\n", "").replace("IMAGE", r"<IMG_CONTEXT>\n")
QWEN2_VL_TEMPLATE = CHATML_TEMPLATE.replace("FIRST", _SYSTEM).replace(
    "IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"
)


def tokenizer(special: list[str], **named: str) -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer over 320 pieces and the special tokens; ``named`` become attributes of it."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trained.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    pieces = trained.get_vocab()
    merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    made = Qwen2Tokenizer(
        vocab=pieces, merges=merges, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=named
    )
    made.add_special_tokens({"additional_special_tokens": CHATML[1:] + special}, replace_extra_special_tokens=False)
    made.padding_side = "right"
    made.model_max_length = 2048
    return made


def picture(seed: int = 0, size: int = 56) -> Image.Image:
    """A random RGB picture of ``size`` by ``size`` pixels in blocks of seven."""
    blocks = np.random.default_rng(seed).integers(0, 256, (size // 7, size // 7, 3), dtype=np.uint8)
    return Image.fromarray(blocks.repeat(7, axis=0).repeat(7, axis=1))


def question(text: str = "What is shown in the picture?", images: int = 1) -> list[dict[str, Any]]:
    """A chat of one user turn with ``images`` image parts before the text."""
    content: list[dict[str, Any]] = [{"type": "image"} for _ in range(images)]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def inputs(processor: ProcessorMixin, images: int = 1, answer: str | None = None) -> Any:
    """What ``model(**inputs)`` takes for a question about ``images`` pictures, and its answer where one is given."""
    messages = question(images=images)
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    text = processor.apply_chat_template(messages, add_generation_prompt=answer is None)
    pictures = [picture(seed) for seed in range(images)] or None
    return processor(text=[text], images=pictures, return_tensors="pt", padding=True)


def _text(
    config_class: Callable[..., Any], *, hidden: int, kv_heads: int, blocks: int, tokens: Any, **more: Any
) -> Any:
    return config_class(
        vocab_size=len(tokens),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 32,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
        **more,
    )


def _llava_onevision(hidden: int, kv_heads: int, blocks: int, tied: bool, text: str) -> tuple[Any, Any]:
    tokens = tokenizer(["<image>", "<video>"], image_token="<image>", video_token="<video>")
    side = {"height": 56, "width": 56}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=side, image_grid_pinpoints=[[56, 56], [56, 112]]),
        tokens,
        LlavaOnevisionVideoProcessor(size=side),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=LLAVA_ONEVISION_TEMPLATE,
    )
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=56,
            patch_size=28,
            vision_use_head=False,
        ),
        text_config=_text(
            _backbone(text),
            hidden=hidden,
            kv_heads=kv_heads,
            blocks=blocks,
            tokens=tokens,
            tie_word_embeddings=tied,
        ),
        image_token_index=tokens.convert_tokens_to_ids("<image>"),
        video_token_index=tokens.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=[[56, 56], [56, 112]],
        tie_word_embeddings=tied,
    )
    return LlavaOnevisionForConditionalGeneration(config), processor


def _internvl(hidden: int, kv_heads: int, blocks: int, tied: bool, text: str) -> tuple[Any, Any]:
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokens = tokenizer(list(named.values()), **named)
    side = {"height": 56, "width": 56}
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=side, crop_to_patches=True, min_patches=1, max_patches=4),
        tokens,
        InternVLVideoProcessor(size=side),
        image_seq_length=4,
        chat_template=INTERNVL_TEMPLATE,
    )
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            attention_bias=True,
            image_size=(56, 56),
            patch_size=(14, 14),
        ),
        text_config=_text(
            _backbone(text),
            hidden=hidden,
            kv_heads=kv_heads,
            blocks=blocks,
            tokens=tokens,
            tie_word_embeddings=tied,
        ),
        image_token_id=tokens.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=tied,
    )
    return InternVLForConditionalGeneration(config), processor


def _qwen2_vl(hidden: int, kv_heads: int, blocks: int, tied: bool, text: str) -> tuple[Any, Any]:
    special = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokens = tokenizer(special, image_token="<|image_pad|>", video_token="<|video_pad|>")
    size = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(size=size),
        tokens,
        Qwen2VLVideoProcessor(size=size),
        chat_template=QWEN2_VL_TEMPLATE,
    )
    text_config = {
        "vocab_size": len(tokens),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": blocks,
        "num_attention_heads": hidden // 32,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": None,
        "eos_token_id": tokens.eos_token_id,
        "pad_token_id": tokens.pad_token_id,
    }
    ids = {name: tokens.convert_tokens_to_ids(token) for name, token in zip(QWEN_IDS, special, strict=True)}
    config = Qwen2VLConfig(
        text_config=text_config,
        vision_config={"depth": 2, "embed_dim": 64, "hidden_size": hidden, "num_heads": 2, "mlp_ratio": 2},
        tie_word_embeddings=tied,
        **ids,
    )
    return Qwen2VLForConditionalGeneration(config), processor


QWEN_IDS = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")


def _internvl2(hidden: int, kv_heads: int, blocks: int, tied: bool, text: str) -> tuple[Any, Any]:
    tokens = tokenizer(["<img>", "</img>", "<IMG_CONTEXT>"])
    language = {
        "architectures": [_INTERNVL2_TEXT[text]],
        "vocab_size": len(tokens),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": blocks,
        "num_attention_heads": hidden // 32,
        "num_key_value_heads": kv_heads,
        "bos_token_id": None,
        "eos_token_id": tokens.eos_token_id,
        "pad_token_id": tokens.pad_token_id,
        "tie_word_embeddings": tied,
    }
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
    }
    config = InternVLChatConfig(
        vision_config=vision,
        llm_config=language,
        force_image_size=56,
        dynamic_image_size=True,
        use_thumbnail=True,
        max_dynamic_patch=4,
        template="internlm2-chat",
        auto_map={
            "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
            "AutoModel": "modeling_internvl_chat.InternVLChatModel",
        },
    )
    model = InternVLChatModel(config)
    adapt(model, tokens)
    return model, processor_for(config.to_dict(), tokens)


_INTERNVL2_TEXT = {
    "internlm2": "InternLM2ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
}


def _backbone(text: str) -> Callable[..., Any]:
    experts = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 32}
    return {
        "qwen2": Qwen2Config,
        "llama": LlamaConfig,
        "qwen3": partial(Qwen3Config, head_dim=32),
        "qwen3_moe": partial(Qwen3MoeConfig, **experts),
    }[text]


_BUILDERS: dict[str, Callable[..., tuple[Any, Any]]] = {
    "llava_onevision": _llava_onevision,
    "internvl": _internvl,
    "qwen2_vl": _qwen2_vl,
    "internvl2_internlm2": _internvl2,
}


def tiny(
    family: str,
    *,
    hidden: int = 128,
    kv_heads: int = 2,
    blocks: int = 2,
    tied: bool = False,
    text: str | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A random model of ``family`` in eval mode and its processor; ``kv_heads=4`` turns grouped-query attention off."""
    if family not in _BUILDERS:
        raise KeyError(f"{family}: one of {', '.join(_BUILDERS)}")
    text = text or ("internlm2" if family == "internvl2_internlm2" else "qwen2")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, processor = _BUILDERS[family](hidden, kv_heads, blocks, tied, text)
        randomize(model)
    tokens = processor.tokenizer
    model.generation_config = GenerationConfig(eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id)
    model.config.architectures = [type(model).__name__]
    return model.to(dtype).eval(), processor


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """Weights that keep the signal's size; norm weights spread by a factor of e^±0.5, biases not zero."""
    for name, parameter in model.named_parameters():
        if ".experts." in name:  # [expert, out, in]
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        elif name.endswith(("attn_gate", "mlp_gate")):  # of cross-attention, through tanh
            parameter.fill_(0.5)
        elif parameter.ndim > 1 and "embed" not in name:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        elif parameter.ndim > 1:
            parameter.normal_(std=0.3)
        elif "norm" in name and name.endswith("weight"):
            parameter.normal_(std=0.5).exp_()
        else:
            parameter.normal_(std=0.1)


def save(family: str, folder: str | Path, **overrides: Any) -> Path:
    """Write the folder of ``tiny(family, **overrides)``: weights, configs, tokenizer, processor, chat template."""
    model, processor = tiny(family, **overrides)
    model.save_pretrained(folder)
    if family == "internvl2_internlm2":  # as published: a tokenizer and code, no processor
        processor.tokenizer.save_pretrained(folder)
        for code in (Path(__file__).parent / "internlm2").glob("*.py"):
            shutil.copy(code, folder)
    else:
        processor.save_pretrained(folder)
    return Path(folder)
