"""Where weights and stored activations are while a model is calibrated: chosen before the start, by what is free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from mbq.architecture import Binding
from mbq.cost import Cost, seconds
from mbq.errors import MBQError
from mbq.room import Room
from mbq.storage import PLACES, Keep, keeper

# Of the device's free memory, for the weights of a whole model: what is stored and made should fit beside them.
WEIGHTS_SHARE = 0.6
# Of what is left in a memory, for stored activations.
STORED_SHARE = 0.9


@dataclass(frozen=True)
class Stored:
    """``bytes`` of activations in a ``place``: "device", "cpu" or "disk"."""

    place: str
    bytes: int


@dataclass(frozen=True)
class Plan:
    """What was chosen, and what it takes.

    device   that computes
    blocks   whether blocks wait in the CPU's memory or the model's files and come to the device one at a time
    inputs   what the sensitivity stores, None where it stores nothing
    traces   what the search stores
    folder   of what is stored on a disk
    needs    bytes by place, "cpu" alone where that is the device
    seconds  about how long sensitivity and search take, None where the device's speed is unknown
    """

    device: torch.device
    blocks: bool = False
    inputs: Stored | None = None
    traces: Stored | None = None
    folder: Path = Path()
    needs: Mapping[str, int] = field(default_factory=dict)
    seconds: float | None = None

    def storage(self, stored: Stored | None) -> Keep | None:
        return keeper(stored.place if stored else None, self.folder)

    def __str__(self) -> str:
        """A line each for weights, stored activations, what is needed, and time."""
        where = _names(self.device, self.folder)
        one = f"one block at a time on {self.device}, the others in the model's files or the CPU's memory"
        lines = [f"Weights: {one if self.blocks else f'the whole model on {self.device}'}."]
        kinds = (
            ("every block's inputs, for the sensitivity", self.inputs),
            ("one block's, for the search", self.traces),
        )
        for kind, stored in kinds:
            if stored is not None:
                lines.append(f"Activations: {kind}, {gigabytes(stored.bytes)} {where[stored.place]}.")
        needs = [f"{gigabytes(count)} {where[place]}" for place, count in self.needs.items() if count]
        lines += [f"Needed: about {', '.join(needs)}."] if needs else []
        lines += [f"Time: about {duration(self.seconds)}, without reading and loading."] if self.seconds else []
        return "\n".join(lines)


def make_plan(
    cost: Cost,
    room: Room,
    device: torch.device,
    *,
    offload: str = "auto",
    activations: str = "auto",
    samples: int = 1,
    speed: float | None = None,
) -> Plan:
    """Choose places for what ``cost`` counts.

    offload      "blocks": all but one decoder block are off the device; "none": none are; "auto": they are where the
                 weights would take more than 60 % of the device's free memory
    activations  a place, or "auto": the first of device, CPU and disk that has room
    samples      that ``cost`` was counted for
    speed        of the device, in operations a second

    Raises MBQError where something does not fit, with the option that would make it fit.
    """
    gpu = device.type == "cuda"
    blocks = gpu and (offload == "blocks" or (offload == "auto" and not _fits_whole(cost, room)))
    fixed = _fixed(cost, gpu, blocks)
    _check_device(fixed, cost, room, device, blocks)
    free = {place: int(STORED_SHARE * (room.free(place) - fixed.get(place, 0))) for place in PLACES}
    places = [activations] if activations != "auto" else list(PLACES)
    if not gpu:
        places = list(dict.fromkeys("cpu" if place == "device" else place for place in places))
    needs, chosen = dict(fixed), []
    for stored, copies in ((cost.inputs, 0), (cost.traces, cost.copies)):
        uses = _uses(stored, copies)
        place = next((each for each in places if stored and _fits(uses[each], free)), None)
        chosen.append(Stored(place, stored) if place else None)
        if stored and place is None:
            raise MBQError(_no_room(stored, uses, free, room, places, device, samples))
        for where, count in uses[place].items() if place else ():
            needs[where] = max(needs.get(where, 0), fixed.get(where, 0) + count)
    inputs, traces = chosen
    return Plan(device, blocks, inputs, traces, room.folder, needs, speed and seconds(cost, speed))


def place(binding: Binding, plan: Plan) -> None:
    """Move the model, which is on the CPU, to where it will be calibrated."""
    if not plan.blocks:
        binding.model.to(plan.device)
        return
    blocks = set(binding.blocks.modules())
    for module in binding.model.modules():
        if module not in blocks:
            _move_own(module, plan.device)


def _fits_whole(cost: Cost, room: Room) -> bool:
    return cost.weights <= WEIGHTS_SHARE * room.device and cost.weights + cost.working <= room.device


def _fixed(cost: Cost, gpu: bool, blocks: bool) -> dict[str, int]:
    """Bytes by place, whatever is stored. Weights on the CPU are mapped files, until they are changed: then packed."""
    if not gpu:
        return {"cpu": cost.packed + cost.working}
    if not blocks:
        return {"device": cost.weights + cost.working}
    return {"device": cost.apart + cost.working, "cpu": cost.packed}


def _uses(stored: int, copies: int) -> dict[str, dict[str, int]]:
    """What a phase takes by place, for each place that its activations may be stored in."""
    everything = stored + copies
    return {"device": {"device": everything}, "cpu": {"cpu": everything}, "disk": {"disk": stored, "cpu": copies}}


def _fits(uses: Mapping[str, int], free: Mapping[str, int]) -> bool:
    return all(count <= free[place] for place, count in uses.items())


def _check_device(fixed: Mapping[str, int], cost: Cost, room: Room, device: torch.device, blocks: bool) -> None:
    for place, count in fixed.items():
        left = room.free(place)
        if count <= left:
            continue
        where = _names(device, room.folder)[place]
        takes = f"{gigabytes(count)} are needed {where} for weights and one step, and {gigabytes(left)} are free"
        if place == "device" and not blocks and cost.apart + cost.working <= left:
            raise MBQError(f"{takes}; give --offload blocks.")
        if cost.working > count - left:
            raise MBQError(f"{takes}; lower --batch-size or --max-seq-length, or choose another --device.")
        raise MBQError(f"{takes}; run on a machine with more memory, or choose another --device.")


def _no_room(
    stored: int,
    uses: Mapping[str, Mapping[str, int]],
    free: Mapping[str, int],
    room: Room,
    places: list[str],
    device: torch.device,
    samples: int,
) -> str:
    """Why no place has room, and what would: another place, or as many samples as the largest place takes."""
    where = _names(device, room.folder)
    left = ", ".join(f"{gigabytes(max(0, free[place]))} {where[place]}" for place in places)
    takes = f"Activations of {samples} calibration samples take {gigabytes(stored)}, and there is room for {left}"
    others = [place for place in PLACES if place not in places and _fits(uses[place], free)]
    others = [place for place in others if place != "device" or device.type == "cuda"]
    if others:
        return f"{takes}; give --activations {others[0]}."
    shares = [min(max(0, free[p]) / count for p, count in uses[place].items() if count) for place in places]
    fewer = int(samples * max(shares))
    lower = f"--num-calibration-samples to {fewer}" if fewer else "--max-seq-length"
    return f"{takes}; lower {lower}, or store them on a larger disk by --activations disk --offload-folder DIR."


def _names(device: torch.device, folder: Path) -> dict[str, str]:
    return {"device": f"on {device}", "cpu": "in the CPU's memory", "disk": f"on the disk of {folder}"}


def gigabytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e7 else f"{count / 1e6:,.2f} MB"


def duration(count: float) -> str:
    if count < 90:
        return f"{max(1, round(count))} s"
    return f"{count / 60:.0f} min" if count < 5400 else f"{count / 3600:.1f} h"


def _move_own(module: nn.Module, device: torch.device) -> None:
    """The module's own parameters and buffers, not its children's."""
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.to(device)
    for name, buffer in module.named_buffers(recurse=False):
        module._buffers[name] = buffer.to(device)
