"""bind: exact lists for each family, unknown classes by structure, refusals in words, --ignore."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from mbq.architecture import bind, matches
from mbq.errors import MBQError
from tests import tiny_families
from tests.tiny import ALL_FAMILY_NAMES, FAMILY_NAMES, tiny

LLAMA = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]
INTERNLM2 = ["attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w3", "feed_forward.w2"]


@pytest.mark.parametrize(("family", "text", "blocks", "paths"), [
    ("llava_onevision", None, "model.language_model.layers", LLAMA),
    ("internvl", "qwen2", "model.language_model.layers", LLAMA),
    ("internvl", "llama", "model.language_model.layers", LLAMA),
    ("qwen2_vl", None, "model.language_model.layers", LLAMA),
    ("internvl2_internlm2", None, "language_model.model.layers", INTERNLM2),
    ("internvl2_internlm2", "qwen2", "language_model.model.layers", LLAMA),
])  # fmt: skip
def test_every_linear_is_quantized_or_kept(family: str, text: str | None, blocks: str, paths: list[str]) -> None:
    model, _ = tiny(family, text=text)
    binding = bind(model)
    assert list(binding.names) == [f"{blocks}.{i}.{path}" for i in range(2) for path in paths]
    assert binding.linears() == list(binding.names)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(binding.kept) == linears - set(binding.names)
    assert binding.module(1, paths[0]) is model.get_submodule(f"{blocks}.1.{paths[0]}")
    assert binding.module(0, "") is binding.blocks[0]


@pytest.mark.parametrize(("family", "tokens"), [
    ("llava_onevision", {"<image>", "<video>"}),
    ("internvl", {"<IMG_CONTEXT>"}),
    ("qwen2_vl", {"<|image_pad|>", "<|video_pad|>"}),
    ("internvl2_internlm2", {"<IMG_CONTEXT>"}),
])  # fmt: skip
def test_vision_tokens(family: str, tokens: set[str]) -> None:
    model, processor = tiny(family)
    assert bind(model).vision_tokens == {processor.tokenizer.convert_tokens_to_ids(token) for token in tokens}


@pytest.mark.parametrize("family", ALL_FAMILY_NAMES)
def test_ignore_patterns_name_exactly_what_is_kept(family: str) -> None:
    """As compressed-tensors and vLLM read them: re.match for "re:", the very name otherwise."""
    binding = bind(tiny(family)[0])
    for name in binding.names + binding.kept:
        named = any(re.match(p[3:], name) if p.startswith("re:") else p == name for p in binding.ignore())
        assert named == (name in binding.kept), name


CHECKPOINT_NAMES = {
    "llava_onevision": (["lm_head", "vision_tower.vision_model.encoder.layers.0.mlp.fc1",
                         "multi_modal_projector.linear_1"], "language_model.layers.0.mlp.up_proj"),
    "internvl": (["lm_head", "vision_tower.encoder.layer.0.mlp.fc1", "multi_modal_projector.linear_2"],
                 "language_model.model.layers.0.mlp.up_proj"),
    "qwen2_vl": (["lm_head", "visual.blocks.0.attn.qkv", "visual.merger.mlp.0"], "model.layers.0.mlp.up_proj"),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_ignore_patterns_match_checkpoint_names_too(family: str) -> None:
    kept, quantized = CHECKPOINT_NAMES[family]
    patterns = bind(tiny(family)[0]).ignore(["layers.1.mlp.up_proj"])

    def named(name: str) -> bool:
        return any(re.match(p[3:], name) is not None if p.startswith("re:") else p == name for p in patterns)

    assert all(named(name) for name in kept)
    assert not named(quantized)
    assert named(quantized.replace("layers.0", "layers.1"))


@pytest.mark.parametrize("family", ALL_FAMILY_NAMES)
def test_an_unknown_class_is_matched_by_structure(family: str) -> None:
    model, _ = tiny(family)
    known = bind(model)
    model.__class__ = type("SomebodysModel", (type(model),), {})
    found = bind(model)
    assert found.architecture.model_class == "SomebodysModel"
    assert (found.names, found.kept, found.vision_tokens) == (known.names, known.kept, known.vision_tokens)
    assert found.architecture.groups == known.architecture.groups
    assert found.architecture.vision_tower == known.architecture.vision_tower
    assert found.architecture.fused_qkv == known.architecture.fused_qkv
    for name in found.names + found.kept:
        named = any(re.match(p[3:], name) if p.startswith("re:") else p == name for p in found.ignore())
        assert named == (name in found.kept), name


def test_two_candidates_are_refused() -> None:
    model, _ = tiny("qwen2_vl")
    model.__class__ = type("TwoTowers", (type(model),), {})
    model.model.second = nn.ModuleList(model.model.language_model.layers)
    with pytest.raises(MBQError, match=r"found 2") as error:
        bind(model)
    for part in (
        "TwoTowers",
        "mbq families",
        "self_attn.q_proj",
        "attention.wqkv",
    ):
        assert part in str(error.value)


def test_a_text_only_model_is_refused() -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(MBQError, match=r"one vision tower beside it, found 0"):
        bind(LlamaForCausalLM(config))


def test_blocks_with_further_parts_are_not_taken_for_llamas() -> None:
    """Gemma 3 has Llama's names and two more norms, and its post_attention_layernorm does not feed the MLP."""
    model, _ = tiny_families.tiny("gemma3")
    model.__class__ = type("SomebodysGemma", (type(model),), {})
    with pytest.raises(MBQError, match=r"SomebodysGemma is no known family .* found 0, and one vision tower"):
        bind(model)


