"""Block by block gives what the model gives."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch

from mbq import blocks
from mbq.blocks import capture, forward, run, run_with, streamed
from mbq.storage import in_memory
from mbq.trace import GroupTrace, Look, trace
from tests.calibrated import calibrated
from tests.tiny import FAMILY_NAMES


@pytest.fixture(scope="module", params=FAMILY_NAMES)
def setting(request):
    return calibrated(request.param)


def recorded(module, batches, model):
    """What goes into and comes out of a module in plain forward passes of the model."""
    inputs, outputs = [], []

    def hook(module, args, kwargs, output):
        inputs.append((args[0] if args else kwargs["hidden_states"]).clone())
        outputs.append((output[0] if isinstance(output, tuple) else output).clone())

    handle = module.register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        for batch in batches:
            forward(model, batch)
    handle.remove()
    return inputs, outputs


@pytest.mark.parametrize("storage", [None, in_memory])
def test_running_the_blocks_one_by_one_gives_the_models_hidden_states(setting, storage):
    binding, batches = setting
    hidden, calls = capture(binding, batches, storage)
    for index, block in enumerate(binding.blocks):
        inputs, outputs = recorded(block, batches, binding.model)
        torch.testing.assert_close(hidden, inputs)
        with torch.no_grad():
            hidden = [run(block, states, call) for states, call in zip(hidden, calls[index], strict=True)]
        torch.testing.assert_close(hidden, outputs)


def test_trace_records_what_each_group_reads_and_what_its_inspected_module_returns(setting):
    binding, batches = setting
    block = binding.blocks[0]
    hidden, calls = capture(binding, batches)
    traces = [GroupTrace(group) for group in binding.architecture.groups]
    outputs, finite = trace(block, traces, hidden, calls[0])
    assert len(finite) == len(batches)
    assert all(finite)
    torch.testing.assert_close(outputs, recorded(block, batches, binding.model)[1])
    for found in traces:
        for path in found.group.linears:
            read, _ = recorded(block.get_submodule(path), batches, binding.model)
            torch.testing.assert_close(found.inputs, read)
        _, returned = recorded(block.get_submodule(found.group.inspect), batches, binding.model)
        torch.testing.assert_close(found.outputs, returned)


@pytest.mark.parametrize("storage", [None, in_memory])
def test_a_trace_keeps_the_tokens_that_are_looked_at_and_counts_all(setting, storage):
    """Single tokens where a module treats them alone, else whole batches; none of a batch without such tokens."""
    binding, batches = setting
    block = binding.blocks[0]
    hidden, calls = capture(binding, batches)
    whole = [GroupTrace(group) for group in binding.architecture.groups]
    trace(block, whole, hidden, calls[0])
    lengths = [batch.labels.numel() for batch in batches]
    torch.manual_seed(0)
    counted, compared = torch.rand(sum(lengths)) < 0.7, torch.rand(sum(lengths)) < 0.3
    compared[: lengths[0]] = False
    for all, alone in zip(whole, (False, True, True, True), strict=True):
        found = GroupTrace(all.group, Look(counted, compared, alone))
        trace(block, [found], hidden, calls[0], storage)
        assert found.batches == list(range(1, len(batches)))
        x, y = (torch.cat([each.flatten(0, -2) for each in kept]) for kept in (all.inputs, all.outputs))
        torch.testing.assert_close(torch.stack(found.sums).sum(0), x[counted].abs().sum(0))
        torch.testing.assert_close(torch.stack(found.maxima).amax(0), x[counted].abs().amax(0))
        if alone:
            torch.testing.assert_close(torch.cat(found.inputs), x[compared])
            torch.testing.assert_close(torch.cat(found.outputs), y[compared])
        else:
            torch.testing.assert_close((found.inputs, found.outputs), (all.inputs[1:], all.outputs[1:]))
            assert len(found.calls) == len(batches) - 1


def test_run_with_equals_a_copy_that_has_these_weights(setting):
    binding, batches = setting
    block, group = binding.blocks[1], binding.architecture.groups[0]
    hidden, calls = capture(binding, batches)
    found = GroupTrace(group)
    trace(block, [found], hidden, calls[1])  # any hidden states will do
    module = block.get_submodule(group.inspect)
    before = copy.deepcopy(module.state_dict())
    paths = [path.removeprefix(group.inspect + ".") for path in group.linears]
    weights = {path: torch.randn_like(module.get_submodule(path).weight) * 0.1 for path in paths}

    changed = copy.deepcopy(module)
    for path, weight in weights.items():
        changed.get_submodule(path).weight.data = weight
        changed.get_submodule(path).register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    call = found.calls[0]
    with torch.no_grad():
        expected = changed(*call.args, **call.kwargs)[0]
    output = run_with(module, call, weights, lambda x: x * 0.5)

    torch.testing.assert_close(output, expected)
    assert not torch.allclose(output, found.outputs[0])
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not any(module.get_submodule(path)._forward_pre_hooks for path in paths)


def test_capture_leaves_modes_and_hooks_as_they_were(setting):
    binding, batches = setting
    binding.model.train()
    binding.blocks[1].eval()
    modes = [module.training for module in binding.model.modules()]
    try:
        capture(binding, batches)
        assert [module.training for module in binding.model.modules()] == modes
        assert not any(block._forward_pre_hooks for block in binding.blocks)
    finally:
        binding.model.eval()


def test_a_streamed_model_has_one_block_in_place_at_a_time(setting, monkeypatch):
    binding, batches = setting
    with torch.no_grad():
        wanted = forward(binding.model, batches[0]).logits
    events = []

    @contextmanager
    def placed(binding, index):
        events.append(("arrives", index))
        yield binding.blocks[index]
        events.append(("leaves", index))

    monkeypatch.setattr(blocks, "placed", placed)
    with streamed(binding), torch.no_grad():
        assert torch.equal(forward(binding.model, batches[0]).logits, wanted)
    assert events == [(what, index) for index in range(len(binding.blocks)) for what in ("arrives", "leaves")]
    forward(binding.model, batches[0])
    assert len(events) == 2 * len(binding.blocks), "no hook is left"
