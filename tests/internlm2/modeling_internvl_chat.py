"""A model with the structure of the original InternVL2 remote code, written for the tests.

As in the published code, the id of the image token is no part of the config (``chat`` sets ``img_context_token_id``
from the tokenizer), ``forward`` wants ``image_flags``, and ``generate`` returns the new tokens alone.
"""

from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel, Qwen2ForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_internvl_chat import InternVLChatConfig
from .modeling_intern_vit import InternVisionModel
from .modeling_internlm2 import InternLM2ForCausalLM

LANGUAGE_MODELS = {
    "InternLM2ForCausalLM": InternLM2ForCausalLM,
    "Qwen2ForCausalLM": Qwen2ForCausalLM,
    "LlamaForCausalLM": LlamaForCausalLM,
}


class InternVLChatModel(PreTrainedModel):
    config_class = InternVLChatConfig
    main_input_name = "pixel_values"
    _no_split_modules = ("InternVisionEncoderLayer", "InternLM2DecoderLayer", "Qwen2DecoderLayer", "LlamaDecoderLayer")

    def __init__(self, config: InternVLChatConfig) -> None:
        super().__init__(config)
        image_size = config.force_image_size or config.vision_config.image_size
        self.select_layer = config.select_layer
        self.downsample_ratio = config.downsample_ratio
        patches = image_size // config.vision_config.patch_size
        self.num_image_token = int(patches**2 * config.downsample_ratio**2)
        self.vision_model = InternVisionModel(config.vision_config)
        self.language_model = LANGUAGE_MODELS[config.llm_config.architectures[0]](config.llm_config)
        vit_hidden = config.vision_config.hidden_size * int(1 / config.downsample_ratio) ** 2
        llm_hidden = config.llm_config.hidden_size
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(vit_hidden), nn.Linear(vit_hidden, llm_hidden), nn.GELU(), nn.Linear(llm_hidden, llm_hidden)
        )
        self.img_context_token_id = None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def pixel_shuffle(self, x: torch.Tensor) -> torch.Tensor:
        """[tile, row, column, channel] with every two by two patches side by side in one."""
        step = int(1 / self.downsample_ratio)
        tiles, rows, columns, channels = x.shape
        x = x.view(tiles, rows // step, step, columns // step, step, channels)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(tiles, rows // step, columns // step, step * step * channels)

    def extract_feature(self, pixel_values: torch.Tensor) -> torch.Tensor:
        features = self.vision_model(pixel_values).last_hidden_state[:, 1:]
        side = int(features.shape[1] ** 0.5)
        shuffled = self.pixel_shuffle(features.view(len(features), side, side, -1))
        return self.mlp1(shuffled.flatten(1, 2))

    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        image_flags: torch.Tensor | None = None,
        past_key_values: Any = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast:
        image_flags = image_flags.squeeze(-1)
        embeddings = self.get_input_embeddings()(input_ids).clone()
        features = self.extract_feature(pixel_values)[image_flags == 1]
        embeddings = self._insert(embeddings, input_ids, features)
        outputs = self.language_model(
            inputs_embeds=embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=outputs.logits, past_key_values=outputs.past_key_values)

    def _insert(self, embeddings: torch.Tensor, input_ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        chosen = input_ids == self.img_context_token_id
        filled = embeddings.clone()
        filled[chosen] = features.flatten(0, 1).to(embeddings)
        return filled

    @torch.no_grad()
    def generate(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        embeddings = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            embeddings = self._insert(embeddings, input_ids, self.extract_feature(pixel_values))
        return self.language_model.generate(inputs_embeds=embeddings, attention_mask=attention_mask, **options)
