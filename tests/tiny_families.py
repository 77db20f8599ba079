"""Random two-block models of further families, with real processors: what tests/tiny.py is to the first four.

``tiny(family)`` returns ``(model, processor)``; ``BUILDERS`` has their names. Blocks are 64 channels wide, two heads of
32; but for LLaVA-1.5's they share one head of keys and values. Llama 3.2 Vision's are three.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GenerationConfig,
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vImageProcessor,
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    Glm4vProcessor,
    Glm4vVideoProcessor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    Lfm2Config,
    Lfm2VlConfig,
    Lfm2VlForConditionalGeneration,
    Lfm2VlImageProcessor,
    Lfm2VlProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaImageProcessor,
    MllamaProcessor,
    OPTConfig,
    PixtralImageProcessor,
    PixtralProcessor,
    PixtralVisionConfig,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    Siglip2VisionConfig,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from mbq.blip2 import adapt
from tests import tiny as first
from tests.tiny import CHATML_TEMPLATE, QWEN2_VL_TEMPLATE, QWEN_IDS, randomize, tokenizer

HIDDEN = 64


def template(image: str) -> str:
    """A conversation format that writes ``image`` where a picture is."""
    return CHATML_TEMPLATE.replace("FIRST\n", "").replace("IMAGE", image)


def text_config(tokens: Any, kv_heads: int = 1, **more: Any) -> dict[str, Any]:
    """The arguments that the configurations of all language models share."""
    return {
        "vocab_size": len(tokens),
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": HIDDEN // 32,
        "num_key_value_heads": kv_heads,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "bos_token_id": None,
        "eos_token_id": tokens.eos_token_id,
        "pad_token_id": tokens.pad_token_id,
        "tie_word_embeddings": False,
        **more,
    }


def _vision(**more: Any) -> dict[str, Any]:
    """Those of vision towers."""
    return {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 28,
        **more,
    }


def _qwen(
    config_class: type, model_class: type, processor: type, videos: type, vision: Any, mrope: Any, **text: Any
) -> Any:
    special = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokens = tokenizer(special, image_token="<|image_pad|>", video_token="<|video_pad|>")
    size = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    patch = {"patch_size": vision["patch_size"]}
    ids = {name: tokens.convert_tokens_to_ids(token) for name, token in zip(QWEN_IDS, special, strict=True)}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6], **mrope}
    shared = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": HIDDEN}
    config = config_class(
        text_config=text_config(tokens, rope_parameters=rope, **text), vision_config={**shared, **vision}, **ids
    )
    images = Qwen2VLImageProcessor(size=size, **patch)
    return model_class(config), processor(images, tokens, videos(size=size, **patch), chat_template=QWEN2_VL_TEMPLATE)


def _qwen2_5_vl() -> tuple[Any, Any]:
    """One block of the tower attends within windows of 28 pixels, one to everything."""
    vision = {"patch_size": 14, "window_size": 28, "fullatt_block_indexes": [1]}
    classes = (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, Qwen2VLVideoProcessor)
    return _qwen(*classes, vision, {})


def _qwen3_vl() -> tuple[Any, Any]:
    """What the tower's first block gives is added behind the first decoder block, its last's behind the second."""
    vision = {"patch_size": 14, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    classes = (Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor, Qwen3VLVideoProcessor)
    return _qwen(*classes, vision, {"mrope_interleaved": True, "mrope_section": [6, 5, 5]})


# A token goes to two of five experts.
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": HIDDEN // 2}


def _qwen3_vl_moe() -> tuple[Any, Any]:
    """A block with a dense MLP, and one with experts."""
    vision = {"patch_size": 14, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    classes = (Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration, Qwen3VLProcessor, Qwen3VLVideoProcessor)
    return _qwen(*classes, vision, {"mrope_interleaved": True}, num_experts=5, mlp_only_layers=[0], **EXPERTS)


def _qwen3_5(config_class: type, model_class: type, **more: Any) -> tuple[Any, Any]:
    """A block with a delta net of two key heads and four value heads, and one with attention."""
    vision = {"patch_size": 14, "num_position_embeddings": 16}
    net = {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2}
    text = {**net, "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"], **more}
    classes = (config_class, model_class, Qwen3VLProcessor, Qwen3VLVideoProcessor)
    return _qwen(*classes, vision, {"mrope_interleaved": True, "mrope_section": [2, 1, 1]}, **text)


def _llava() -> tuple[Any, Any]:
    tokens = tokenizer(["<image>"], image_token="<image>")
    side = {"height": 56, "width": 56}
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=side),
        tokens,
        patch_size=28,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template(r"<image>\n"),
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_vision()),
        text_config=LlamaConfig(**text_config(tokens, kv_heads=2)),
        image_token_index=tokens.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
    )
    return LlavaForConditionalGeneration(config), processor


def _llava_next(text: type, **more: Any) -> tuple[Any, Any]:
    tokens = tokenizer(["<image>"], image_token="<image>")
    side, grid = {"height": 56, "width": 56}, [[56, 112], [112, 56]]
    processor = LlavaNextProcessor(
        LlavaNextImageProcessor(size={"shortest_edge": 56}, crop_size=side, image_grid_pinpoints=grid),
        tokens,
        patch_size=28,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template(r"<image>\n"),
    )
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**_vision()),
        text_config=text(**text_config(tokens), **more),
        image_token_index=tokens.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=grid,
        image_seq_length=4,
    )
    return LlavaNextForConditionalGeneration(config), processor


def _pixtral_parts(patch: int, merge: int) -> tuple[Any, Any, PixtralVisionConfig]:
    tokens = tokenizer(["[IMG]", "[IMG_BREAK]", "[IMG_END]"], image_token="[IMG]")
    processor = PixtralProcessor(
        PixtralImageProcessor(size={"longest_edge": 56}, patch_size={"height": patch, "width": patch}),
        tokens,
        patch_size=patch,
        spatial_merge_size=merge,
        chat_template=template("[IMG]"),
    )
    return tokens, processor, PixtralVisionConfig(**_vision(patch_size=patch))


def _pixtral() -> tuple[Any, Any]:
    """As published for transformers: LLaVA's class with Pixtral's tower."""
    tokens, processor, vision = _pixtral_parts(patch=28, merge=1)
    config = LlavaConfig(
        vision_config=vision,
        text_config=MistralConfig(**text_config(tokens, sliding_window=None)),
        image_token_index=tokens.convert_tokens_to_ids("[IMG]"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return LlavaForConditionalGeneration(config), processor


def _mistral3() -> tuple[Any, Any]:
    tokens, processor, vision = _pixtral_parts(patch=14, merge=2)
    config = Mistral3Config(
        vision_config=vision,
        text_config=MistralConfig(**text_config(tokens, sliding_window=None)),
        image_token_index=tokens.convert_tokens_to_ids("[IMG]"),
        tie_word_embeddings=False,
    )
    return Mistral3ForConditionalGeneration(config), processor


def _idefics3(config_class: type, model_class: type) -> tuple[Any, Any]:
    """SmolVLM gets Idefics3's processor: its own needs a package that reads out numbers (of videos' frames)."""
    cells = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    special = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *cells]
    tokens = tokenizer(special, image_token="<image>")
    processor = Idefics3Processor(
        Idefics3ImageProcessor(size={"longest_edge": 112}, max_image_size={"longest_edge": 56}),
        tokens,
        image_seq_len=4,
        chat_template=template("<image>"),
    )
    config = config_class(
        vision_config=_vision(patch_size=14),
        text_config=LlamaConfig(**text_config(tokens)),
        image_token_id=tokens.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    return model_class(config), processor


def _gemma3() -> tuple[Any, Any]:
    """Embeddings are the head, as published; one block attends within a window, one to everything."""
    named = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokens = tokenizer(list(named.values()), **named)
    processor = Gemma3Processor(
        Gemma3ImageProcessor(size={"height": 56, "width": 56}),
        tokens,
        chat_template=template("<start_of_image>"),
        image_seq_length=4,
    )
    ids = {f"{name}_index": tokens.convert_tokens_to_ids(token) for name, token in named.items()}
    text = text_config(tokens, query_pre_attn_scalar=32, sliding_window=16)
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**_vision(patch_size=14), vision_use_head=False),
        text_config={**text, "layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": True},
        mm_tokens_per_image=4,
        tie_word_embeddings=True,
        **ids,
    )
    return Gemma3ForConditionalGeneration(config), processor


def _glm4v(config_class: type, model_class: type, sections: list[int], **more: Any) -> tuple[Any, Any]:
    special = ["<|begin_of_image|>", "<|image|>", "<|end_of_image|>"]
    special += [token.replace("image", "video") for token in special]
    tokens = tokenizer(special, image_token="<|image|>", video_token="<|video|>")
    size = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    processor = Glm4vProcessor(
        Glm4vImageProcessor(size=size),
        tokens,
        Glm4vVideoProcessor(size=size),
        chat_template=template("".join(special[:3])),
    )
    names = ("image_start_token_id", "image_token_id", "image_end_token_id")
    names += tuple(name.replace("image", "video") for name in names)
    text = text_config(tokens, rope_parameters={"rope_theta": 10000.0, "mrope_section": sections}, **more)
    del text["head_dim"]
    config = config_class(
        text_config=text,
        vision_config={"depth": 2, "num_heads": 2, "hidden_size": 32, "out_hidden_size": HIDDEN,
                       "intermediate_size": 64, "image_size": 56},
        **dict(zip(names, tokens.convert_tokens_to_ids(special), strict=True)),
    )  # fmt: skip
    return model_class(config), processor


def _lfm2_vl() -> tuple[Any, Any]:
    """A block with a convolution, and one with attention."""
    tokens = tokenizer(["<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"])
    images = Lfm2VlImageProcessor(
        do_image_splitting=False, encoder_patch_size=14, min_image_tokens=4, max_image_tokens=4, tile_size=56
    )
    text = text_config(tokens, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False)
    config = Lfm2VlConfig(
        vision_config=Siglip2VisionConfig(**_vision(patch_size=14, num_patches=16), vision_use_head=False),
        text_config=Lfm2Config(**text),
        image_token_id=tokens.convert_tokens_to_ids("<image>"),
        projector_hidden_size=32,
        tie_word_embeddings=False,
    )
    return Lfm2VlForConditionalGeneration(config), Lfm2VlProcessor(images, tokens, chat_template=template("<image>"))


def _blip2() -> tuple[Any, Any]:
    """Blocks are as wide as ever; four queries look at a picture."""
    tokens = tokenizer(["<image>"])
    side = {"height": 56, "width": 56}
    processor = Blip2Processor(BlipImageProcessor(size=side), tokens, num_query_tokens=4)
    adapt(processor)
    config = Blip2Config(
        vision_config=_vision(),
        qformer_config=_vision(cross_attention_frequency=1),
        text_config=OPTConfig(
            vocab_size=len(tokens),
            hidden_size=HIDDEN,
            word_embed_proj_dim=HIDDEN,
            ffn_dim=2 * HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=2,
            dropout=0.0,
            bos_token_id=tokens.eos_token_id,
            eos_token_id=tokens.eos_token_id,
            pad_token_id=tokens.pad_token_id,
        ),
        num_query_tokens=4,
        image_token_index=tokens.convert_tokens_to_ids("<image>"),
    )
    return Blip2ForConditionalGeneration(config), processor


def _mllama() -> tuple[Any, Any]:
    """A block with cross-attention between two with self-attention; the image token has an embedding, but no logit."""
    tokens = tokenizer(["<|python_tag|>", "<|begin_of_text|>", "<|image|>"])
    tokens.bos_token = "<|begin_of_text|>"
    begin = "{%- if loop.first %}{{- '<|begin_of_text|>' }}{%- endif %}\n"
    processor = MllamaProcessor(
        MllamaImageProcessor(size={"height": 56, "width": 56}, max_image_tiles=2),
        tokens,
        chat_template=CHATML_TEMPLATE.replace("FIRST\n", begin).replace("IMAGE", "<|image|>"),
    )
    vision = {
        **_vision(num_hidden_layers=1, num_global_layers=1),
        "max_num_tiles": 2,
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        "intermediate_layers_indices": [0],
        "vision_output_dim": 64,
    }
    image = tokens.convert_tokens_to_ids("<|image|>")
    more = {"vocab_size": image, "num_hidden_layers": 3, "cross_attention_layers": [1]}
    text = {**text_config(tokens, bos_token_id=tokens.bos_token_id), **more}
    config = MllamaConfig(
        vision_config={**vision, "attention_heads": vision.pop("num_attention_heads")},
        text_config=text,
        image_token_index=image,
    )
    return MllamaForConditionalGeneration(config), processor


BUILDERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "qwen3_vl_moe": _qwen3_vl_moe,
    "qwen3_5": lambda: _qwen3_5(Qwen3_5Config, Qwen3_5ForConditionalGeneration),
    "qwen3_5_moe": lambda: _qwen3_5(
        Qwen3_5MoeConfig,
        Qwen3_5MoeForConditionalGeneration,
        num_experts=5,
        shared_expert_intermediate_size=HIDDEN,
        **EXPERTS,
    ),
    "llava": _llava,
    "llava_next": lambda: _llava_next(LlamaConfig),
    "llava_next_mistral": lambda: _llava_next(MistralConfig, sliding_window=None),
    "internvl3": lambda: first.tiny("internvl", hidden=HIDDEN, kv_heads=1, text="qwen2"),
    "internvl3_5": lambda: first.tiny("internvl", hidden=HIDDEN, kv_heads=1, text="qwen3"),
    "internvl3_5_moe": lambda: first.tiny("internvl", hidden=HIDDEN, kv_heads=1, text="qwen3_moe"),
    "pixtral": _pixtral,
    "mistral3": _mistral3,
    "gemma3": _gemma3,
    "glm4v": lambda: _glm4v(Glm4vConfig, Glm4vForConditionalGeneration, [4, 6, 6]),
    "glm4v_moe": lambda: _glm4v(
        Glm4vMoeConfig, Glm4vMoeForConditionalGeneration, [2, 3, 3], n_routed_experts=5, **EXPERTS
    ),
    "blip2": _blip2,
    "lfm2_vl": _lfm2_vl,
    "mllama": _mllama,
    "idefics3": lambda: _idefics3(Idefics3Config, Idefics3ForConditionalGeneration),
    "smolvlm": lambda: _idefics3(SmolVLMConfig, SmolVLMForConditionalGeneration),
}


def tiny(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A random model of ``family`` in eval mode, and its processor."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, processor = BUILDERS[family]()
        randomize(model)
    tokens = processor.tokenizer
    model.generation_config = GenerationConfig(eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id)
    model.config.architectures = [type(model).__name__]
    return model.to(dtype).eval(), processor
