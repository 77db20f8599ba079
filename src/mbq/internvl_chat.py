"""The original InternVL2 folders (class InternVLChatModel): they bring a model and a tokenizer, but no processor.

Transformers' own InternVLProcessor tiles, normalises and expands images in the way of the original code's ``chat``;
``processor_for`` configures it from the folder. ``adapt`` lets the model be called like any other of transformers.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

from mbq.errors import MBQError

MODEL_CLASS = "InternVLChatModel"
TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",  # videos are not offered; the processor wants a name
}
IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]

# The conversation format of InternVL2's language models, without the system message that `chat` puts before it.
CHAT_TEMPLATE = r"""{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\n' }}
{%- if message['content'] is string %}
{{- message['content'] }}
{%- else %}
{%- for part in message['content'] %}
{%- if part['type'] == 'image' %}{{- '<IMG_CONTEXT>\n' }}{%- else %}{{- part['text'] }}{%- endif %}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""


def processor_for(config: dict[str, Any], tokenizer: Any) -> InternVLProcessor:
    """A processor with the tile size, tile count and image tokens of ``config`` (the folder's config.json).

    Raises MBQError if the tokenizer lacks the image tokens, or the ChatML tokens of the conversation format.
    """
    for token in (*list(TOKENS.values())[:3], "<|im_start|>", "<|im_end|>"):
        if token not in tokenizer.get_vocab():
            raise MBQError(f"The tokenizer has no token {token}; give an InternVL2 folder with its own tokenizer.")
    for name, token in TOKENS.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.get_vocab().get(token))
    vision = config["vision_config"]
    size = config.get("force_image_size") or vision["image_size"]
    tokens_per_tile = int((size // vision["patch_size"]) ** 2 * config.get("downsample_ratio", 0.5) ** 2)
    side = {"height": size, "width": size}
    image_processor = GotOcr2ImageProcessor(
        size=side,
        crop_to_patches=bool(config.get("dynamic_image_size", True)),
        min_patches=config.get("min_dynamic_patch", 1),
        max_patches=config.get("max_dynamic_patch", 12),
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
    )
    return InternVLProcessor(
        image_processor,
        tokenizer,
        InternVLVideoProcessor(size=side),
        image_seq_length=tokens_per_tile,
        chat_template=CHAT_TEMPLATE,
    )


def adapt(model: Any, tokenizer: Any) -> None:
    """Make ``model`` take what the processor gives, in place.

    The original code learns the image token's id from the tokenizer only in ``chat``; its ``forward`` wants
    ``image_flags`` (1 for a tile that counts), and pixels even for plain text, in the model's own dtype; its
    ``generate`` leaves the prompt out.
    """
    model.img_context_token_id = tokenizer.convert_tokens_to_ids(TOKENS["context_image_token"])
    model.register_forward_pre_hook(_fill_in, with_kwargs=True)
    model.generate = MethodType(_generate, model)  # a method, so that a deep copy of the model calls itself


def _generate(model: Any, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
    return torch.cat([input_ids, type(model).generate(model, input_ids=input_ids, **options)], dim=1)


def _fill_in(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args or kwargs.get("image_flags") is not None:
        return args, kwargs
    pixels = kwargs.get("pixel_values")
    flag = int(pixels is not None)
    weight = next(model.parameters())
    if pixels is None:
        config: Any = model.config
        size = config.force_image_size or config.vision_config.image_size
        pixels = torch.zeros(1, 3, size, size, device=weight.device)
    pixels = pixels.to(weight.dtype)
    flags = torch.full((len(pixels), 1), flag, dtype=torch.long, device=pixels.device)
    return args, {**kwargs, "pixel_values": pixels, "image_flags": flags}
