"""One block at a time: the same gradients and choices as with the whole model, and what the model adds in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mbq
from mbq.architecture import Binding
from mbq.blocks import Call, capture, forward, hooked, placed, run
from mbq.calibration import CalibrationBatch
from mbq.placement import Plan, place
from mbq.sensitivity import PARTS, answer_loss, token_gradients
from tests.calibrated import calibrated
from tests.tiny import FAMILY_NAMES

GPU0 = torch.device("cuda:0")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def whole_model_gradients(binding: Binding, batch: CalibrationBatch) -> torch.Tensor:
    """[block, part, batch, token] by one backward pass through the whole model."""
    found: dict[tuple[int, int], torch.Tensor] = {}

    def watch(key: tuple[int, int]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            output.register_hook(lambda gradient: found.update({key: gradient.float().abs().mean(-1)}))

        return hook

    with hooked() as hooks, torch.enable_grad():
        for index, block in enumerate(binding.blocks):
            for part, name in enumerate((binding.architecture.attn_output, binding.architecture.mlp_output)):
                hooks.append(block.get_submodule(name).register_forward_hook(watch((index, part))))
        answer_loss(forward(binding.model, batch).logits, batch.labels).backward()
    binding.model.zero_grad()
    return torch.stack([torch.stack([found[i, p] for p in range(len(PARTS))]) for i in range(len(binding.blocks))])


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_gradients_are_those_of_the_whole_model(family: str) -> None:
    binding, batches = calibrated(family)
    found = token_gradients(binding, batches)
    for batch, gradient in zip(batches, found, strict=True):
        torch.testing.assert_close(gradient, whole_model_gradients(binding, batch), rtol=1e-5, atol=1e-12)


@contextmanager
def adding(block: nn.Module, channels: int) -> Iterator[None]:
    """Inside, the model adds something to the block's output at some tokens, as Qwen3-VL does.

    A hook on the block stands for the model's own code: it runs where the block is let through, too.
    """
    torch.manual_seed(0)
    features = torch.randn(3, channels)

    def add(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[:, 1:4] = output[:, 1:4] + features
        return output

    with hooked() as hooks:
        hooks.append(block.register_forward_hook(add))
        yield


def test_what_the_model_adds_between_blocks_is_kept() -> None:
    binding, batches = calibrated("qwen2_vl")
    seen: list[torch.Tensor] = []
    with adding(binding.blocks[0], binding.model.config.get_text_config().hidden_size):
        handle = binding.blocks[1].register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).clone()),
            with_kwargs=True,
        )
        with torch.no_grad():
            for batch in batches:
                forward(binding.model, batch)
        handle.remove()
        hidden, calls = capture(binding, batches)
    assert all(call.added is None for call in calls[0])
    assert all(call.added is not None and bool(call.added[:, 1:4].any()) for call in calls[1])
    with torch.no_grad():
        for states, first, second, wanted in zip(hidden, calls[0], calls[1], seen, strict=True):
            after = run(binding.blocks[0], states, first)
            assert torch.equal(after + second.added, wanted)


def test_a_call_moves_what_is_added_too() -> None:
    call = Call((torch.zeros(2),), {"mask": None}, torch.ones(2)).to(torch.device("meta"))
    assert call.args[0].device.type == call.added.device.type == "meta"


def test_a_block_that_is_at_home_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    binding, _ = calibrated("internvl")
    pointers = [each.data_ptr() for each in binding.blocks[1].parameters()]
    with placed(binding, 1) as block:
        assert block is binding.blocks[1]
    assert [each.data_ptr() for each in binding.blocks[1].parameters()] == pointers
    place(binding, Plan(torch.device("cpu")))
    assert [each.data_ptr() for each in binding.blocks[1].parameters()] == pointers


def test_a_forward_of_the_instances_own_comes_back() -> None:
    """accelerate's hooks are such."""
    binding, batches = calibrated("internvl")
    block = binding.blocks[1]
    block.forward = own = lambda *args, **kwargs: type(block).forward(block, *args, **kwargs)
    capture(binding, batches)
    assert vars(block)["forward"] is own
    assert "forward" not in vars(binding.blocks[0])


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("changes", [False, True])
def test_a_block_that_waits_comes_back_as_the_same_memory_or_changed(changes: bool) -> None:
    binding, _ = calibrated("internvl")
    place(binding, Plan(torch.device("cuda"), blocks=True))
    before = [(each.data_ptr(), each.sum().item()) for each in binding.blocks[1].parameters()]
    with placed(binding, 1, changes) as block, torch.no_grad():
        for each in block.parameters():
            assert each.device.type == "cuda"
            each.mul_(2)
    after = [(each.data_ptr(), each.sum().item()) for each in binding.blocks[1].parameters()]
    if changes:
        assert [total for _, total in after] == pytest.approx([2 * total for _, total in before])
    else:
        assert after == before


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_one_block_on_the_gpu_chooses_as_the_whole_model_does(
    family: str, float_folder: Callable[[str], Path], calibration: Path
) -> None:
    options: dict[str, Any] = {"data": calibration, "images": calibration.parent / "images", "method": "mbq"}
    options |= {"num_calibration_samples": 4, "device": "cuda"}
    whole = mbq.quantize(float_folder(family), offload="none", **options)
    apart = mbq.quantize(float_folder(family), offload="blocks", **options)
    assert [row.alpha for row in apart.search] == [row.alpha for row in whole.search]
    assert apart.sensitivity == whole.sensitivity
    assert {each.device.type for each in apart.model.parameters()} == {"cpu"}
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor.cpu(), apart.model.state_dict()[name])


def test_a_block_that_was_not_changed_gets_its_own_tensors_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be pages of a file; a copy would take memory."""
    binding, _ = calibrated("internvl")
    block = binding.blocks[1]
    pointers = [each.data_ptr() for each in block.parameters()]

    def to(device: Any) -> None:
        for parameter in block.parameters() if device == GPU0 else ():
            parameter.data = parameter.data.clone()

    monkeypatch.setattr(block, "to", to)
    monkeypatch.setattr("mbq.blocks.device_of", lambda each: torch.device("cpu") if each is block else GPU0)
    with placed(binding, 1):
        assert not any(each.data_ptr() in pointers for each in block.parameters())
    assert [each.data_ptr() for each in block.parameters()] == pointers
