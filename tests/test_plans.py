"""Counts of bytes and operations against what is stored and multiplied, and plans made of them by hand."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import mbq
from mbq.blocks import capture
from mbq.cost import EFFICIENCY, Cost, Shapes, input_bytes, search_operations, sensitivity_operations, trace_bytes
from mbq.errors import MBQError
from mbq.methods import METHODS, SearchOptions
from mbq.placement import make_plan
from mbq.recipe import Recipe
from mbq.room import Room, _allowed, cpu_free, storing_folder
from mbq.search import equalize_model
from mbq.sensitivity import token_gradients
from mbq.storage import Keep
from tests.calibrated import calibrated
from tests.tiny import ALL_FAMILY_NAMES


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
    # Padding is not compared and so not kept, and what two comparisons draw is kept once: both are counted.
    for tokens, least in ((0, 0.8 if batch_size > 1 else share), (8, 0.8)):
        keep, most = watched()
        inputs = capture(binding, batches, keep)
        options = SearchOptions(tokens=tokens or None)
        equalize_model(binding, batches, METHODS["awq"], Recipe().numbers, options, storage=keep, inputs=inputs)
        counted = trace_bytes(shapes, lengths, Recipe.of(method="awq", search_tokens=tokens))
        assert least * counted <= most() <= 1.01 * counted


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
