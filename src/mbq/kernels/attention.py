"""Attention of one new token (or a few) over a static cache, which is read where it lies: ``mbq::attention``.

transformers' sdpa copies keys and values to as many heads as the queries have, and pads the mask, in every layer of
every step. ``use_attention`` puts ``attend`` in its place for the language model's decode steps; all else stays sdpa's.
``model.set_attn_implementation("sdpa")``, transformers' own switch, takes it out again.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mbq.errors import MBQError
from mbq.kernels.operator import LIBRARY, current_device

NAME = "mbq"  # of the implementation, in transformers' registers
ROWS = 64  # queries times query heads of one key/value head, at most
NUMBERS = 64 * 128  # rows times dimensions, at most: what a program sums up stays in its registers
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton does, read once
SPECIAL = ("position_bias", "softcap", "s_aux", "cache")  # arguments that only sdpa's own function understands

LIBRARY.define("attention(Tensor query, Tensor key, Tensor value, Tensor mask, float scale) -> Tensor")


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    from mbq.kernels import attention_source as source

    reason = _unfit(query, key, value, mask)
    if reason is not None:
        raise MBQError(f"mbq::attention cannot run this: {reason}.")
    out = _shape_of_attention(query, key, value, mask, scale)
    if out.numel():
        with current_device(query.device):
            source.attention(_dense(query), _dense(key), _dense(value), mask, scale, out)
    return out


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _shape_of_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    batch, heads, queries, dim = query.shape
    return query.new_empty(batch, queries, heads, dim)


LIBRARY.impl("attention", _attention, "CompositeExplicitAutograd")
torch.library.register_fake("mbq::attention", _shape_of_attention, lib=LIBRARY)


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """softmax(query @ key.T * scale where mask) @ value, as [batch, queries, heads, dim] in query's dtype.

    query  [batch, heads, queries, dim]; dim is a power of two from 16 to 256
    key    [batch, kv_heads, positions, dim], and value too; heads is a multiple of kv_heads
    mask   bool [batch or 1, 1, queries, positions]: True is seen. A query that sees nothing gets zeros; what keys and
           values hold where nobody looks does not matter

    Sums are float32 and in a fixed order. No gradient flows. Raises MBQError where it does not fit.
    """
    return torch.ops.mbq.attention(query, key, value, mask, scale)


def _unfit(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> str | None:
    """None if ``attention`` takes these, or why not; cheap, because every layer of every step asks."""
    batch, heads, queries, dim = query.shape
    kv_heads, positions = key.shape[1], key.shape[2]
    if not (query.device == key.device == value.device == mask.device) or not runs(query.device):
        return f"it runs on one GPU, and the query is on {query.device}"
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        return "Triton's interpreter has no products of bfloat16"
    if not (query.dtype == key.dtype == value.dtype) or query.dtype not in DTYPES or mask.dtype != torch.bool:
        return f"it takes floats of one type and a bool mask, and the mask is {mask.dtype}".replace("torch.", "")
    if key.shape != value.shape or key.shape[0] != batch or key.shape[3] != dim or kv_heads == 0 or heads % kv_heads:
        return f"a query {list(query.shape)} does not go with keys {list(key.shape)} and values {list(value.shape)}"
    if mask.shape[0] not in (1, batch) or mask.shape[1:] != (1, queries, positions):
        return f"the mask is {list(mask.shape)}, not {[batch, 1, queries, positions]}"
    rows = heads // kv_heads * queries
    if not _fits(dim) or rows > ROWS or rows * dim > NUMBERS or positions == 0:
        return f"{queries} queries of {heads // kv_heads} heads each, with {dim} dimensions, do not fit"
    return None


def _fits(dim: int) -> bool:
    return 16 <= dim <= 256 and dim & (dim - 1) == 0


def runs(device: torch.device) -> bool:
    return device.type in ("cuda", "xpu") or (INTERPRETED and device.type == "cpu")


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: ``attention`` where a mask says what is seen and it fits, or else sdpa.

    With a static cache every decode step has a mask; a prompt has none, or is too long.
    """
    plain = isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 4 and dropout == 0.0
    plain = plain and all(kwargs.get(name) is None for name in SPECIAL)
    plain = plain and not (torch.is_grad_enabled() and query.requires_grad)
    if plain and attention_mask is not None and _unfit(query, key, value, attention_mask) is None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attention(query, key, value, attention_mask, scale), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)


def use_attention(model: PreTrainedModel) -> bool:
    """Let the language model of ``model`` decode with ``attention``, where it would use sdpa; whether it does.

    Its vision tower keeps its own. Configurations do not save the choice.
    """
    if not runs(model.device) or importlib.util.find_spec("triton") is None:
        return False
    if model.device.type == "cuda" and torch.cuda.get_device_capability(model.device) < (8, 0):
        return False
    language = model.get_decoder()
    if not isinstance(language, PreTrainedModel) or language is model or not language._can_set_attn_implementation():
        return False
    config = language.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if config._attn_implementation != "sdpa" or not _fits(dim):
        return False
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    language.set_attn_implementation(NAME)
    return True
