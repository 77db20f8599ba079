"""Mixtures of experts: linears over transformers' tensors, calibrated with the tokens that a router sends to each."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText, CompressedTensorsConfig

import mbq
from mbq.architecture import Binding, bind
from mbq.blocks import capture, run
from mbq.cost import Shapes, input_bytes, search_operations, sensitivity_operations, trace_bytes
from mbq.equalization import ALPHAS, candidates
from mbq.errors import MBQError, MBQWarning
from mbq.experts import Expert, Experts, left_whole, split_experts
from mbq.fuse import LinearSlice, use_kernel
from mbq.inspection import inspect
from mbq.methods import METHODS
from mbq.pipeline import measure_sensitivity
from mbq.qlinear import QuantLinear
from mbq.qtensor import fake_quantize, fake_quantize_activations
from mbq.recipe import Recipe
from mbq.routing import routing
from mbq.scheme import SCHEMES
from mbq.search import equalize_model, token_roles
from mbq.sensitivity import token_gradients
from tests.calibrated import batches_for
from tests.conftest import row as json_row
from tests.conftest import write_rows
from tests.test_more_families import ROWS, logits
from tests.test_plans import operations, watched
from tests.tiny import inputs, picture
from tests.tiny_families import tiny

MIXTURES = ("qwen3_vl_moe", "qwen3_5_moe", "glm4v_moe", "internvl3_5_moe")
OPTIONS: dict[str, Any] = {"num_calibration_samples": 3, "batch_size": 2, "device": "cpu"}
W3 = {"scheme": "W3A16", "group_size": 32}
BLOCK = 1  # which has experts in every tiny model

mixtures = pytest.mark.parametrize("family", MIXTURES)


def calibrated(family: str, batch_size: int = 2) -> tuple[Binding, list[Any]]:
    model, processor = tiny(family)
    binding = bind(model)
    return binding, batches_for(binding, processor, batch_size)


@mixtures
def test_single_experts_compute_what_transformers_module_does(family: str) -> None:
    model, _ = tiny(family)
    names = [name for name, module in model.named_modules() if hasattr(module, "gate_up_proj") and "experts" in name]
    whole = {name: model.get_submodule(name) for name in names}
    split_experts(model)
    x, weights = torch.randn(40, 64), torch.rand(40, 2)
    chosen = torch.tensor([0, 4, 1, 2])[torch.stack([torch.randperm(4)[:2] for _ in range(40)])]  # never 3
    assert names
    for name, before in whole.items():
        experts = model.get_submodule(name)
        assert isinstance(experts, Experts)
        torch.testing.assert_close(experts(x, chosen, weights), before(x, chosen, weights), rtol=1e-5, atol=1e-6)
        assert experts[4].down_proj.weight.data_ptr() == before.down_proj[4].data_ptr(), "a copy"
        assert experts[4].up_proj.weight.data_ptr() == before.gate_up_proj[4, 32:].data_ptr(), "a copy"


def test_what_is_measured_is_left_whole() -> None:
    model, processor = tiny("qwen3_vl_moe")
    names = list(model.state_dict())
    measure_sensitivity(model, processor, data=ROWS, **OPTIONS)
    assert list(model.state_dict()) == names
    with left_whole(model):
        bind(model)
        assert list(model.state_dict()) != names
    assert list(model.state_dict()) == names


def test_a_mixture_of_another_layout_is_refused() -> None:
    model, _ = tiny("qwen3_vl_moe")
    model.model.language_model.layers[BLOCK].mlp.experts.is_concatenated = False
    with pytest.raises(MBQError, match=r"has no model\.language_model\.layers\.1\..*, where families\.py expects them"):
        bind(model)


def naive_error(
    binding: Binding, batches: Any, scheme: str, weights: dict[str, torch.Tensor], vector: torch.Tensor | None = None
) -> float:
    """AWQ's loss: the mixture's output with other weights, whose linears read Q_a(x / E) under a ``vector`` E."""
    mlp = binding.module(BLOCK, "mlp")
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    keep = mlp.register_forward_hook(lambda m, args, output: found.append((args[0], output)))
    for batch in batches:
        binding.model(**batch.inputs)
    keep.remove()
    before = {name: mlp.get_parameter(f"{name}.weight").clone() for name in weights}
    activations, hooks = SCHEMES[scheme].activations, []
    for name, weight in weights.items():
        mlp.get_parameter(f"{name}.weight").copy_(weight)
        if activations is not None and vector is not None:
            read = lambda m, args: (fake_quantize_activations(args[0] / vector, activations),)  # noqa: E731
            hooks.append(mlp.get_submodule(name).register_forward_pre_hook(read))
    errors = [(mlp(x) - y).abs().mean(-1) for x, y in found]
    for name, weight in before.items():
        mlp.get_parameter(f"{name}.weight").copy_(weight)
    for hook in hooks:
        hook.remove()
    masks = [batch.inputs["attention_mask"].bool() for batch in batches]
    return float(torch.cat([error[mask] for error, mask in zip(errors, masks, strict=True)]).mean())


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["W4A16_SYM", "W4A8"])
def test_losses_are_errors_of_the_mixtures_output(scheme: str) -> None:
    """A candidate for one expert's down_proj is compared where the router sends tokens, by what comes of it there."""
    binding, batches = calibrated("qwen3_vl_moe")
    numbers = Recipe(scheme=scheme, **({"group_size": 32} if scheme == "W4A16_SYM" else {})).numbers
    float_model, _ = calibrated("qwen3_vl_moe")
    rows = {r.group: r for r in equalize_model(binding, batches, METHODS["awq"], numbers) if r.block == BLOCK}
    mlp = float_model.module(BLOCK, "mlp")
    roles = token_roles(batches)
    hidden, calls = capture(float_model, batches)
    hidden = [run(float_model.blocks[0], x, call) for x, call in zip(hidden, calls[0], strict=True)]
    sent = routing(float_model.blocks[BLOCK], "mlp.experts", hidden, calls[BLOCK], roles)
    assert sent.chosen.shape == (len(roles.counted), 2)
    torch.testing.assert_close(sent.weights.sum(1), torch.ones(len(roles.counted)).double(), atol=1e-6, rtol=0)
    reads: dict[str, list[torch.Tensor]] = {}
    for name in ("gate", *(f"experts.{e}.down_proj" for e in range(5))):
        seen = reads.setdefault(name, [])
        mlp.get_submodule(name).register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
    for batch in batches:
        float_model.model(**batch.inputs)
    real = torch.cat([batch.inputs["attention_mask"].bool().flatten() for batch in batches])
    means = {"gate": torch.cat(reads["gate"])[real].abs().mean(0)}
    for expert in range(5):
        routed = real[sent.to(expert)]
        assert rows[f"down.{expert}"].tokens == int(routed.sum())
        means[f"experts.{expert}.down_proj"] = torch.cat(reads[f"experts.{expert}.down_proj"])[routed].abs().mean(0)
    divided = numbers.activations is None
    both = [f"experts.{e}.{p}_proj" for e in range(5) for p in ("gate", "up")]
    groups = {"gate_up": ("gate", both)} | {f"down.{e}": (n := f"experts.{e}.down_proj", [n]) for e in range(5)}
    for group, (read, names) in groups.items():
        for index in (0, 7, 19):
            vector = candidates(means[read])[index]
            rounded = {
                name: fake_quantize(mlp.get_parameter(f"{name}.weight") * vector, numbers.weights)
                / (vector if divided else 1)
                for name in names
            }
            expected = naive_error(float_model, batches, scheme, rounded, vector)
            assert rows[group].losses[index] == pytest.approx(expected, rel=2e-3), (group, ALPHAS[index])


