"""Build an untrained reference model with its tokenizer and processor: real architectures, small sizes.

python training/build.py internvl --output DIR
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    Dinov2Config,
    GenerationConfig,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PretrainedConfig,
    Qwen2Config,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    SiglipVisionConfig,
)

from mbq.world import TASKS
from mbq.world.scene import PIXELS

HIDDEN, INTERMEDIATE, BLOCKS, HEADS = 128, 384, 4, 4
VISION_HIDDEN, VISION_BLOCKS = 128, 3
HALVES = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}

# ChatML, the image before the text; {image} is the family's placeholder.
CHAT_TEMPLATE = r"""{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\n' }}
{%- if message['content'] is string %}
{{- message['content'] }}
{%- else %}
{%- for part in message['content'] %}
{%- if part['type'] == 'image' %}{{- '{image}' }}{%- elif part['type'] == 'text' %}{{- part['text'] }}{%- endif %}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""


def world_tokenizer(special: list[str], **named: str) -> Qwen2Tokenizer:
    """Byte-level BPE in which every word of the world is one token (a number is a token a digit)."""
    words: dict[str, None] = {}
    for task in TASKS.values():
        for variant in task.variants:
            texts = [variant.question, variant.answer, *(word for each in variant.vocabulary.values() for word in each)]
            for text in texts:
                words.update(dict.fromkeys([text, f" {text}"]))
    words.update(dict.fromkeys(["user", "assistant", "system"]))
    trained = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    trained.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=50_000, min_frequency=1, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator((word.replace("{", " ").replace("}", " ") for word in words), trainer)
    merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=trained.get_vocab(),
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=named,
    )
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *special]}, replace_extra_special_tokens=False
    )
    tokenizer.padding_side = "right"
    tokenizer.model_max_length = 2048
    return tokenizer


def _backbone(tokenizer: Qwen2Tokenizer, kv_heads: int, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": (len(tokenizer) + 63) // 64 * 64,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **more,
    }


def _internvl() -> tuple[Any, Any]:
    """InternVL: ViT of 64 patches, pixel shuffle to 16 vision tokens, Qwen2 backbone with as many kv heads as heads."""
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = world_tokenizer(list(named.values()), **named)
    size = {"height": PIXELS, "width": PIXELS}
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=size, crop_to_patches=False, **HALVES),
        tokenizer,
        InternVLVideoProcessor(size=size, **HALVES),
        image_seq_length=16,
        chat_template=CHAT_TEMPLATE.replace("{image}", r"<IMG_CONTEXT>\n"),
    )
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=VISION_HIDDEN,
            intermediate_size=2 * VISION_HIDDEN,
            num_hidden_layers=VISION_BLOCKS,
            num_attention_heads=4,
            attention_bias=True,
            layer_scale_init_value=1.0,
            image_size=(PIXELS, PIXELS),
            patch_size=(14, 14),
        ),
        text_config=Qwen2Config(**_backbone(tokenizer, kv_heads=HEADS)),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    return InternVLForConditionalGeneration(config), processor


@dataclass(frozen=True)
class Tower:
    """A vision tower that gives a token a patch, and which of its hidden states LLaVA reads.

    layer     index into the hidden states: -1 behind the last block, -2 behind the one before
    strategy  "default" leaves out the first token (a class token), "full" nothing
    """

    config: PretrainedConfig
    layer: int
    strategy: str


_TOWER = {
    "hidden_size": VISION_HIDDEN,
    "num_hidden_layers": VISION_BLOCKS,
    "num_attention_heads": 4,
    "image_size": PIXELS,
    "patch_size": 28,
}
SIGLIP = Tower(
    SiglipVisionConfig(**_TOWER, intermediate_size=2 * VISION_HIDDEN, vision_use_head=False), layer=-1, strategy="full"
)
# LLaVA-1.5 reads what comes out of CLIP's second last block: the last serves the class token.
CLIP = Tower(
    CLIPVisionConfig(**_TOWER, intermediate_size=2 * VISION_HIDDEN, hidden_act="quick_gelu"),
    layer=-2,
    strategy="default",
)
DINOV2 = Tower(Dinov2Config(**_TOWER, mlp_ratio=2, layerscale_value=1.0), layer=-1, strategy="default")


