"""One block at a time: the same gradients and choices as with the whole model, and what the model adds in between.

Activations on disk: the same again, and nothing stays there. Plans: what fits where, by counts made by hand.
"""

from __future__ import annotations

import os
import signal
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import mbq
from mbq.architecture import Binding
from mbq.blocks import Call, capture, forward, hooked, placed, run
from mbq.calibration import CalibrationBatch
from mbq.cost import EFFICIENCY, Cost, Shapes, input_bytes, search_operations, sensitivity_operations, trace_bytes
from mbq.errors import MBQError
from mbq.methods import METHODS
from mbq.placement import Plan, make_plan, place
from mbq.recipe import Recipe
from mbq.room import Room, _allowed, cpu_free, storing_folder
from mbq.search import equalize_model
from mbq.sensitivity import PARTS, answer_loss, token_gradients
from mbq.storage import Keep, on_disk
from tests.calibrated import calibrated
from tests.tiny import ALL_FAMILY_NAMES, FAMILY_NAMES

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_tensor_on_disk_is_the_same_and_its_file_has_no_name(dtype: torch.dtype, tmp_path: Path) -> None:
    values = (torch.randn(3, 5, 7) * 10).to(dtype).transpose(0, 1)
    found = on_disk(values, tmp_path)
    assert found.dtype == dtype
    assert torch.equal(found, values)
    assert not list(tmp_path.iterdir())
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    del found
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("family", ["internvl", "qwen2_vl"])
def test_gradients_from_disk_are_those_from_memory(family: str, tmp_path: Path) -> None:
    binding, batches = calibrated(family)
    wanted = token_gradients(binding, batches)
    found = token_gradients(binding, batches, partial(on_disk, folder=tmp_path))
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


@pytest.fixture
def options(calibration: Path) -> dict[str, Any]:
    images = calibration.parent / "images"
    return {"data": calibration, "images": images, "num_calibration_samples": 4, "batch_size": 2, "device": "cpu"}


@pytest.mark.parametrize("distorted", [False, True])
@pytest.mark.parametrize("family", ["internvl", "qwen2_vl"])
def test_disk_makes_the_folder_that_memory_makes(
    family: str, distorted: bool, float_folder: Callable[[str], Path], options: dict[str, Any], tmp_path: Path
) -> None:
    made: dict[str, mbq.QuantizationResult] = {}
    for where in ("cpu", "disk"):
        made[where] = mbq.quantize(
            float_folder(family), output=tmp_path / where, activations=where, distorted_input=distorted, **options
        )
    assert made["disk"].sensitivity == made["cpu"].sensitivity
    assert made["disk"].search == made["cpu"].search
    weights = [(tmp_path / where / "model.safetensors").read_bytes() for where in made]
    assert weights[0] == weights[1]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cpu", "disk"]


