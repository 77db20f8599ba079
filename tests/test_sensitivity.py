"""Sensitivity against plain autograd, a sample at a time."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch

from mbq.calibration import language_mask, released_language_mask
from mbq.errors import MBQError
from mbq.sensitivity import PARTS, Sensitivity, answer_loss, measure, ratios, sample_means, token_gradients
from tests.calibrated import batches_for, calibrated
from tests.tiny import FAMILY_NAMES, tiny


def plain_autograd(binding, single_samples, mask):
    """Mean |dL/dY| from ``retain_grad`` and the definition, with gradients for everything."""
    outputs: dict[tuple[int, str], torch.Tensor] = {}
    handles = []
    for index, block in enumerate(binding.blocks):
        for part in PARTS:
            path = getattr(binding.architecture, f"{part}_output")

            def keep(module, args, output, key=(index, part)):
                output.retain_grad()
                outputs[key] = output

            handles.append(block.get_submodule(path).register_forward_hook(keep))
    vision: dict[tuple[int, str], list[float]] = {}
    language: dict[tuple[int, str], list[float]] = {}
    for batch in single_samples:
        logits = binding.model(**batch.inputs).logits[0]
        losses = []
        for position in range(1, logits.shape[0]):
            label = batch.labels[0, position]
            if label != -100:
                losses.append(-logits[position - 1].log_softmax(-1)[label])
        (sum(losses) / len(losses)).backward()
        for key, output in outputs.items():
            gradient = output.grad[0].abs()
            language.setdefault(key, []).append(gradient[mask(batch)[0]].mean().item())
            if batch.vision.any():
                vision.setdefault(key, []).append(gradient[batch.vision[0]].mean().item())
        binding.model.zero_grad()
    for handle in handles:
        handle.remove()
    blocks = range(len(binding.blocks))

    def averaged(values):
        return {part: [sum(values[i, part]) / len(values[i, part]) for i in blocks] for part in PARTS}

    return averaged(vision), averaged(language)


@pytest.mark.parametrize("parity", [False, True])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_padded_batches_give_what_autograd_gives_a_sample_at_a_time(family, parity):
    binding, batches = calibrated(family, batch_size=4)
    _, single = calibrated(family, batch_size=1)
    vision, language = plain_autograd(binding, single, released_language_mask if parity else language_mask)
    found = measure(binding, batches, parity=parity)
    for part in PARTS:
        assert found.vision[part] == pytest.approx(vision[part], rel=1e-3, abs=1e-9)
        assert found.language[part] == pytest.approx(language[part], rel=1e-3)
        assert found.vision[part][-1] == 0  # nothing attends to vision tokens after the last block
        assert ratios(found, floor=0.0)[part][-1] == 0


def test_the_measure_is_the_mean_of_its_samples():
    """One of the four samples has no picture: NaN there, and left out of the vision mean."""
    binding, batches = calibrated("internvl")
    vision, language = sample_means(batches, token_gradients(binding, batches))
    assert vision.shape == language.shape == (4, len(binding.blocks), len(PARTS))
    seen = torch.cat([batch.vision.any(1) for batch in batches])
    assert seen.sum() == 3
    assert torch.equal(vision.isnan(), ~seen[:, None, None].expand_as(vision))
    found = measure(binding, batches)
    for index, part in enumerate(PARTS):
        assert found.vision[part] == pytest.approx(vision.nanmean(0)[:, index].tolist())
        assert found.language[part] == pytest.approx(language.mean(0)[:, index].tolist())


def test_the_model_is_left_as_it_was():
    binding, batches = calibrated("internvl")
    model = binding.model.train()
    next(model.parameters()).requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    flags = [parameter.requires_grad for parameter in model.parameters()]
    done = []
    measure(binding, batches, progress=done.append)
    assert done == [1, 2]
    assert all(module.training for module in model.modules())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in binding.blocks.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_agrees_with_float32(dtype):
    binding, batches = calibrated("internvl")
    expected = measure(binding, batches)
    binding.model.to(dtype)
    found = measure(binding, batches)
    for part in PARTS:
        assert found.language[part] == pytest.approx(expected.language[part], rel=0.1)
        assert found.vision[part] == pytest.approx(expected.vision[part], rel=0.1)


def test_ratios_are_raised_to_the_median_of_attention_and_mlp_apart():
    vision = {"attn": (1.0, 4.0, 2.0, 0.0), "mlp": (6.0, 0.0, 3.0, 0.0)}
    language = {"attn": (10.0, 10.0, 10.0, 10.0), "mlp": (10.0, 10.0, 10.0, 10.0)}
    found = ratios(Sensitivity(vision, language))
    assert found["attn"] == pytest.approx((0.15, 0.4, 0.2, 0.15))  # the median of an even number is the middle's mean
    assert found["mlp"] == pytest.approx((0.6, 0.15, 0.3, 0.15))
    assert ratios(Sensitivity(vision, language), floor=0.25)["attn"] == pytest.approx((0.25, 0.4, 0.25, 0.25))
    assert ratios(Sensitivity(vision, language), floor=0.0)["mlp"] == pytest.approx((0.6, 0.0, 0.3, 0.0))


def test_one_word_answers_work_unless_the_mask_is_the_released_one():
    """Nothing after their only token is predicted, so the released mask, which marks that token, sees no gradient."""
    _model, processor = tiny("internvl")
    binding, _ = calibrated("internvl")
    batches = batches_for(binding, processor, 2)
    cut = []
    for batch in batches:
        first = (batch.labels != -100).int().argmax(1)
        labels = torch.full_like(batch.labels, -100)
        rows = torch.arange(len(first))
        labels[rows, first] = batch.labels[rows, first]
        cut.append(replace(batch, labels=labels))
    assert min(ratios(measure(binding, cut))["attn"]) >= 0
    released = measure(binding, cut, parity=True)
    assert released.language == {part: (0.0, 0.0) for part in PARTS}
    with pytest.raises(MBQError, match=r"block 0 \(attn\) is zero.*leave --parity out"):
        ratios(released)


def test_without_any_image_nothing_can_be_weighed():
    _model, processor = tiny("internvl")
    binding, _ = calibrated("internvl")
    batches = batches_for(binding, processor, 2, images=(0, 0, 0, 0))
    with pytest.raises(MBQError, match="add images, or quantize by --method awq"):
        measure(binding, batches)


def test_a_sample_without_an_answer_is_refused():
    binding, batches = calibrated("internvl")
    labels = batches[0].labels.clone()
    labels[1] = -100
    with pytest.raises(MBQError, match="no answer token"):
        measure(binding, [replace(batches[0], labels=labels)])


def test_nan_weights_are_reported_in_a_sentence():
    binding, batches = calibrated("internvl")
    with torch.no_grad():
        binding.module(1, "mlp.down_proj").weight[0, 0] = float("nan")
    with pytest.raises(MBQError, match="not finite"):
        measure(binding, batches)


def test_an_infinite_gradient_is_reported_with_its_block():
    binding, batches = calibrated("internvl")
    handle = binding.module(0, "mlp.down_proj").register_forward_hook(
        lambda module, args, y: _InfiniteGradient.apply(y)
    )
    try:
        with pytest.raises(MBQError, match=r"gradient at block 0 \(attn\) is not finite"):
            measure(binding, batches)
    finally:
        handle.remove()


class _InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


def test_answer_loss_is_a_mean_a_sample():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 4, 5), torch.tensor([[-100, 1, 2, 3], [-100, -100, 4, -100]])
    expected = torch.nn.functional.cross_entropy(logits[0, :3], labels[0, 1:])
    expected = expected + torch.nn.functional.cross_entropy(logits[1, 1:2], labels[1, 2:3])
    assert answer_loss(logits, labels).item() == pytest.approx(expected.item())


def test_sensitivity_is_json():
    found = Sensitivity({"attn": (0.0,), "mlp": (1.0,)}, {"attn": (2.0,), "mlp": (3.0,)})
    assert json.loads(json.dumps(found.to_json()))["language"] == {"attn": [2.0], "mlp": [3.0]}