def never_chosen(model: nn.Module, processor: Any, expert: int = 4) -> None:
    """Of the other four two always score more: pairs that are each other's opposite, where this one has 0."""
    gate = model.get_submodule(f"model.language_model.layers.{BLOCK}.mlp.gate")
    with torch.no_grad():
        gate.weight[1], gate.weight[3], gate.weight[expert] = -gate.weight[0], -gate.weight[2], 0


@pytest.mark.parametrize("method", ["mbq", "awq", "smoothquant"])
def test_experts_that_no_token_reaches_are_named_and_rounded_to_nearest(method: str, tmp_path: Path) -> None:
    model, processor = tiny("qwen3_vl_moe")
    never_chosen(model, processor)
    with pytest.warns(MBQWarning, match=r"No calibration token reached 1 experts \(block 1: 4\), whose down_proj"):
        result = mbq.quantize(model, processor, data=ROWS, output=tmp_path / "out", method=method, **W3, **OPTIONS)
    assert result.unreached == {BLOCK: [4]}
    rows = {r["group"]: r for r in json.loads((tmp_path / "out" / "search.json").read_text()) if r["block"] == BLOCK}
    assert rows["down.4"]["skipped"] == "no calibration token reached this expert"
    assert rows["down.4"]["tokens"] == 0
    assert all(rows[f"down.{expert}"]["tokens"] > 0 for expert in range(4))
    assert "tokens" not in rows["gate_up"]
    down = model.model.language_model.layers[BLOCK].mlp.experts.down_proj[4]
    layer = result.model.get_submodule(f"model.language_model.layers.{BLOCK}.mlp.experts.4.down_proj")
    scheme = Recipe(**W3).numbers
    nearest = METHODS["rtn"].round(down, scheme.weights)
    assert torch.equal(layer.weight_packed, QuantLinear.from_qtensor(nearest, scheme).weight_packed)


