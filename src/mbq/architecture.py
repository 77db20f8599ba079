"""An architecture is data: where the blocks are, which linears share an input, and what comes before them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearGroup:
    """Linears of one block that read the same input. Names are paths inside the block ("self_attn.q_proj").

    name     "qkv", "o", "gate_up" or "down": the key in search.json
    prev     what is folded into: the norm, or the linear whose output rows are this group's input channels
    linears  the linears that read the input
    inspect  the module whose output the search compares (method.md, "What is compared"); "" is the block
    part     "attn" or "mlp": whose sensitivity weighs the loss
    """

    name: str
    prev: str
    linears: tuple[str, ...]
    inspect: str
    part: str


@dataclass(frozen=True)
class Architecture:
    """One model class as names; ``bind`` checks that every one of them exists.

    model_class     class name of the model, as in config.json's ``architectures``
    blocks          path of the ModuleList of decoder blocks, from the model
    groups          the groups of a block, in the order of the forward pass
    attn_output     path in a block of the linear whose output carries the attention sensitivity (o_proj)
    mlp_output      the same for the MLP (down_proj)
    vision_tower    path of the vision tower, from the model
    projector       path of the projector, or None where it is inside the tower
    kept            paths that stay 16-bit although they hold linears (tower, projector, lm_head): compressed-tensors `ignore`
    vision_tokens   config attributes that hold the ids of vision tokens ("image_token_id", "video_token_id")
    fused_qkv       the group "qkv" is one fused linear with interleaved rows (InternLM2's wqkv)
    """

    model_class: str
    blocks: str
    groups: tuple[LinearGroup, ...]
    attn_output: str
    mlp_output: str
    vision_tower: str
    projector: str | None
    kept: tuple[str, ...]
    vision_tokens: tuple[str, ...]
    fused_qkv: bool = False
