"""The 7B vision-language models of the decode step's benchmark: published configurations, random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipVisionConfig,
)

from mbq.architecture import bind
from mbq.checkpoint.compressed_tensors import quantization_config, replace_linears
from mbq.fuse import FusedLinear, use_kernel
from mbq.kernels.operator import linear
from mbq.kernels.packed import PackedWeight, unpack_weight
from mbq.qlinear import QuantLinear
from mbq.qtensor import dequantize
from mbq.scheme import scheme_named

STD = 0.02  # of random weights, as the configurations say

BACKBONE = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "initializer_range": STD,
    "use_sliding_window": False,
    "sliding_window": None,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "pad_token_id": None,
}


def llava_onevision() -> Any:
    """LLaVA-OneVision-7B: its class and configuration."""
    rope = {"rope_type": "default", "rope_theta": 1e6}
    text = Qwen2Config(**{**BACKBONE, "vocab_size": 152128, "rope_parameters": rope})
    vision = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=26,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
        vision_use_head=False,
    )
    sides = range(384, 2305, 384)
    config = LlavaOnevisionConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=151646,
        video_token_index=151647,
        image_grid_pinpoints=[[height, width] for height in sides for width in sides],
        tie_word_embeddings=False,
    )
    return LlavaOnevisionForConditionalGeneration, config


def qwen2_vl() -> Any:
    """Qwen2-VL-7B-Instruct: its class and configuration."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text = {**BACKBONE, "vocab_size": 152064, "rope_parameters": rope}
    vision = {"depth": 32, "embed_dim": 1280, "hidden_size": text["hidden_size"], "num_heads": 16, "mlp_ratio": 4}
    config = Qwen2VLConfig(
        text_config=text,
        vision_config={**vision, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2},
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        image_token_id=151655,
        video_token_id=151656,
        tie_word_embeddings=False,
    )
    return Qwen2VLForConditionalGeneration, config


FAMILIES: dict[str, Callable[[], Any]] = {"llava_onevision": llava_onevision, "qwen2_vl": qwen2_vl}


class Nothing:
    """A kernel that launches nothing; its output is memory as it comes."""

    @staticmethod
    def linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
        return x.new_empty(*x.shape[:-1], weight.shape[0])


class NoHead(nn.Module):
    """In the place of lm_head: its shape, and no product."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.words = torch.zeros(1, dtype=torch.int32, device=head.weight.device)
        self.scale = torch.ones(1, dtype=head.weight.dtype, device=head.weight.device)
        self.shape = (head.out_features, head.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = PackedWeight(self.words, self.scale, None, self.shape, scheme_named("W3A16"))
        return linear(x, weight, None, "nothing")


def build(family: str) -> Any:
    """The bf16 model with random weights, which never stops early."""
    model_class, config = FAMILIES[family]()
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = model_class._from_config(config, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval().requires_grad_(False)


@torch.no_grad()
def quantized(model: Any, bits: int, kernel: str) -> tuple[Any, list[tuple[QuantLinear, torch.Tensor]]]:
    """``model`` with random packed weights in the modules of ``mbq.load``.

    Also the first block's layers that run, each with the float32 weight [out, in] that it stands for.
    """
    names = replace_linears(
        model, quantization_config(scheme_named(f"W{bits}A16"), list(bind(model).architecture.kept))
    )
    step = STD / (2 * (4**bits - 1) / 12) ** 0.5  # the difference of two random codes has this many units of spread
    first: dict[str, torch.Tensor] = {}
    for name in names:
        layer = model.get_submodule(name)
        for words in (layer.weight_packed, layer.weight_zero_point):
            words.copy_(torch.randint(-(2**31), 2**31, words.shape, dtype=torch.int32, device=words.device))
        layer.weight_scale.copy_(torch.empty_like(layer.weight_scale, dtype=torch.float32).uniform_(0.5, 1.5) * step)
        layer.weight_shape.copy_(torch.tensor([layer.out_features, layer.in_features]))
        if layer.bias is not None:
            layer.bias.normal_(std=STD)
        if ".layers.0." in name:
            first[name] = dequantize(unpack_weight(layer.packed)).float()
    use_kernel(model, kernel)
    pairs, seen = [], set()
    for name in first:
        module = model.get_submodule(name)
        if isinstance(module, QuantLinear):
            pairs.append((module, first[name]))
        elif module.fused not in seen:
            seen.add(module.fused)
            assert isinstance(module.fused, FusedLinear)
            parts = [each for each in first if getattr(model.get_submodule(each), "fused", None) is module.fused]
            pairs.append((module.fused.layer, torch.cat([first[each] for each in parts])))
    return model, pairs