def test_nothing_is_said_where_all_are_reached_or_nothing_is_searched(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", MBQWarning)
        model, processor = tiny("qwen3_vl_moe")
        result = mbq.quantize(model, processor, data=ROWS, **W3, **OPTIONS)
        assert result.unreached == {}
        never_chosen(model, processor)
        assert mbq.quantize(model, processor, method="rtn", **W3, device="cpu").unreached == {}


def test_the_router_is_folded_and_stays_in_16_bits(tmp_path: Path) -> None:
    model, processor = tiny("qwen3_vl_moe", dtype=torch.bfloat16)
    gate = model.model.language_model.layers[BLOCK].mlp.gate.weight.clone()
    norm = model.model.language_model.layers[BLOCK].post_attention_layernorm.weight.clone()
    mbq.quantize(model, processor, data=ROWS, output=tmp_path / "out", **W3, **OPTIONS)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    prefix = f"model.language_model.layers.{BLOCK}"
    written, folded = (tensors[f"{prefix}.{name}.weight"] for name in ("mlp.gate", "post_attention_layernorm"))
    assert written.dtype == torch.bfloat16
    assert not torch.equal(written, gate)
    torch.testing.assert_close((written.float() * folded.float()), gate.float() * norm.float(), rtol=0.02, atol=1e-4)


@mixtures
def test_an_equalized_folder_is_transformers_own(family: str, tmp_path: Path) -> None:
    model, processor = tiny(family)
    mbq.export(model, processor, data=ROWS, output=tmp_path / "out", gqa_fold=True, **W3, **OPTIONS)
    given = inputs(processor, images=2)
    alone, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(alone, given), logits(model, given), rtol=1e-3, atol=1e-3)
    assert not torch.equal(alone.get_parameter(EXPERTS_UP), model.get_parameter(EXPERTS_UP)), "nothing was folded"


EXPERTS_UP = f"model.language_model.layers.{BLOCK}.mlp.experts.gate_up_proj"


