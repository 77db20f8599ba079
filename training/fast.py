"""The reference models' forward pass for batches of one shape: same weights, same function, no per-image loops."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mbq.world.scene import paint, sprites
from training.build import TOWERS


def pixels(cell: torch.Tensor, atlas: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[n, 16] cells to [n, 3, 112, 112] normalised as the processors do (mean and deviation 0.5)."""
    return (paint(cell, atlas).permute(0, 3, 1, 2).to(dtype) / 127.5 - 1).contiguous()


def internvl_features(model: Any, images: torch.Tensor) -> torch.Tensor:
    """[n, 16, hidden]: ViT, pixel shuffle, projector."""
    inner = model.model
    patches = inner.vision_tower(pixel_values=images).last_hidden_state[:, 1:]
    side = int(patches.shape[1] ** 0.5)
    shuffled = inner.pixel_shuffle(patches.reshape(len(patches), side, side, -1), scale_factor=0.5)
    return inner.multi_modal_projector(shuffled.reshape(len(patches), -1, shuffled.shape[-1]))


def llava_onevision_features(model: Any, images: torch.Tensor) -> torch.Tensor:
    """[n, 36, hidden]: the base picture, then its one tile (the same pixels) with a row end after each row of four."""
    inner = model.model
    hidden = inner.vision_tower(images, output_hidden_states=True).hidden_states[-1]
    base = inner.multi_modal_projector(hidden)
    count, tokens, width = base.shape
    side = int(tokens**0.5)
    newline = inner.image_newline.to(base.dtype).expand(count, side, 1, width)
    tile = torch.cat([base.view(count, side, side, width), newline], dim=2).flatten(1, 2)
    return torch.cat([base, tile], dim=1)


def llava_features(model: Any, images: torch.Tensor) -> torch.Tensor:
    """[n, 16, hidden]: the tower's hidden states of the layer that the configuration names, projector."""
    inner, config = model.model, model.config
    hidden = inner.vision_tower(images, output_hidden_states=True).hidden_states[config.vision_feature_layer]
    first = 1 if config.vision_feature_select_strategy == "default" else 0  # behind the class token
    return inner.multi_modal_projector(hidden[:, first:])


def qwen2_vl_features(model: Any, images: torch.Tensor) -> torch.Tensor:
    """[n, 16, hidden]: the ViT with attention batched over pictures of one size."""
    visual = model.model.visual
    config = visual.config
    count, patch, merge = len(images), config.patch_size, config.spatial_merge_size
    side = images.shape[-1] // patch
    grid = images.view(count, 3, side // merge, merge, patch, side // merge, merge, patch)
    flat = grid.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6).expand(*[-1] * 6, config.temporal_patch_size, -1, -1)
    hidden = visual.patch_embed(flat.reshape(count * side * side, -1)).view(count, side * side, -1)
    cos, sin = model.vision_rope
    for block in visual.blocks:
        hidden = hidden + _vision_attention(block.attn, block.norm1(hidden), cos, sin)
        hidden = hidden + block.mlp(block.norm2(hidden))
    return visual.merger(hidden.flatten(0, 1)).view(count, side * side // merge**2, -1)


def _vision_attention(attention: Any, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    count, tokens, _ = hidden.shape
    query, key, value = attention.qkv(hidden).view(count, tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = x.float().chunk(2, dim=-1)
        return (x.float() * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)

    mixed = F.scaled_dot_product_attention(rotate(query), rotate(key), value)
    return attention.proj(mixed.transpose(1, 2).reshape(count, tokens, -1))


FEATURES = {
    "internvl": internvl_features,
    "llava_onevision": llava_onevision_features,
    "qwen2_vl": qwen2_vl_features,
    **dict.fromkeys(TOWERS, llava_features),
}


class FastModel(nn.Module):
    """``forward(tokens, cell) -> logits`` at the label positions of a BatchMaker's batches."""

    def __init__(self, family: str, model: Any, processor: Any, length: int) -> None:
        super().__init__()
        self.model, self.features = model, FEATURES[family]
        device = next(model.parameters()).device
        self.register_buffer("atlas", sprites().to(device), persistent=False)
        image, text, self.first, self.vision = _positions(model, processor, length)
        self.register_buffer("image_rope", torch.stack(image), persistent=False)
        self.register_buffer("text_rope", torch.stack(text), persistent=False)

    def forward(
        self, tokens: torch.Tensor, cell: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        language = self.model.model.language_model
        hidden = language.embed_tokens(tokens)
        pictured, length = len(cell), tokens.shape[1]
        dtype = (
            torch.get_autocast_dtype(hidden.device.type)
            if torch.is_autocast_enabled(hidden.device.type)
            else hidden.dtype
        )
        hidden = hidden.to(dtype)
        if pictured:
            features = self.features(self.model, pixels(cell, self.atlas, dtype)).to(dtype)
            image = torch.cat(
                [hidden[:pictured, : self.first], features, hidden[:pictured, self.first + self.vision :]], dim=1
            )
            hidden = torch.cat([image, hidden[pictured:]])
        cos, sin = torch.cat(
            [
                self.image_rope[:, :, :length].expand(-1, pictured, -1, -1),
                self.text_rope[:, :, :length].expand(-1, len(tokens) - pictured, -1, -1),
            ],
            dim=1,
        ).to(dtype)
        for layer in language.layers:
            hidden = layer(hidden, attention_mask=None, position_embeddings=(cos, sin))
        return self.model.lm_head(language.norm(hidden[rows, positions]))


@torch.no_grad()
def _positions(model: Any, processor: Any, length: int) -> tuple[Any, Any, int, int]:
    """Rotary (cos, sin) of rows with and without a picture, and where the vision tokens stand, by the model."""
    from PIL import Image

    from mbq.world.scene import PIXELS

    device = next(model.parameters()).device
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    layer = model.model.language_model.layers[0]
    hook = layer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_embeddings"]), with_kwargs=True
    )
    vision = getattr(model.model, "visual", None)
    rope: list[Any] = []
    vision_hook = vision and vision.blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: rope.append(kwargs["position_embeddings"]), with_kwargs=True
    )
    tokens = []
    for pictures in ([Image.new("RGB", (PIXELS, PIXELS))], None):
        content = [{"type": "text", "text": " the" * length}]
        if pictures:
            content.insert(0, {"type": "image"})
        text = processor.apply_chat_template([{"role": "user", "content": content}])
        inputs = processor(text=[text], images=pictures, return_tensors="pt").to(device)
        tokens.append(inputs["input_ids"][0])
        model(**inputs)
    hook.remove()
    if vision is not None:
        vision_hook.remove()
        cos, sin = (part.float() for part in rope[0])
        model.vision_rope = (cos, sin)
    ids = {
        getattr(model.config, name) for name in ("image_token_id", "image_token_index") if hasattr(model.config, name)
    }
    where = torch.isin(tokens[0], torch.tensor(list(ids), device=device)).nonzero()[:, 0]
    image, text_only = ([part[:, :length].float() for part in pair] for pair in seen)
    return image, text_only, int(where[0]), len(where)
