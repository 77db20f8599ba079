"""Attention over a static cache: the kernel against float64, and inside transformers' models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import mbq
from mbq.errors import MBQError
from mbq.kernels import attention as module
from mbq.kernels.attention import NAME, attend, attention, use_attention
from tests import tiny

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}  # weights and results are rounded
CASES = [
    # batch, kv_heads, groups, queries, dim, positions, dtype
    (1, 4, 7, 1, 128, 1024, torch.bfloat16),
    (1, 2, 7, 1, 128, 100, torch.float16),
    (2, 2, 4, 1, 64, 37, torch.float32),
    (3, 1, 8, 1, 64, 129, torch.bfloat16),
    (3, 3, 1, 1, 128, 31, torch.float16),
    (2, 2, 7, 5, 128, 67, torch.float32),
    (2, 2, 1, 16, 64, 70, torch.float16),
    (1, 2, 8, 3, 32, 1, torch.float32),
    (1, 1, 2, 1, 16, 2500, torch.float32),
    (1, 1, 3, 2, 256, 40, torch.float32),
    (1, 4, 7, 1, 128, 1024, torch.float16),
    (3, 1, 8, 1, 64, 129, torch.float16),
]


def case(
    batch: int, kv_heads: int, groups: int, queries: int, dim: int, positions: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key, value and mask of a cache that is filled to a random length, padded on the left, else NaN."""
    random = torch.Generator().manual_seed(positions + dim)
    made = [torch.randn(batch, heads, n, dim, generator=random).to(dtype)
            for heads, n in ((kv_heads * groups, queries), (kv_heads, positions), (kv_heads, positions))]  # fmt: skip
    at = torch.arange(positions)
    mask = torch.zeros(batch, 1, queries, positions, dtype=torch.bool)
    for row in mask:
        length = int(torch.randint(min(queries, positions), positions + 1, (), generator=random))
        padding = int(torch.randint(0, length - min(queries, length) + 1, (), generator=random))
        for i in range(queries):
            row[0, i] = (at >= padding) & (at <= length - queries + i)
    unseen = ~mask.any(2)[:, 0]  # [batch, positions]
    for x in made[1:]:
        x.masked_fill_(unseen[:, None, :, None], float("nan"))
    query, key, value = (x.to(DEVICE) for x in made)
    return query, key, value, mask.to(DEVICE)


