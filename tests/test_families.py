"""The names in families.py are right: folding along them leaves the logits, and every named linear matters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mbq.architecture import bind
from mbq.families import FAMILIES
from tests.folding import fold_everything
from tests.tiny import inputs, tiny

# Every published combination of a class and a language model.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llava_onevision", {}),
    ("internvl", {"text": "qwen2"}),
    ("internvl", {"text": "llama"}),
    ("qwen2_vl", {}),
    ("internvl2_internlm2", {}),
    ("internvl2_internlm2", {"text": "qwen2"}),
    ("internvl2_internlm2", {"text": "llama"}),
]


@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_folding_every_group_leaves_the_logits(family: str, overrides: dict[str, Any], kv_heads: int) -> None:
    model, processor = tiny(family, kv_heads=kv_heads, **overrides)
    binding = bind(model)
    given = inputs(processor)
    with torch.no_grad():
        before = model(**given).logits
    fold_everything(binding)
    with torch.no_grad():
        after = model(**given).logits
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
def test_the_linears_of_a_group_read_what_prev_makes(family: str, overrides: dict[str, Any]) -> None:
    """All linears of a group are given the same tensor; behind a norm it is the norm's own output."""
    model, processor = tiny(family, **overrides)
    binding = bind(model)
    read: dict[str, torch.Tensor] = {}
    made: dict[str, torch.Tensor] = {}
    for group in binding.architecture.groups:
        prev = binding.module(1, group.prev)
        prev.register_forward_hook(lambda m, a, out, key=group.prev: made.update({key: out}))
        for path in group.linears:
            linear = binding.module(1, path)
            linear.register_forward_pre_hook(lambda m, a, key=path: read.update({key: a[0]}))
    with torch.no_grad():
        model(**inputs(processor))
    for group in binding.architecture.groups:
        first, *others = (read[path] for path in group.linears)
        assert all(torch.equal(first, other) for other in others)
        if group.name in ("qkv", "gate_up"):
            assert torch.equal(first, made[group.prev])


@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
def test_outputs_of_attention_and_mlp_are_what_the_residual_stream_gets(family: str, overrides: dict[str, Any]) -> None:
    """hidden states behind a block = before it + attn_output + mlp_output: where sensitivity is measured."""
    model, processor = tiny(family, **overrides)
    binding = bind(model)
    seen: dict[str, torch.Tensor] = {}

    def output(key: str) -> Any:
        return lambda m, a, out: seen.update({key: out[0] if isinstance(out, tuple) else out})

    def given(module: Any, args: Any, kwargs: Any) -> None:
        seen["before"] = args[0] if args else kwargs["hidden_states"]

    binding.blocks[1].register_forward_pre_hook(given, with_kwargs=True)
    binding.blocks[1].register_forward_hook(output("after"))
    binding.module(1, binding.architecture.attn_output).register_forward_hook(output("attn"))
    binding.module(1, binding.architecture.mlp_output).register_forward_hook(output("mlp"))
    with torch.no_grad():
        model(**inputs(processor))
    torch.testing.assert_close(seen["after"], seen["before"] + seen["attn"] + seen["mlp"], rtol=1e-5, atol=1e-5)


def test_every_entry_is_filed_under_its_class() -> None:
    for name, variants in FAMILIES.items():
        assert {variant.model_class for variant in variants} == {name}
        for variant in variants:
            parts = {group.name: group.part for group in variant.groups if group.name != "shared_down"}
            assert list(parts.items()) == [("qkv", "attn"), ("o", "attn"), ("gate_up", "mlp"), ("down", "mlp")]


@pytest.mark.parametrize("text", ["internlm2", "qwen2", "llama"])
def test_the_adapted_internvl2_generates_what_its_own_code_does(text: str) -> None:
    """Through the processor: greedy tokens equal the argmax of forward, token by token, with and without a picture."""
    model, processor = tiny("internvl2_internlm2", text=text)
    for images in (0, 1, 2):
        given = inputs(processor, images=images)
        made = model.generate(**given, max_new_tokens=4, do_sample=False, eos_token_id=None)
        ids = given["input_ids"]
        assert torch.equal(made[:, : ids.shape[1]], ids)
        for _ in range(made.shape[1] - ids.shape[1]):
            given["input_ids"], given["attention_mask"] = ids, torch.ones_like(ids)
            with torch.no_grad():
                following = model(**given).logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, following], 1)
        assert torch.equal(made, ids)


def test_internvl2_tiles_as_many_tokens_as_the_model_wants() -> None:
    model, processor = tiny("internvl2_internlm2")
    binding = bind(model)
    wide = inputs(processor, images=1)
    from tests.tiny import picture, question

    text = processor.apply_chat_template(question(), add_generation_prompt=True)
    tiled = processor(text=[text], images=[picture(0, 112)], return_tensors="pt")
    for given, tiles in ((wide, 1), (tiled, 5)):  # four tiles of 56 pixels and a thumbnail
        vision = torch.isin(given["input_ids"], torch.tensor(sorted(binding.vision_tokens)))
        assert given["pixel_values"].shape[0] == tiles
        assert int(vision.sum()) == tiles * model.num_image_token
