"""The configuration of the whole model and of its vision tower, with the field names of published folders."""

from typing import Any

from transformers import LlamaConfig, PretrainedConfig, Qwen2Config

from .configuration_internlm2 import InternLM2Config

LANGUAGE_MODELS = {
    "InternLM2ForCausalLM": InternLM2Config,
    "Qwen2ForCausalLM": Qwen2Config,
    "LlamaForCausalLM": LlamaConfig,
}


class InternVisionConfig(PretrainedConfig):
    model_type = "intern_vit_6b"

    def __init__(
        self,
        hidden_size: int = 1024,
        intermediate_size: int = 4096,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        image_size: int = 448,
        patch_size: int = 14,
        qkv_bias: bool = True,
        layer_norm_eps: float = 1e-6,
        **more: Any,
    ) -> None:
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.image_size = image_size
        self.patch_size = patch_size
        self.qkv_bias = qkv_bias
        self.layer_norm_eps = layer_norm_eps
        super().__init__(**more)


class InternVLChatConfig(PretrainedConfig):
    model_type = "internvl_chat"
    is_composition = True

    def __init__(
        self,
        vision_config: dict[str, Any] | None = None,
        llm_config: dict[str, Any] | None = None,
        select_layer: int = -1,
        force_image_size: int | None = None,
        downsample_ratio: float = 0.5,
        template: str | None = None,
        dynamic_image_size: bool = False,
        use_thumbnail: bool = False,
        ps_version: str = "v2",
        min_dynamic_patch: int = 1,
        max_dynamic_patch: int = 6,
        **more: Any,
    ) -> None:
        language = dict(llm_config or {"architectures": ["InternLM2ForCausalLM"]})
        self.vision_config = InternVisionConfig(**(vision_config or {}))
        self.llm_config = LANGUAGE_MODELS[language["architectures"][0]](**language)
        self.select_layer = select_layer
        self.force_image_size = force_image_size
        self.downsample_ratio = downsample_ratio
        self.template = template
        self.dynamic_image_size = dynamic_image_size
        self.use_thumbnail = use_thumbnail
        self.ps_version = ps_version
        self.min_dynamic_patch = min_dynamic_patch
        self.max_dynamic_patch = max_dynamic_patch
        super().__init__(**more)

    def to_dict(self) -> dict[str, Any]:
        return {
            **super().to_dict(),
            "vision_config": self.vision_config.to_dict(),
            "llm_config": self.llm_config.to_dict(),
        }
