"""Calibration at true shapes with random weights: seconds and memory of each step, and what the race changes.

    python -m benchmarks.search --output benchmarks/results/search/7B.json
    python -m benchmarks.search --compare --blocks 4 --output benchmarks/results/search/compare-7B.json
    python -m benchmarks.search --shape 72B --blocks 4 --tokens 1024 --limit 24 --output ...
    torchrun --nproc-per-node 2 -m benchmarks.search --output ...
    python -m benchmarks.search --demo --output benchmarks/results/search/demo.json     # on a CPU

The models are Qwen2-VL's language models, built from their published configurations; no vision tower runs. Channels
spread as in trained models: norms, up_proj's and v_proj's rows are lognormal, and one channel in a hundred is ten times
larger. A sample has ``--vision`` vision tokens in its middle and an answer at its end.

``--compare`` searches exhaustively and by races that begin with various numbers of tokens: the share of groups with the
same alpha, the loss of the race's alpha over the best, and seconds, the blocks' forward pass included. ``--demo`` does
it for the trained reference models, through ``mbq.quantize``; "plain" compares all candidates on all tokens, one after
the other.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import mbq
from benchmarks.decode_models import qwen2_vl
from mbq import group, ranks
from mbq.architecture import bind
from mbq.calibration import CalibrationBatch
from mbq.checkpoint.compressed_tensors import checkpoint_bytes, quantization_config, save_model
from mbq.cost import cost_of, speed
from mbq.finished import FinishedBlocks
from mbq.methods import METHODS, SearchOptions
from mbq.output import ignored
from mbq.pipeline import target_schemes
from mbq.placement import make_plan, place
from mbq.recipe import Recipe
from mbq.room import room
from mbq.search import GroupSearch, equalize_model
from mbq.sensitivity import measure

SHAPES = {
    "7B": {},
    "72B": {
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
}
ANSWER = 200  # tokens of a sample
FIRST = (128, 256, 512, 1024, 2048)  # tokens of the first round, of the races that are compared
DEMO = ("internvl", "llava_onevision", "qwen2_vl")


def build(shape: str, blocks: int | None, device: str) -> Any:
    """The bf16 model on ``device``."""
    model_class, config = qwen2_vl()
    text = config.get_text_config()
    for name, value in SHAPES[shape].items():
        setattr(text, name, value)
    text.num_hidden_layers = blocks or text.num_hidden_layers
    text.layer_types = ["full_attention"] * text.num_hidden_layers
    config.vision_config.depth = 1
    config.vision_config.hidden_size = text.hidden_size
    torch.manual_seed(0)
    with torch.device(device):
        model = model_class._from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    for block in bind(model).blocks:
        for name in ("input_layernorm", "post_attention_layernorm", "mlp.up_proj", "self_attn.v_proj"):
            weight = block.get_submodule(name).get_parameter("weight")
            weight.mul_(spread(len(weight), weight.device).to(weight.dtype).view(-1, *[1] * (weight.ndim - 1)))
    return model


def spread(channels: int, device: torch.device) -> torch.Tensor:
    sizes = torch.randn(channels, device=device).mul_(0.5).exp_()
    return torch.where(torch.rand(channels, device=device) < 0.01, 10 * sizes, sizes)


def samples(model: Any, args: argparse.Namespace) -> list[CalibrationBatch]:
    """``--samples`` of the same length in batches of ``--batch-size``, without padding."""
    torch.manual_seed(1)
    begin = args.tokens - ANSWER - args.vision
    batches = []
    for _ in range(args.samples // args.batch_size):
        ids = torch.randint(1000, 100_000, (args.batch_size, args.tokens))
        ids[:, begin : begin + args.vision] = model.config.image_token_id
        labels = ids.clone()
        labels[:, :-ANSWER] = -100
        vision = ids == model.config.image_token_id
        batches.append(CalibrationBatch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels, vision))
    return batches


class Steps:
    """Seconds and the device's peak bytes of each step."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.found = device, dict[str, dict[str, float]]()

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        gpu = self.device.type == "cuda"
        if gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        yield
        if gpu:
            torch.cuda.synchronize()
        self.found[name] = {
            "seconds": time.perf_counter() - begun,
            "peak device GB": torch.cuda.max_memory_allocated() / 1e9 if gpu else 0.0,
            "peak process GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        }
        if ranks.rank() == 0:
            print(name, {key: round(value, 2) for key, value in self.found[name].items()}, flush=True)


def run(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Sensitivity, search with packing, and writing, timed."""
    recipe = Recipe.of(
        scheme=args.scheme,
        num_calibration_samples=args.samples,
        batch_size=args.batch_size,
        search_tokens=args.search_tokens,
        offload=args.offload,
        activations=args.activations,
    )
    model = build(args.shape, args.blocks, str(device))
    binding, method = bind(model), METHODS[recipe.method]
    batches, targets = samples(model, args), target_schemes(binding, recipe)
    config = quantization_config(recipe.numbers, *ignored(binding, recipe))
    if args.limit:
        model.to("cpu")
        gc.collect()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(args.limit * 1e9 / total)
    lengths = [(len(batch.labels), args.tokens) for batch in batches[ranks.part(len(batches))]]
    cost = cost_of(binding, lengths, recipe, checkpoint_bytes(model, config))
    plan = make_plan(
        cost,
        room(device, Path(tempfile.gettempdir())),
        device,
        offload=recipe.offload,
        activations=recipe.activations,
        speed=speed(device, torch.bfloat16),
    )
    if ranks.rank() == 0:
        print(plan, flush=True)
    if args.limit:
        place(binding, plan)
    steps = Steps(device)
    with steps.step("sensitivity"):
        sensitivity = measure(binding, batches, storage=plan.storage(plan.inputs))
    finished = FinishedBlocks(binding, targets, method, None) if ranks.rank() == 0 else None
    with steps.step("search and pack"):
        search = equalize_model(
            binding,
            batches,
            method,
            recipe.numbers,
            SearchOptions(tokens=recipe.search_tokens or None),
            sensitivity=sensitivity,
            targets=targets,
            storage=plan.storage(plan.traces),
            finished=finished,
        )
    if finished is not None:
        with steps.step("write"), tempfile.TemporaryDirectory() as folder:
            save_model(model, Path(folder), config, "5GB")
    return {
        "blocks": len(binding.blocks),
        "processes": ranks.count(),
        "plan": str(plan).splitlines(),
        "planned bytes": plan.needs,
        "steps": steps.found,
        "alphas": [[row.block, row.group, row.alpha] for row in search],
    }


def compare(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The search of a few blocks exhaustively and by races, each from the same weights."""
    model = build(args.shape, args.blocks, str(device))
    binding, batches = bind(model), samples(model, args)
    sensitivity, numbers = measure(binding, batches), Recipe.of(scheme=args.scheme).numbers
    weights = {name: value.clone() for name, value in binding.blocks.state_dict().items()}
    searched, seconds = dict[str, list[GroupSearch]](), dict[str, float]()
    for first in (None, *FIRST, None):  # the first is thrown away: it also warms everything up
        binding.blocks.load_state_dict(weights)
        begun = time.perf_counter()
        rows = equalize_model(
            binding, batches, METHODS["mbq"], numbers, SearchOptions(tokens=first), sensitivity=sensitivity
        )
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds[str(first)] = time.perf_counter() - begun
        searched[str(first)] = [row for row in rows if row.alpha is not None]
        print(first, round(seconds[str(first)], 2), flush=True)
    groups = [
        {
            "group": f"block {plain.block}, {plain.group}",
            "losses": list(plain.losses),
            "alphas": {first: rows[index].alpha for first, rows in searched.items()},
        }
        for index, plain in enumerate(searched[str(None)])
    ]
    return {"blocks": len(binding.blocks), "groups": groups, "summary": summary(groups, seconds)}


def summary(groups: list[dict[str, Any]], seconds: dict[str, float]) -> dict[str, dict[str, float]]:
    """For each first round: share of equal alphas, the loss over the least (mean and worst, in %), and seconds."""
    made = {}
    for first in map(str, (*FIRST, None)):
        worse = [100 * (row["losses"][round(20 * row["alphas"][first])] / min(row["losses"]) - 1) for row in groups]
        made[first] = {
            "equal": sum(each == 0 for each in worse) / len(worse),
            "worse, mean %": sum(worse) / len(worse),
            "worse, most %": max(worse),
            "seconds": seconds[first],
            "times faster": seconds[str(None)] / seconds[first],
        }
    return made


def demo(args: argparse.Namespace) -> dict[str, Any]:
    """The reference models by ``mbq.quantize`` on the CPU: plain, and as by default."""
    from mbq.demo import reference_model
    from mbq.world import TASKS, write

    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        tasks = [task.name for task in TASKS.values() if task.needs_image]
        data = write(Path(folder) / "calibration", split="calibration", tasks=tasks, per_task=args.samples)
        for family, scheme, batch in itertools.product(DEMO, ("W3A16", "W4A8"), (1, 8)):
            both = _both_ways(reference_model(family), data, scheme, batch)
            found.append({"family": family, "scheme": scheme, "batch size": batch, **both})
            print(found[-1], flush=True)
    groups = sum(row["groups"] for row in found)
    return {
        "threads": torch.get_num_threads(),
        "runs": found,
        "equal": sum(row["equal"] for row in found) / groups,
        "worse, mean %": sum(sum(row["worse"]) for row in found) / groups,
        "worse, most %": max(max(row["worse"]) for row in found),
    }


def _both_ways(model: Path, data: Path, scheme: str, batch: int) -> dict[str, Any]:
    options = {"data": data, "scheme": scheme, "batch_size": batch, "device": "cpu"}
    several, group._AT_ONCE = group._AT_ONCE, 0
    plain = mbq.quantize(model, search_tokens=0, **options)
    group._AT_ONCE = several
    raced = mbq.quantize(model, **options)
    pairs = [(own, all) for own, all in zip(raced.search, plain.search, strict=True) if own.alpha is not None]
    worse = [100 * (all.losses[round(20 * own.alpha)] / min(all.losses) - 1) for own, all in pairs]
    return {
        "groups": len(pairs),
        "equal": sum(own.alpha == all.alpha for own, all in pairs),
        "worse": worse,
        "plain search, seconds": plain.seconds["search"],
        "search, seconds": raced.seconds["search"],
        "times faster": plain.seconds["search"] / raced.seconds["search"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="7B")
    parser.add_argument("--blocks", type=int, help="of the model, if not all")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=640)
    parser.add_argument("--vision", type=int, default=391)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--scheme", default="W3A16")
    parser.add_argument("--search-tokens", type=int, default=Recipe().search_tokens)
    parser.add_argument("--offload", default="auto")
    parser.add_argument("--activations", default="auto")
    parser.add_argument("--limit", type=float, help="GB of the GPU that may be used")
    parser.add_argument("--compare", action="store_true", help="races with the exhaustive search")
    parser.add_argument("--demo", action="store_true", help="the reference models, on the CPU")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    device = torch.device(ranks.own_device("cuda") if torch.cuda.is_available() else "cpu")
    with torch.no_grad(), ranks.joined():
        found = demo(args) if args.demo else compare(args, device) if args.compare else run(args, device)
    given = [f"--{name.replace('_', '-')} {value}" for name, value in vars(args).items() if _given(parser, name, value)]
    start = f"torchrun --nproc-per-node {ranks.count()}" if ranks.count() > 1 else "python"
    report = {
        "command": " ".join([f"{start} -m benchmarks.search", *given]).replace(" True", ""),
        "device": torch.cuda.get_device_name() if device.type == "cuda" and not args.demo else "CPU",
        "torch": torch.__version__,
        **found,
    }
    if ranks.rank() == 0:
        print(json.dumps({key: value for key, value in report.items() if key not in ("groups", "alphas")}, indent=1))
        if args.output is not None:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(report, indent=1) + "\n")


def _given(parser: argparse.ArgumentParser, name: str, value: Any) -> bool:
    return name != "output" and value != parser.get_default(name)


if __name__ == "__main__":
    main()
