"""Equalizing a model: its function stays, the right groups are searched, and the losses are the real errors."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from mbq.blocks import forward
from mbq.equalization import mae_weights, token_loss
from mbq.errors import MBQError
from mbq.methods import METHODS, SearchOptions
from mbq.qtensor import fake_quantize, fake_quantize_activations
from mbq.scheme import scheme_named
from mbq.search import GroupSearch, equalize_model, token_roles
from mbq.sensitivity import Sensitivity, measure, ratios
from mbq.storage import in_memory
from tests.calibrated import calibrated
from tests.tiny import ALL_FAMILY_NAMES, FAMILY_NAMES

W3A16, W4A8 = scheme_named("W3A16", 32), scheme_named("W4A8")
# What a test needs that is not about gradients.
PLANTED = Sensitivity({"attn": (1.0, 0.0), "mlp": (2.0, 0.0)}, {"attn": (10.0, 10.0), "mlp": (10.0, 10.0)})


@torch.no_grad()
def logits(binding, batches):
    """Of all tokens but padding."""
    return torch.cat([forward(binding.model, each).logits[each.inputs["attention_mask"].bool()] for each in batches])


def weights_of(binding):
    return {name: value.clone() for name, value in binding.model.state_dict().items()}


def changed(binding, before):
    return {name for name, value in binding.model.state_dict().items() if not torch.equal(value, before[name])}


def alphas(rows):
    return {(row.block, row.group): row.alpha for row in rows}


@pytest.mark.parametrize(
    ("method", "overrides", "options"),
    [
        ("mbq", {"kv_heads": 1}, SearchOptions()),
        ("mbq", {"kv_heads": 1}, SearchOptions(gqa_fold=True)),
        ("awq", {"kv_heads": 2}, SearchOptions(gqa_fold=True)),
        ("smoothquant", {"kv_heads": 1}, SearchOptions()),
    ],
)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_folding_keeps_the_float_models_logits(family, method, overrides, options):
    binding, batches = calibrated(family, hidden=64, **overrides)
    before, weights = logits(binding, batches), weights_of(binding)
    rows = equalize_model(binding, batches, METHODS[method], W4A8, options, sensitivity=PLANTED)
    error = (logits(binding, batches) - before).abs().max() / before.abs().max()
    assert error < 1e-4

    folded = {(row.block, row.group) for row in rows if row.alpha}
    assert {block for block, _ in folded} == {0, 1}
    norms_and_linears = {
        binding.name(block, path) + ".weight"
        for block in range(2)
        for group in binding.architecture.groups
        for path in (group.prev, *group.linears)
        if (block, group.name) in folded
    }
    biases = {name for name in changed(binding, weights) if name.endswith("bias")}
    assert changed(binding, weights) - biases == norms_and_linears
    if options.gqa_fold:
        assert not any(row.skipped for row in rows)


def test_rtn_equalizes_nothing():
    binding, batches = calibrated("internvl")
    before = weights_of(binding)
    assert equalize_model(binding, batches, METHODS["rtn"], W3A16) == []
    assert not changed(binding, before)


def test_smoothquant_works_at_the_two_norms_of_each_block():
    binding, batches = calibrated("internvl", hidden=64, kv_heads=2)
    rows = equalize_model(binding, batches, METHODS["smoothquant"], W4A8, SearchOptions(smooth_alpha=0.25))
    assert alphas(rows) == {
        (block, group): alpha
        for block in range(2)
        for group, alpha in (("qkv", 0.25), ("o", None), ("gate_up", 0.25), ("down", None))
    }


def test_grouped_query_attention_leaves_o_alone_by_default_and_says_why():
    binding, batches = calibrated("internvl", hidden=64, kv_heads=1)
    row = equalize_model(binding, batches, METHODS["awq"], W3A16)[1]
    assert (row.group, row.alpha, row.losses) == ("o", None, ())
    assert row.skipped == "self_attn.v_proj has 32 rows for 64 channels; only gqa_fold folds them"


def test_a_row_of_search_json_is_strict_json():
    row = GroupSearch(3, "down", 0.1, (2.0, float("nan"), 0.5, *[1.0] * 17))
    assert row.loss == 0.5
    read = json.loads(json.dumps(row.to_json(), allow_nan=False))
    assert read == {"block": 3, "group": "down", "alpha": 0.1, "losses": [2.0, None, 0.5, *[1.0] * 17], "skipped": None}


@pytest.mark.parametrize("scheme", [W3A16, W4A8])
@pytest.mark.parametrize("family", ["internvl", "internvl2_internlm2"])
def test_the_loss_of_the_choice_is_the_error_of_the_quantized_folded_linear(family, scheme):
    """Fold and search agree: o_proj and down_proj of the folded model, quantized as they are, err by the least loss."""
    binding, batches = calibrated(family, hidden=64, kv_heads=1)
    options = SearchOptions(gqa_fold=True)
    rows = equalize_model(binding, batches, METHODS["mbq"], scheme, options, sensitivity=PLANTED)
    losses = {(row.block, row.group): row.losses for row in rows}
    roles, ratio = token_roles(batches), ratios(PLANTED)
    for block in range(2):
        for group in (binding.architecture.groups[1], binding.architecture.groups[3]):
            linear = binding.module(block, group.linears[0])
            x = torch.cat([each.flatten(0, 1) for each in inputs_of(linear, binding, batches)])
            y = x @ linear.weight.T
            read = fake_quantize_activations(x, scheme.activations) if scheme.activations else x
            quantized = read @ fake_quantize(linear.weight, scheme.weights).T
            weights = mae_weights(roles, ratio[group.part][block])
            found = token_loss(y, quantized, weights, 1).item()
            assert found == pytest.approx(min(losses[block, group.name]), rel=2e-3)


@torch.no_grad()
def inputs_of(module, binding, batches):
    seen = []
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    for batch in batches:
        forward(binding.model, batch)
    handle.remove()
    return seen


@pytest.mark.parametrize("method", ["awq", "mbq"])
def test_batch_size_and_padding_change_nothing_outside_the_parity_mode(method):
    found = []
    for batch_size in (1, 3):
        binding, batches = calibrated("qwen2_vl", batch_size, hidden=64, kv_heads=1)
        found.append(equalize_model(binding, batches, METHODS[method], W4A8, sensitivity=PLANTED))
    assert alphas(found[0]) == alphas(found[1])
    for one, other in zip(*found, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=1e-3)

    binding, batches = calibrated("qwen2_vl", 3, hidden=64, kv_heads=1)
    parity = equalize_model(binding, batches, METHODS[method], W4A8, SearchOptions(parity=True), sensitivity=PLANTED)
    assert parity[0].losses != pytest.approx(found[0][0].losses, rel=1e-3)


def test_storage_changes_nothing():
    found = []
    for storage in (None, in_memory):
        binding, batches = calibrated("qwen2_vl", hidden=64, kv_heads=1)
        found.append(equalize_model(binding, batches, METHODS["awq"], W4A8, storage=storage))
    assert found[0] == found[1]


def test_a_linear_that_is_not_quantized_stays_float_in_candidates_but_is_folded():
    binding, batches = calibrated("internvl", hidden=64, kv_heads=1)
    before = logits(binding, batches)
    weights = weights_of(binding)
    targets = [name for name in binding.names if "up_proj" not in name and "down_proj" not in name]
    rows = equalize_model(binding, batches, METHODS["awq"], W4A8, targets=targets)
    found = alphas(rows)
    assert found[0, "gate_up"] is not None
    assert found[0, "down"] is None
    assert binding.name(0, "mlp.up_proj") + ".weight" in changed(binding, weights)
    torch.testing.assert_close(logits(binding, batches), before, rtol=1e-4, atol=1e-4)

    # Less is quantized, so less is lost: at alpha 0 nothing else differs.
    binding, batches = calibrated("internvl", hidden=64, kv_heads=1)
    both = equalize_model(binding, batches, METHODS["awq"], W4A8)
    losses = {(row.block, row.group): row.losses for row in rows}
    assert losses[0, "gate_up"][0] < {(row.block, row.group): row.losses for row in both}[0, "gate_up"][0]


@pytest.mark.parametrize("scheme", [W3A16, W4A8])
@torch.no_grad()
def test_distorted_input_comes_from_quantized_blocks_and_targets_from_float_ones(scheme):
    binding, batches = calibrated("internvl", hidden=64, kv_heads=1)
    original = copy.deepcopy(binding.model)
    plain = equalize_model(binding, batches, METHODS["awq"], scheme)
    binding.model.load_state_dict(original.state_dict())
    rows = equalize_model(binding, batches, METHODS["awq"], scheme, SearchOptions(distorted_input=True))
    assert rows[:4] == plain[:4]
    assert rows[4:] != plain[4:]

    # Slowly: what down_proj of block 1 reads behind a quantized block 0, against what it gives in the float model.
    folded = copy.deepcopy(binding.blocks[0])
    binding.model.load_state_dict(original.state_dict())
    down = binding.module(1, "mlp.down_proj")
    y = torch.cat([x.flatten(0, 1) for x in inputs_of(down, binding, batches)]) @ down.weight.T
    binding.blocks[0].load_state_dict(folded.state_dict())
    for module in binding.blocks[0].modules():
        if isinstance(module, nn.Linear):
            module.weight.data = fake_quantize(module.weight.data, scheme.weights)
            if scheme.activations:
                module.register_forward_pre_hook(
                    lambda module, args: (fake_quantize_activations(args[0], scheme.activations),)
                )
    x = torch.cat([each.flatten(0, 1) for each in inputs_of(down, binding, batches)])
    counted = torch.cat([batch.inputs["attention_mask"].flatten() for batch in batches]).bool()
    read = fake_quantize_activations(x, scheme.activations) if scheme.activations else x
    error = (y - read @ fake_quantize(down.weight, scheme.weights).T)[counted]
    assert rows[7].group == "down"
    assert error.abs().mean().item() == pytest.approx(rows[7].losses[0], rel=1e-3)  # alpha 0 is E = 1


@pytest.mark.parametrize("method", ["awq", "fixed", "mbq"])
def test_every_search_compares_absolute_values_unless_told(method):
    def losses(options):
        binding, batches = calibrated("internvl", hidden=64, kv_heads=1)
        return equalize_model(binding, batches, METHODS[method], W4A8, options, sensitivity=PLANTED)[0].losses

    assert losses(SearchOptions()) == losses(SearchOptions(norm="mae")) != losses(SearchOptions(norm="mse"))


def test_a_fixed_factor_equal_to_the_ratio_chooses_as_mbq_and_so_does_the_papers_objective():
    flat = Sensitivity({"attn": (1.0, 1.0), "mlp": (1.0, 1.0)}, {"attn": (10.0, 10.0), "mlp": (10.0, 10.0)})

    def found(method, options):
        binding, batches = calibrated("internvl", hidden=64, kv_heads=1)
        return equalize_model(binding, batches, METHODS[method], W4A8, options, sensitivity=flat)

    mbq = found("mbq", SearchOptions())
    assert alphas(found("fixed", SearchOptions(vision_weight=0.1))) == alphas(mbq)
    assert alphas(found("mbq", SearchOptions(objective="paper"))) == alphas(mbq)


@pytest.mark.parametrize("family", ALL_FAMILY_NAMES)
def test_mbq_with_measured_sensitivity_runs_in_bfloat16(family):
    binding, batches = calibrated(family, hidden=64, kv_heads=1)
    binding.model.to(torch.bfloat16)
    rows = equalize_model(binding, batches, METHODS["mbq"], W3A16, sensitivity=measure(binding, batches))
    assert all(row.alpha is not None for row in rows if row.group != "o")
    assert {parameter.dtype for parameter in binding.model.parameters()} == {torch.bfloat16}


def test_progress_tells_block_and_loss():
    binding, batches = calibrated("internvl", hidden=64, kv_heads=1)
    told = []
    rows = equalize_model(
        binding,
        batches,
        METHODS["awq"],
        W4A8,
        progress=lambda step, done, total, note: told.append((step, done, total, note)),
    )
    assert [each[:3] for each in told] == [("search", 1, 2), ("search", 2, 2)]
    loss = sum(row.loss for row in rows if row.block == 0 and row.losses)
    assert told[0][3] == f"block 0, loss {loss:.3g}"


def test_nan_weights_name_block_and_group():
    binding, batches = calibrated("internvl", hidden=64, kv_heads=1)
    with torch.no_grad():
        binding.module(1, "mlp.gate_proj").weight[0, 0] = float("nan")
    with pytest.raises(MBQError, match="block 1, gate_up"):
        equalize_model(binding, batches, METHODS["awq"], W4A8)


def test_a_norm_that_cannot_be_folded_into_is_refused_before_anything_changes():
    binding, batches = calibrated("internvl", hidden=64, kv_heads=1)
    before = weights_of(binding)
    norm = binding.blocks[1].post_attention_layernorm
    forward_of_norm = norm.forward
    norm.forward = lambda x: forward_of_norm(x) + x
    with pytest.raises(MBQError, match=r"layers\.1\.post_attention_layernorm"):
        equalize_model(binding, batches, METHODS["awq"], W4A8)
    assert not changed(binding, before)


def test_options_that_do_not_exist_are_refused():
    for options, said in (({"norm": "max"}, "mae, mse"), ({"objective": "none"}, "released or paper")):
        with pytest.raises(MBQError, match=said):
            SearchOptions(**options)
    with pytest.raises(MBQError, match="--gqa-fold"):
        SearchOptions(parity=True, gqa_fold=True)


@pytest.mark.parametrize("scheme", [W3A16, W4A8])
def test_several_calls_at_once_give_the_losses_of_each_alone(scheme, monkeypatch):
    """Candidates and calls of one form together, one after the other, and in code that vmap does not take."""
    found = {}
    for way in ("together", "alone", "refused"):
        binding, batches = calibrated("qwen2_vl", batch_size=1)
        if way == "alone":
            monkeypatch.setattr("mbq.group._AT_ONCE", 0)
        if way == "refused":
            monkeypatch.undo()
            monkeypatch.setattr(torch, "vmap", refuse)
        rows = equalize_model(binding, batches, METHODS["mbq"], scheme, sensitivity=PLANTED)
        found[way] = torch.tensor([row.losses for row in rows if row.losses])
    torch.testing.assert_close(found["together"], found["alone"], rtol=1e-4, atol=0)
    assert torch.equal(found["refused"], found["alone"])


def refuse(*args, **kwargs):
    def made(*args):
        raise RuntimeError("vmap: It looks like you're calling .item() on a Tensor.")

    return made


def test_a_race_that_sees_everything_in_its_last_round_chooses_as_an_exhaustive_search():
    """Half of the tokens first, then all: the losses of the last round are the exhaustive ones."""
    alphas, losses = {}, {}
    for tokens in (None, 12):
        binding, batches = calibrated("internvl", batch_size=1)
        rows = equalize_model(
            binding, batches, METHODS["mbq"], W3A16, SearchOptions(tokens=tokens), sensitivity=PLANTED
        )
        alphas[tokens] = [row.alpha for row in rows]
        losses[tokens] = [row.loss for row in rows if row.loss is not None]
    assert sum(a == b for a, b in zip(alphas[None], alphas[12], strict=True)) >= len(alphas[None]) - 1
    assert losses[12] == pytest.approx(losses[None], rel=0.05)