@pytest.mark.forks
@pytest.mark.parametrize("end", ["error", "interrupt", "kill"])
def test_nothing_stays_on_the_disk_of_a_run_that_ends_early(
    end: str, float_folder: Callable[[str], Path], options: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "activations"
    folder.mkdir()
    child = os.fork()
    if child == 0:

        def stop(*args: Any) -> None:
            if f"{folder}/" in Path("/proc/self/maps").read_text():
                (tmp_path / "seen").touch()
            if end == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt if end == "interrupt" else MBQError("Stop.")

        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("mbq.search._Search.block", stop)
                mbq.quantize(float_folder("internvl"), activations="disk", offload_folder=folder, **options)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert (tmp_path / "seen").exists()
    assert not list(folder.iterdir())


def test_a_full_disk_of_activations_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(MBQError, match=r"Activations cannot be kept in .*nowhere .*give an --offload-folder"):
        on_disk(torch.ones(3), tmp_path / "nowhere")


def watched() -> tuple[Keep, Callable[[], int]]:
    """A memory to keep tensors in, and the most bytes that it held at one time."""
    state = {"now": 0, "most": 0}

    def leave(count: int) -> None:
        state["now"] -= count

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        made = tensor.clone()
        state["now"] += made.nbytes
        state["most"] = max(state["most"], state["now"])
        weakref.finalize(made, leave, made.nbytes)
        return made

    return keep, lambda: state["most"]


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("family", ALL_FAMILY_NAMES)
def test_bytes_counted_are_those_stored(family: str, batch_size: int) -> None:
    """Within two hundredths above, but for InternLM2, which is handed no cosines and sines: within a tenth."""
    binding, batches = calibrated(family, batch_size)
    shapes, lengths = Shapes(binding), [(each.labels.shape[0], each.labels.shape[1]) for each in batches]
    share = 0.9 if family == "internvl2_internlm2" else 0.95 if batch_size > 1 else 0.98
    keep, most = watched()
    token_gradients(binding, batches, keep)
    counted = input_bytes(shapes, lengths)
    assert share * counted <= most() <= 1.01 * counted
    keep, most = watched()
    inputs = capture(binding, batches, keep)
    equalize_model(binding, batches, METHODS["awq"], Recipe().numbers, storage=keep, inputs=inputs)
    counted = trace_bytes(shapes, lengths)
    assert share * counted <= most() <= 1.01 * counted


class Operations(TorchDispatchMode):
    """What torch's own counter says of every product that runs inside."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        rule = flop_registry.get(func._overloadpacket)
        self.total += rule(*args, **(kwargs or {}), out_val=made) if rule is not None else 0
        return made


def operations(work: Callable[[], Any]) -> int:
    with sdpa_kernel(SDPBackend.MATH), Operations() as found:
        work()
    return found.total


@pytest.mark.parametrize("family", ALL_FAMILY_NAMES)
def test_operations_counted_are_those_that_run(family: str) -> None:
    binding, batches = calibrated(family, batch_size=1)
    shapes, lengths = Shapes(binding), [(1, each.labels.shape[1]) for each in batches]
    recipe = Recipe(scheme="W4A8", method="awq")
    capture(binding, batches)
    rest = operations(lambda: capture(binding, batches))  # the vision tower, which is not counted
    assert operations(lambda: token_gradients(binding, batches)) - 2 * rest == sensitivity_operations(shapes, lengths)
    searched = operations(lambda: equalize_model(binding, batches, METHODS["awq"], recipe.numbers))
    assert searched - rest == search_operations(shapes, lengths, recipe)


GB = 10**9
# Of Qwen2-VL-72B's kind: 145 GB of weights, 4 GB outside the blocks and in the largest one, 172 GB of inputs.
LARGE = Cost(
    weights=145 * GB,
    apart=4 * GB,
    packed=40 * GB,
    working=6 * GB,
    inputs=172 * GB,
    traces=20 * GB,
    copies=3 * GB,
    sensitivity=10**16,
    search=3 * 10**16,
)
GPU0 = torch.device("cuda:0")


def room_of(device: int, cpu: int, disk: int) -> Room:
    return Room(device * GB, cpu * GB, disk * GB, Path("/d"))


@pytest.mark.parametrize(
    ("device", "cpu", "disk", "places"),
    [
        (350, 0, 0, (False, "device", "device")),  # 145 is 41 %; (350 - 145 - 6) * 0.9 = 179 >= 172
        (80, 250, 0, (True, "cpu", "device")),  # (80 - 10) * 0.9 = 63 >= 23; (250 - 40) * 0.9 = 189 >= 172
        (80, 230, 200, (True, "disk", "device")),  # (230 - 40) * 0.9 = 171 < 172
        (35, 70, 200, (True, "disk", "cpu")),  # (35 - 10) * 0.9 = 22.5 < 23; (70 - 40) * 0.9 = 27 >= 23
        (35, 60, 200, (True, "disk", "disk")),  # (60 - 40) * 0.9 = 18 < 23, but >= the 3 of copies
        (24, 250, 0, (True, "cpu", "cpu")),
    ],
)
def test_places_are_what_the_counts_say(device: int, cpu: int, disk: int, places: tuple[bool, str, str]) -> None:
    plan = make_plan(LARGE, room_of(device, cpu, disk), GPU0)
    assert plan.inputs is not None
    assert plan.traces is not None
    assert (plan.blocks, plan.inputs.place, plan.traces.place) == places


def test_what_a_plan_needs_and_says() -> None:
    plan = make_plan(LARGE, room_of(35, 60, 200), GPU0, speed=10**14)
    assert plan.needs == {"device": 10 * GB, "cpu": 43 * GB, "disk": 172 * GB}
    assert plan.seconds == pytest.approx(4 * 10**16 / 10**14 / EFFICIENCY)
    said = str(plan).splitlines()
    assert said[0].startswith("Weights: one block at a time on cuda:0, the others in the model's files")
    assert said[1] == "Activations: every block's inputs, for the sensitivity, 172.00 GB on the disk of /d."
    assert said[2] == "Activations: one block's, for the search, 20.00 GB on the disk of /d."
    assert said[3] == "Needed: about 10.00 GB on cuda:0, 43.00 GB in the CPU's memory, 172.00 GB on the disk of /d."
    assert said[4].startswith("Time: about ")
    cpu = make_plan(LARGE, room_of(300, 300, 300), torch.device("cpu"), activations="device")
    assert cpu.needs == {"cpu": (40 + 6 + 172) * GB}
    assert cpu.seconds is None


@pytest.mark.parametrize(
    ("place", "options", "sentence"),
    [
        (
            (100, 300, 300),
            {"offload": "none"},
            "151.00 GB are needed on cuda:0 .* 100.00 GB are free; give --offload b",
        ),
        ((9, 300, 300), {}, r"10.00 GB are needed on cuda:0 .*; lower --batch-size or --max-seq-length"),
        ((3, 300, 300), {}, r"10.00 GB are needed on cuda:0 .*; run on a machine with more memory"),
        ((80, 30, 300), {}, r"40.00 GB are needed in the CPU's memory"),
        (
            (80, 100, 300),
            {"activations": "cpu"},
            r"there is room for 54.00 GB in the CPU's memory; give --activations disk",
        ),
        ((80, 100, 96), {}, r"128 calibration samples take 172.00 GB.*lower --num-calibration-samples to 64, or store"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_way_out(
    place: tuple[int, int, int], options: dict[str, str], sentence: str
) -> None:
    with pytest.raises(MBQError, match=sentence) as error:
        make_plan(LARGE, room_of(*place), GPU0, samples=128, **options)
    assert str(error.value).count(". ") == 0


def test_control_groups_limit_the_memory(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    for folder, limit in ((tmp_path / "a", "5000"), (inner, "max")):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text("3000\n")
        (folder / "memory.stat").write_text("anon 1000\ninactive_file 500\n")
    assert _allowed(inner, tmp_path) == [5000 - 3000 + 500]
    assert _allowed(tmp_path / "none", tmp_path) == []
    assert cpu_free() > 0


def test_where_activations_go_on_disk(tmp_path: Path) -> None:
    assert storing_folder(None, tmp_path / "new" / "out") == tmp_path
    assert storing_folder(str(tmp_path), "elsewhere") == tmp_path
    with pytest.raises(MBQError, match="nowhere is no folder; make it"):
        storing_folder(str(tmp_path / "nowhere"), None)


def test_a_run_that_cannot_store_ends_before_any_block(
    float_folder: Callable[[str], Path], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mbq.pipeline.room", lambda device, folder: Room(10**9, 10**9, 10**5, folder))
    with pytest.raises(MBQError, match=r"there is room for 0.09 MB on the disk of .*; give --activations cpu"):
        mbq.quantize(float_folder("internvl"), activations="disk", **options)


def test_the_plan_is_announced_before_the_search(float_folder: Callable[[str], Path], options: dict[str, Any]) -> None:
    order: list[str] = []
    mbq.quantize(
        float_folder("internvl"),
        progress=lambda step, *rest: order.append(step),
        announce=lambda plan: order.append(str(plan)),
        **options,
    )
    said = order.index(next(each for each in order if each.startswith("Weights: the whole model on cpu.")))
    assert set(order[:said]) == {"calibrate"}
    assert "sensitivity" in order[said:]
    assert "Time: about" in order[said]
