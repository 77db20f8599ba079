"""What to try, as commands that can be copied: the folder's own recipe with something changed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mbq.diagnosis.measurements import Measurements
from mbq.recipe import Recipe
from mbq.scheme import SCHEMES

DATA = "CALIBRATION.jsonl"  # recipe.yaml keeps a file's name, not where it lies
# The next scheme with more bits: of weights first, then of activations.
MORE_BITS = {
    "W2A16": "W3A16",
    "W3A16": "W4A16",
    "W4A16": "W8A8",
    "W4A16_SYM": "W4A16",
    "W4A4": "W4A8",
    "W3A8": "W4A8",
    "W4A8": "W8A8",
}
SMALLER_GROUP = 64
# Options of a recipe that decide the numbers, and are repeated where they are not the defaults.
KEPT = (
    "group_size",
    "norm",
    "objective",
    "floor",
    "vision_weight",
    "smooth_alpha",
    "vision_tower",
    "formatting",
    "text",
)


def quantize(m: Measurements, **changes: Any) -> str:
    """``mbq quantize`` with the folder's recipe and ``changes``; None takes an option out, ``ignore`` adds to it."""
    recipe = {"method": "mbq", **m.recipe, "scheme": m.scheme.name, **changes}
    parts = ["mbq", "quantize", m.baseline, "--scheme", recipe["scheme"], "--method", recipe["method"]]
    if recipe["method"] != "rtn" or recipe.get("vision_tower"):
        parts += ["--data", m.recipe.get("data") or DATA]
    size = SCHEMES.get(recipe["scheme"], m.scheme).weights.group_size
    usual = asdict(Recipe()) | {"group_size": size}
    for name in KEPT if size else KEPT[1:]:
        value = recipe.get(name)
        if value is not None and value != usual[name]:
            parts += [f"--{name.replace('_', '-')}", value]
    ignored = m.recipe.get("ignore")
    for pattern in [*(ignored if isinstance(ignored, list) else ()), changes.get("ignore")]:
        parts += ["--ignore", pattern] if pattern else []
    return " ".join(shlex.quote(str(part)) for part in [*parts, "--output", f"{m.model}-2"])


def block_pattern(m: Measurements, block: int, linears: Sequence[str] = ()) -> str:
    """What --ignore takes for a block, or for these linears of it, under the names of transformers and of engines."""
    names = [re.escape(step) for step in m.blocks.split(".")[-2:]]
    inside = f"({'|'.join(re.escape(linear) for linear in linears)})$" if linears else ".*"
    return f"re:.*{'.*'.join(names)}\\.{block}\\.{inside}"


def against_outliers(m: Measurements, block: int, linears: tuple[str, ...]) -> str:
    method = m.recipe.get("method", "rtn")
    ignore = "keep what reads it in 16 bits: " + quantize(m, ignore=block_pattern(m, block, linears))
    if method == "rtn":
        return f"Let a method equalize the channels: {quantize(m, method='mbq')}; or {ignore}"
    if method == "smoothquant":
        return f"Move more of the range into the weights: {quantize(m, smooth_alpha=0.75)}; or {ignore}"
    return ignore[0].upper() + ignore[1:]


def balance(m: Measurements) -> str:
    """Weigh vision and language tokens apart, or otherwise than now."""
    data = "Calibrate on rows with pictures, with both short and long answers"
    if m.recipe.get("method") != "mbq":
        return f"{data}, and weigh the modalities apart: {quantize(m, method='mbq')}"
    if m.recipe.get("norm", "mae") == "mae":
        return f"{data}; try the other norm: {quantize(m, norm='mse')}; or more weight for vision tokens: --floor 0.5"
    return f"{data}; give vision tokens more weight: {quantize(m, floor=0.5)}"


def more_bits(m: Measurements) -> str:
    found = []
    if m.scheme.name in MORE_BITS:
        found.append(f"More bits: {quantize(m, scheme=MORE_BITS[m.scheme.name], group_size=None)}")
    size = m.scheme.weights.group_size
    if size is not None and size > SMALLER_GROUP:
        found.append(f"smaller groups: {quantize(m, group_size=SMALLER_GROUP)}")
    if m.recipe.get("method") != "mbq":
        found.append(f"the method that weighs the modalities apart: {quantize(m, method='mbq')}")
    worst = worst_block(m)
    found.append(f"the block with the largest error in 16 bits: {quantize(m, ignore=block_pattern(m, worst))}")
    return "; or ".join(found)


def worst_block(m: Measurements) -> int:
    """The block with the largest own error anywhere that matters."""
    return max(m.places(), key=lambda place: m.own(place[1], place[2])[place[0]] or 0.0)[0]


def empty(m: Measurements) -> str:
    last = len(m.propagation.blocks) - 1
    return (
        "Check eos_token_id in the folder's generation_config.json against the float model's; else keep the last "
        f"block, which decides the first token, in 16 bits: {quantize(m, ignore=block_pattern(m, last))}"
    )


def random(m: Measurements) -> str:
    return f"Rule the kernel out: mbq generate {m.model} --kernel reference --prompt ...; then {_lower(more_bits(m))}"


def loops(m: Measurements) -> str:
    return f"Calibrate on long answers (captions), on which loops show; then {_lower(more_bits(m))}"


def conditions(m: Measurements) -> str:
    return f"Calibrate on rows that ask for such forms, with short answers: {quantize(m)}"


def faster(m: Measurements) -> str:
    speed = m.speed
    assert speed is not None
    if speed.device.startswith("CPU"):
        return (
            "On the CPU packed weights save memory, not time: the reference kernel unpacks each weight in every pass. "
            "Run it on a GPU, or export it for llama.cpp: mbq export MODEL --format gguf"
        )
    if "reference" in speed.kernels:
        return "Layers run in the reference kernel, which unpacks each weight in every pass: mbq doctor says why"
    if speed.reading > 0.5:
        return "Memory is the limit, so that only fewer bytes make it faster: a scheme with fewer bits; mbq bench"
    return (
        "The time goes into launching kernels and into what is not linear; larger models and batches gain. "
        "Compare with mbq bench, and decode over a static cache as mbq generate does"
    )


def _lower(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]