def expected(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """In float64 and the obvious way: [batch, queries, heads, dim]."""
    query, key, value, mask = query.double().cpu(), key.double().cpu(), value.double().cpu(), mask.cpu()
    batch, heads, queries, dim = query.shape
    out = torch.zeros(batch, queries, heads, dim, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                seen = mask[b if len(mask) > 1 else 0, 0, i]
                if seen.any():
                    kv = h // (heads // key.shape[1])
                    weights = (key[b, kv, seen] @ query[b, h, i] * dim**-0.5).softmax(0)
                    out[b, i, h] = weights @ value[b, kv, seen]
    return out


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert torch.isfinite(found).all()
    error = (found.double().cpu() - wanted).abs().max() / wanted.abs().max()
    assert error <= TOLERANCE[found.dtype], f"off by {error:.3g}"


@pytest.mark.parametrize("shape", CASES, ids=lambda shape: "-".join(str(x).removeprefix("torch.") for x in shape))
def test_attention_is_that_of_float64(shape: tuple[Any, ...]) -> None:
    if DEVICE == "cpu" and shape[-1] == torch.bfloat16:
        pytest.skip("Triton's interpreter has no products of bfloat16")
    query, key, value, mask = case(*shape)
    found = attention(query, key, value, mask, shape[4] ** -0.5)
    assert found.dtype == query.dtype
    close(found, expected(query, key, value, mask))
    assert torch.equal(found, attention(query, key, value, mask, shape[4] ** -0.5))


def test_strides_of_models_and_masks() -> None:
    """Queries as a transposed projection, keys in a longer cache, a mask of one row for all."""
    query, key, value, mask = case(2, 2, 4, 1, 64, 50, torch.float32)
    mask = mask[:1].clone()
    key, value = key.nan_to_num(), value.nan_to_num()
    wanted = expected(query, key, value, mask)
    transposed = query.transpose(1, 2).contiguous().transpose(1, 2)
    longer = torch.full((2, 2, 80, 64), float("nan"), device=DEVICE)
    longer[:, :, 20:70] = key
    by_position = value.transpose(1, 2).contiguous().transpose(1, 2)
    backwards = value.transpose(2, 3).contiguous().transpose(2, 3)  # the last dimension is not dense
    for each in (mask, mask.expand(2, -1, -1, -1)):
        for values in (by_position, backwards):
            close(attention(transposed, longer[:, :, 20:70], values, each, 64**-0.5), wanted)


def test_a_query_that_sees_nothing_gets_zeros() -> None:
    query, key, value, mask = case(2, 1, 2, 2, 16, 40, torch.float32)
    mask[0, 0, 1] = False
    close(attention(query, key, value, mask, 0.25), expected(query, key, value, mask))


def test_scores_far_apart() -> None:
    """Splits whose largest scores differ by hundreds, either way round."""
    query, key, value, mask = case(1, 1, 2, 1, 16, 2500, torch.float32)
    key = key.nan_to_num()
    key[:, :, :1200] *= 60
    value, mask = value.nan_to_num(), torch.ones_like(mask)
    close(attention(query, key, value, mask, 0.25), expected(query, key, value, mask))


def test_operator_contract() -> None:
    query, key, value, mask = case(1, 2, 2, 1, 16, 20, torch.float32)
    torch.library.opcheck(torch.ops.mbq.attention.default, (query, key.nan_to_num(), value.nan_to_num(), mask, 0.25))


def test_wrong_arguments_are_errors() -> None:
    query, key, value, mask = case(1, 2, 2, 1, 16, 20, torch.float32)
    for given in (
        (query, key, value, mask.float()),
        (query, key, value[:, :, 1:], mask),
        (query, key, value.half(), mask),
        (query, key, value, mask[..., 1:]),
        (query[:, :3], key, value, mask),
        (query[..., :12], key[..., :12], value[..., :12], mask),
        (query.expand(-1, -1, 33, -1), key, value, mask.expand(-1, -1, 33, -1)),
    ):
        with pytest.raises(MBQError, match="mbq::attention cannot run this: "):
            attention(*given, 0.25)


def test_all_else_is_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value, mask = case(1, 2, 2, 1, 16, 20, torch.float32)
    key, value = key.nan_to_num(), value.nan_to_num()
    layer = torch.nn.Module()
    layer.num_key_value_groups = 2  # type: ignore[assignment]
    wanted = sdpa_attention_forward(layer, query, key, value, mask, scaling=0.25)[0]
    torch.testing.assert_close(attend(layer, query, key, value, mask, scaling=0.25)[0], wanted)

    def ours(*args: Any) -> None:
        raise AssertionError("the kernel ran")

    monkeypatch.setattr(module, "attention", ours)
    with pytest.raises(AssertionError, match="the kernel ran"):
        attend(layer, query, key, value, mask, sliding_window=None)
    added = torch.zeros(mask.shape, device=DEVICE).masked_fill(~mask, float("-inf"))
    bias = torch.zeros(1, 4, 1, 20, device=DEVICE)
    long, causal = query.expand(-1, -1, 40, -1), mask.expand(-1, -1, 40, -1)
    attend(layer, query, key, value, None)
    attend(layer, query, key, value, added)
    attend(layer, query, key, value, mask, dropout=0.5)
    attend(layer, query, key, value, mask, position_bias=bias)
    attend(layer, long, key, value, causal)
    attend(layer, query.clone().requires_grad_(), key, value, mask)
    monkeypatch.setattr(module, "INTERPRETED", False)
    attend(layer, query.cpu(), key.cpu(), value.cpu(), mask.cpu())


@pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
def test_generate_with_a_static_cache_gives_the_same_tokens(family: str, tmp_path: Path) -> None:
    folder = tiny.save(family, tmp_path / family)
    model = mbq.load(folder, dtype="float32", device=DEVICE, trust_remote_code=True)
    processor = mbq.loading.load_processor(folder, trust_remote_code=True)
    given = processor(
        text=[processor.apply_chat_template(tiny.question(), add_generation_prompt=True)],
        images=[tiny.picture(0)],
        return_tensors="pt",
    ).to(DEVICE)
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 6, "do_sample": False, "disable_compile": True, "cache_implementation": "static"}
    model.set_attn_implementation("sdpa")
    wanted = model.generate(**given, **options)
    assert use_attention(model)
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "attention", lambda *args: calls.append(args[0].shape) or attention(*args))
        assert torch.equal(model.generate(**given, **options), wanted)
    assert len(calls) == 5 * len(model.get_decoder().layers)
    assert all(shape[2] == 1 for shape in calls)
    model.save_pretrained(tmp_path / "saved")
    assert NAME not in json.dumps(json.loads((tmp_path / "saved" / "config.json").read_text()).get("text_config"))
    for config in (tmp_path / "saved").glob("*config.json"):
        assert f'"{NAME}"' not in config.read_text()
    model.set_attn_implementation("sdpa")
    assert model.get_decoder().config._attn_implementation == "sdpa"


def test_compiled_step_gives_the_same_logits(tmp_path: Path) -> None:
    model: Any = mbq.load(tiny.save("llava_onevision", tmp_path / "model"), dtype="float32", device=DEVICE)
    assert use_attention(model)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=24)
    ids = torch.randint(10, 60, (1, 12), device=DEVICE)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        found = {}
        for backend in ("eager", "aot_eager"):
            for layer in cache.layers:
                layer.cumulative_length.fill_(12)
            step = torch.compile(model.__call__, fullgraph=True, dynamic=False, backend=backend)
            found[backend] = step(input_ids=ids[:, :1], past_key_values=cache).logits
        plain = model(input_ids=torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:]
    for logits in found.values():
        torch.testing.assert_close(logits, plain, rtol=1e-4, atol=1e-4)