def _llava(tower: Tower) -> tuple[Any, Any]:
    """LLaVA-1.5's class: 16 patches are 16 vision tokens. Two of these models differ in the tower alone."""
    tokenizer = world_tokenizer(["<image>"], image_token="<image>")
    size = {"height": PIXELS, "width": PIXELS}
    processor = LlavaProcessor(
        CLIPImageProcessor(size=size, crop_size=size, **HALVES),
        tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy=tower.strategy,
        num_additional_image_tokens=1 if tower.strategy == "default" else 0,
        chat_template=CHAT_TEMPLATE.replace("{image}", r"<image>\n"),
    )
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=Qwen2Config(**_backbone(tokenizer, kv_heads=HEADS)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        vision_feature_layer=tower.layer,
        vision_feature_select_strategy=tower.strategy,
        tie_word_embeddings=False,
    )
    return LlavaForConditionalGeneration(config), processor


def _llava_onevision() -> tuple[Any, Any]:
    """LLaVA-OneVision: SigLIP of 16 patches, base picture and one tile with row ends, 36 vision tokens."""
    tokenizer = world_tokenizer(["<image>", "<video>"], image_token="<image>", video_token="<video>")
    size = {"height": PIXELS, "width": PIXELS}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=[[PIXELS, PIXELS]], **HALVES),
        tokenizer,
        LlavaOnevisionVideoProcessor(size=size, **HALVES),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE.replace("{image}", r"<image>\n"),
    )
    config = LlavaOnevisionConfig(
        vision_config=SIGLIP.config,
        text_config=Qwen2Config(**_backbone(tokenizer, kv_heads=HEADS)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=[[PIXELS, PIXELS]],
        tie_word_embeddings=False,
    )
    return LlavaOnevisionForConditionalGeneration(config), processor


def _qwen2_vl() -> tuple[Any, Any]:
    """Qwen2-VL: ViT of 64 patches merged to 16 vision tokens, multimodal rope, grouped-query attention (4 on 2)."""
    special = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = world_tokenizer(special, image_token="<|image_pad|>", video_token="<|video_pad|>")
    size = {"shortest_edge": PIXELS * PIXELS, "longest_edge": PIXELS * PIXELS}
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(size=size, **HALVES),
        tokenizer,
        Qwen2VLVideoProcessor(size=size, **HALVES),
        chat_template=CHAT_TEMPLATE.replace("{image}", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    config = Qwen2VLConfig(
        text_config=_backbone(tokenizer, kv_heads=HEADS // 2, rope_parameters=rope),
        vision_config={
            "depth": VISION_BLOCKS,
            "embed_dim": VISION_HIDDEN,
            "hidden_size": HIDDEN,
            "num_heads": 4,
            "mlp_ratio": 2,
        },
        tie_word_embeddings=False,
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in zip(names, special, strict=True)},
    )
    return Qwen2VLForConditionalGeneration(config), processor


TOWERS = {"llava_siglip": SIGLIP, "llava_clip": CLIP, "llava_dinov2": DINOV2}
BUILDERS = {
    "internvl": _internvl,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": _qwen2_vl,
    **{name: partial(_llava, tower) for name, tower in TOWERS.items()},
}


def build(family: str, seed: int = 0) -> tuple[Any, Any]:
    """An untrained model of ``family`` (a key of BUILDERS), float32, and its processor."""
    torch.manual_seed(seed)
    model, processor = BUILDERS[family]()
    tokenizer = processor.tokenizer
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=160, do_sample=False
    )
    return model, processor


def save(model: Any, processor: Any, folder: Path) -> None:
    """Write a plain Hugging Face folder in bf16."""
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=BUILDERS)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    save(*build(arguments.family), arguments.output)