def test_a_known_class_with_a_renamed_part_names_it() -> None:
    model, _ = tiny("llava_onevision")
    block = model.model.language_model.layers[1]
    block.mlp.gate = block.mlp._modules.pop("gate_proj")
    with pytest.raises(MBQError, match=r"has no model\.language_model\.layers\.1\.mlp\.gate_proj"):
        bind(model)


def test_a_linear_that_nobody_names_is_refused() -> None:
    model, _ = tiny("qwen2_vl")
    model.model.language_model.layers[0].adapter = nn.Linear(4, 4)
    with pytest.raises(MBQError, match=r"holds the linear model\.language_model\.layers\.0\.adapter"):
        bind(model)


def test_a_model_without_image_tokens_is_refused() -> None:
    model, _ = tiny("internvl2_internlm2")
    model.img_context_token_id = None
    with pytest.raises(MBQError, match="without the id of the image token"):
        bind(model)


@pytest.mark.parametrize(("pattern", "ignored"), [
    ("mlp.down_proj", ["0.mlp.down_proj", "1.mlp.down_proj"]),
    ("layers.1.mlp.down_proj", ["1.mlp.down_proj"]),
    ("model.language_model.layers.0.self_attn.q_proj", ["0.self_attn.q_proj"]),
    (r"re:.*layers\.0\.mlp\..*", ["0.mlp.gate_proj", "0.mlp.up_proj", "0.mlp.down_proj"]),
    ("lm_head", []),
])  # fmt: skip
def test_ignore(pattern: str, ignored: list[str]) -> None:
    binding = bind(tiny("llava_onevision")[0])
    prefix = "model.language_model.layers"
    left = binding.linears((pattern,))
    assert left == [name for name in binding.names if name not in {f"{prefix}.{path}" for path in ignored}]
    # What the folder's config says means the same linears.
    written = [p for p in binding.ignore((pattern,)) if p not in binding.ignore()]
    assert [name for name in binding.names if not any(re.match(p[3:], name) for p in written)] == left


@pytest.mark.parametrize("pattern", ["down_pro", "re:down_proj", "layers.7.mlp.down_proj", "wn_proj", ""])
def test_an_ignore_pattern_that_matches_nothing_is_an_error(pattern: str) -> None:
    binding = bind(tiny("llava_onevision")[0])
    with pytest.raises(MBQError, match=f"--ignore {re.escape(pattern)} matches no linear"):
        binding.linears(("mlp.down_proj", pattern))


def test_a_broken_expression_is_an_error() -> None:
    with pytest.raises(MBQError, match="is not a regular expression"):
        matches("lm_head", "re:*.mlp")


def test_binding_does_not_touch_the_model() -> None:
    model, _ = tiny("qwen2_vl")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.__class__ = type("Mine", (type(model),), {})
    bind(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