@mixtures
@pytest.mark.parametrize(
    "options", [{"scheme": "W8A8"}, {**W3, "ignore": ("re:.*experts.*down_proj",)}], ids=["W8A8", "ignored"]
)
def test_single_experts_that_are_not_packed_come_back(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Their names are those that transformers would merge."""
    model, processor = tiny(family)
    result = mbq.quantize(model, processor, method="rtn", output=tmp_path / "out", device="cpu", **options)
    given = inputs(processor)
    assert torch.equal(logits(mbq.load(tmp_path / "out"), given), logits(result.model, given))


def test_a_search_goes_on_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny("glm4v_moe")
    model.save_pretrained(tmp_path / "float")
    processor.save_pretrained(tmp_path / "float")
    for index in range(3):
        picture(index).save(tmp_path / f"{index}.png")
    data = write_rows(tmp_path / "rows.jsonl", [json_row(f"{index}.png", "A red circle.") for index in range(3)])
    options = {"data": data, "images": tmp_path, "ignore": ("re:.*experts.1.up_proj",), **W3, **OPTIONS}
    mbq.quantize(tmp_path / "float", output=tmp_path / "whole", **options)

    def interrupted(step: str, done: int, of: int, note: str) -> None:
        if step == "quantize":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mbq.quantize(tmp_path / "float", output=tmp_path / "out", progress=interrupted, **options)
    mbq.quantize(tmp_path / "float", output=tmp_path / "out", resume=True, **options)
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert (tmp_path / "whole" / "search.json").read_text() == (tmp_path / "out" / "search.json").read_text()


def test_a_distorted_input_is_refused() -> None:
    model, processor = tiny("qwen3_vl_moe")
    with pytest.raises(MBQError, match="--distorted-input sends tokens to other experts"):
        mbq.quantize(model, processor, data=ROWS, distorted_input=True, **W3, **OPTIONS)


def test_costs_are_those_of_the_experts_that_tokens_go_to() -> None:
    """Of InternVL's two blocks, which are alike."""
    binding, batches = calibrated("internvl3_5_moe", batch_size=1)
    shapes, lengths = Shapes(binding), [(1, each.labels.shape[1]) for each in batches]
    recipe = Recipe(scheme="W4A8", method="awq")
    rest = operations(lambda: capture(binding, batches))
    keep, most = watched()
    measured = operations(lambda: token_gradients(binding, batches, keep)) - 2 * rest
    assert 0.9 * input_bytes(shapes, lengths) <= most() <= 1.01 * input_bytes(shapes, lengths)
    assert measured == sensitivity_operations(shapes, lengths)
    keep, most = watched()
    given = {"storage": keep, "inputs": capture(binding, batches, keep)}
    searched = operations(lambda: equalize_model(binding, batches, METHODS["awq"], recipe.numbers, **given))
    assert 0.8 * trace_bytes(shapes, lengths, recipe) <= most() <= 1.01 * trace_bytes(shapes, lengths, recipe)
    # Each expert counts as if it got the same number of tokens, rounded up.
    assert searched == pytest.approx(search_operations(shapes, lengths, recipe), rel=0.01)


@mixtures
def test_an_inspection_counts_single_experts(family: str, tmp_path: Path) -> None:
    model, processor = tiny(family)
    model.save_pretrained(tmp_path / "float")
    processor.save_pretrained(tmp_path / "float")
    found = inspect(tmp_path / "float", method="rtn", **W3)
    result = mbq.quantize(tmp_path / "float", output=tmp_path / "out", method="rtn", **W3, device="cpu")
    layers = [module for module in result.model.modules() if isinstance(module, QuantLinear)]
    assert found.quantized == Counter(("W3A16", (layer.out_features, layer.in_features)) for layer in layers)
    assert found.cost.weights == result.bytes_before
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert found.cost.packed == sum(tensor.nbytes for tensor in written.values())


def test_gate_and_up_of_an_expert_are_one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    from mbq import fuse

    model, processor = tiny("qwen3_vl_moe")
    result = mbq.quantize(model, processor, method="rtn", **W3, device="cpu")
    given = inputs(processor)
    before = logits(result.model, given)
    monkeypatch.setattr(fuse, "_plain", lambda layers, kernel: False)
    use_kernel(result.model, "reference")
    experts = [module for module in result.model.modules() if isinstance(module, Expert)]
    assert len(experts) == 5
    for expert in experts:
        assert isinstance(expert.gate_proj, LinearSlice)
        assert expert.gate_proj.fused is expert.up_proj.fused
    torch.testing.assert_close(logits(result.model, given), before)


@pytest.mark.parametrize("scheme", ["W3A16", "W8A8"])
@pytest.mark.parametrize("family", ["qwen3_vl_moe", "glm4v_moe"])
def test_a_card_says_what_transformers_makes_of_the_folder(family: str, scheme: str, tmp_path: Path) -> None:
    model, processor = tiny(family)
    size = 32 if scheme == "W3A16" else None
    mbq.quantize(model, processor, method="rtn", scheme=scheme, group_size=size, output=tmp_path / "out", device="cpu")
    card = " ".join((tmp_path / "out" / "README.md").read_text().split())
    assert "transformers alone must not load this folder" in card
    plain = {"quantization_config": CompressedTensorsConfig(dequantize=True), "output_loading_info": True}
    if family == "glm4v_moe":
        assert "a plain `from_pretrained` ends with an error" in card
        with pytest.raises(RuntimeError, match="automatic conversion of the weights"):
            AutoModelForImageTextToText.from_pretrained(tmp_path / "out", **plain)
        return
    assert "makes up random experts, with no more than a report" in card
    _, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", **plain)
    assert EXPERTS_UP in info["missing_keys"]
    kernels = "and has kernels" if scheme == "W8A8" else "but has no kernels"
    assert f"vLLM reads the experts under these names, {kernels} for such weights" in card
