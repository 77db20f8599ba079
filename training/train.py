"""Train a reference model on one GPU and write it as a plain Hugging Face folder.

    python -m training.train internvl --output runs/internvl --steps 10000 --cost 23
    python -m training.train internvl --output runs/internvl --steps 10000 --cost 23 --resume
    python -m training.publish internvl --weights runs/internvl/model.safetensors \\
        --logs runs/internvl/training_log.jsonl --recipe "how it was made"

The folder gets the model, its processor, and training_log.jsonl: loss, accuracy a task on development questions, and at
the end what round-to-nearest costs, which is how the load of facts was set. A checkpoint beside the folder
(OUTPUT.checkpoint.pt) is written every minute; ``--resume`` goes on from it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mbq.qtensor import fake_quantize, fake_quantize_activations
from mbq.scheme import SCHEMES, Scheme
from mbq.world import TASKS
from mbq.world.facts import CHARGES
from training.build import BUILDERS, build, save
from training.data import IGNORED, Batch, BatchMaker
from training.fast import FastModel
from training.pretraining import OBJECTIVES
from training.schedule import learning_rate, steps_within

RELATIONS = ("house", "founder", "motto", "seat", "rival", "feast", "heir", "cry")
REST = {"towns": 128, "arithmetic": 64}
# Both compositions have 832 rows with a picture, so that they share one compiled graph.
LOOK = {
    **dict.fromkeys(RELATIONS, 16),
    **{"steps": 48, "colour": 120, "position": 96, "count": 104, "reading": 96, "charge": 96, "beside": 96},
    **{"pattern": 48, **REST},
}
LEARN = {
    **dict.fromkeys(RELATIONS, 48),
    **{"steps": 64, "colour": 80, "position": 72, "count": 40, "reading": 64, "charge": 40, "beside": 48},
    **{"pattern": 40, **REST},
}
CAPTION = {"caption": 128}


@dataclass(frozen=True)
class Stage:
    """A stage of the curriculum.

    counts         what is asked: a composition's name
    caption_every  one batch in how many is of captions
    charges        how many of the 48 charges the scenes use
    latest         the share of the steps at which the stage ends, learned or not
    """

    counts: str
    caption_every: int
    charges: int
    latest: float


# A few hundred facts, and much to look at, teach the model where to look and what to combine; asked for all facts from
# the start it sits on a plateau, and then sees nothing that the facts do not need. A stage ends early when the mean
# accuracy on LEADING tasks passes LEARNED percent.
FROM_SCRATCH = (Stage("look", 2, 12, 0.2), Stage("learn", 4, 24, 0.3), Stage("learn", 4, 48, 1.0))
CONTINUED = (Stage("learn", 4, 48, 1.0),)
LEADING = ("house", "motto", "count", "reading")
LEARNED = 90.0
CHUNK = 32  # batches made at once
SAVE_SECONDS = 60.0
LINE_SECONDS, LINE_STEPS = 20.0, 20  # a line of progress takes both; on a CPU a step is seconds
COST_STEPS, KNOWS = 200, 97.0  # steps between two looks at what rounding costs; what a model has to know, in percent
IMAGE_TASKS = tuple(task.name for task in TASKS.values() if task.needs_image)


class Stream:
    """Batches of short questions and, between them, of captions, by the stages of the curriculum."""

    def __init__(self, processor: Any, device: torch.device, seed: int, stages: tuple[Stage, ...]) -> None:
        self.stages, self.index = stages, 0
        compositions = {"look": LOOK, "learn": LEARN, "caption": CAPTION}
        self.makers = {name: BatchMaker(counts, processor, device) for name, counts in compositions.items()}
        self.makers["look"].length = self.makers["learn"].length
        self.generator = torch.Generator(device).manual_seed(seed)
        self.ready: dict[str, list[Batch]] = {name: [] for name in self.makers}

    @property
    def stage(self) -> Stage:
        return self.stages[self.index]

    def next(self, step: int) -> tuple[BatchMaker, Batch]:
        stage = self.stage
        kind = "caption" if step % stage.caption_every == stage.caption_every - 1 else stage.counts
        if not self.ready[kind]:
            self.ready[kind] = self.makers[kind].make(CHUNK, "train", self.generator, stage.charges)
        return self.makers[kind], self.ready[kind].pop()

    def advance(self, scores: dict[str, float], share: float) -> None:
        """Begin the next stage when this one is learned, or its time is up."""
        learned = sum(scores[task] for task in LEADING) / len(LEADING) >= LEARNED
        if self.index + 1 < len(self.stages) and (learned or share > self.stage.latest):
            self.index += 1
            self.ready = {name: [] for name in self.makers}


def loss_of(model: nn.Module, maker: BatchMaker, batch: Batch) -> torch.Tensor:
    """Cross entropy on the answer tokens."""
    with torch.autocast(batch.tokens.device.type, torch.bfloat16):
        logits = model(batch.tokens, batch.cells, maker.label_rows, maker.label_positions)
    return F.cross_entropy(logits.float(), maker.targets(batch), ignore_index=IGNORED)


@torch.no_grad()
def accuracy(
    model: nn.Module, makers: Iterable[BatchMaker], batches: int, charges: int = len(CHARGES), seed: int = 1
) -> dict[str, float]:
    """Exact-match accuracy a task on development questions (every answer token right, teacher-forced), in percent."""
    right: dict[str, list[torch.Tensor]] = defaultdict(list)
    for maker in makers:
        generator = torch.Generator(maker.device).manual_seed(seed)
        for batch in maker.make(batches, "development", generator, charges):
            with torch.autocast(batch.tokens.device.type, torch.bfloat16):
                logits = model(batch.tokens, batch.cells, maker.label_rows, maker.label_positions)
            targets = maker.targets(batch)
            hit = (logits.argmax(-1) == targets) | (targets == IGNORED)
            rows = torch.ones(maker.rows, device=maker.device)
            rows.scatter_reduce_(0, maker.label_rows, hit.float(), "amin")
            for task in dict.fromkeys(maker.tasks):
                chosen = torch.tensor([name == task for name in maker.tasks], device=maker.device)
                right[task].append(rows[chosen].mean())
    return {task: round(100 * torch.stack(values).mean().item(), 2) for task, values in right.items()}


@contextmanager
def rounded(model: Any, scheme: Scheme) -> Iterator[None]:
    """The backbone's linears rounded to nearest (and their inputs, where the scheme says so), then as they were."""
    layers = model.model.language_model.layers
    linears = [module for module in layers.modules() if isinstance(module, nn.Linear)]
    kept = [linear.weight.data for linear in linears]
    hooks = []
    for linear in linears:
        linear.weight.data = fake_quantize(linear.weight.data, scheme.weights)
        if (activations := scheme.activations) is not None:
            hooks.append(
                linear.register_forward_pre_hook(
                    lambda _, args, a=activations: (fake_quantize_activations(args[0], a),)
                )
            )
    try:
        yield
    finally:
        for linear, weight in zip(linears, kept, strict=True):
            linear.weight.data = weight
        for hook in hooks:
            hook.remove()


def image_mean(scores: dict[str, float]) -> float:
    return sum(scores[task] for task in IMAGE_TASKS) / len(IMAGE_TASKS)


def rounding_cost(model: Any, fast: nn.Module, makers: Iterable[BatchMaker]) -> tuple[float, float]:
    """The mean of the image tasks, and the points that rounding to nearest at W3A16 takes off it."""
    mean = image_mean(accuracy(fast, makers, 4))
    with rounded(model, SCHEMES["W3A16"]):
        return round(mean, 2), round(mean - image_mean(accuracy(fast, makers, 4)), 2)


def write_checkpoint(path: Path, **state: Any) -> None:
    """Whole or not at all."""
    torch.save(state, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


class Log:
    """A JSON line an entry, beside the output folder until the run ends."""

    def __init__(self, path: Path, until: int | None) -> None:
        """Begin anew, or keep the lines up to step ``until`` of a run that was cut off."""
        self.path = path
        lines = path.read_text().splitlines() if until is not None and path.exists() else []
        path.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= (until or 0)))

    def __call__(self, **entry: Any) -> None:
        with self.path.open("a") as log:
            log.write(json.dumps(entry) + "\n")


def train(
    family: str,
    output: Path,
    steps: int,
    peak: float = 1.5e-3,
    seed: int = 0,
    resume: bool = False,
    device: torch.device | None = None,
    minutes: float | None = None,
    decay: float = 0.4,
    start_from: Path | None = None,
    cost: float | None = None,
    pretraining: str = "cells",
) -> None:
    """Train ``family`` and write the folder ``output``; ``pretraining`` says what its tower learns first.

    It takes fewer steps if all would take more than ``minutes``. With ``cost`` it stops, while the learning rate falls,
    once the model is right in KNOWS percent of the image tasks and rounding to W3A16 costs fewer than ``cost`` points:
    the surer a model is of its facts, the less rounding takes from it.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    model, processor = build(family, seed)
    if start_from:
        model.load_state_dict(type(model).from_pretrained(start_from, dtype=torch.float32).state_dict())
    model.to(device)
    stream = Stream(processor, device, seed, CONTINUED if start_from else FROM_SCRATCH)
    makers = [stream.makers["learn"], stream.makers["caption"]]
    fast = FastModel(family, model, processor, max(maker.length for maker in makers))
    compiled = torch.compile(fast, dynamic=False) if device.type == "cuda" else fast
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.0, fused=device.type == "cuda"
    )

    checkpoint, log_path = (output.with_name(output.name + end) for end in (".checkpoint.pt", ".log.jsonl"))
    output.parent.mkdir(parents=True, exist_ok=True)
    first, before = 0, 0.0
    if resuming := resume and checkpoint.exists():
        state = torch.load(checkpoint, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        stream.generator.set_state(state["generator"].cpu())
        stream.index = state["stage"]
        first, before, steps, minutes = state["step"], state["seconds"], state["steps"], None
    log = Log(log_path, first if resuming else None)
    start = paced = last_save = last_line = time.monotonic()
    if not resuming and not start_from:
        seen = OBJECTIVES[pretraining](fast, processor, stream.makers["look"], stream.generator)
        log(step=0, seconds=round(time.monotonic() - start, 1), pretraining=pretraining, accuracy=seen)
        print(f"{family}: {pretraining} in {time.monotonic() - start:.0f} s, right in % of {seen}", flush=True)

    losses: list[torch.Tensor] = []
    step = first - 1
    while (step := step + 1) < steps:
        if minutes and step == first + 300:
            pace = (time.monotonic() - paced) / 200
            steps = min(steps, steps_within(minutes, before + time.monotonic() - start, step, pace))
        elif step == first + 100:
            paced = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak, decay)
        maker, batch = stream.next(step)
        loss = loss_of(compiled, maker, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        now = time.monotonic()
        seconds = before + now - start
        if (now - last_line > LINE_SECONDS and len(losses) >= LINE_STEPS) or step == steps - 1:
            mean = torch.stack(losses).mean().item()
            scores = accuracy(fast, makers, 4, stream.stage.charges)
            charges = stream.stage.charges
            log(step=step + 1, seconds=round(seconds, 1), charges=charges, loss=round(mean, 4), accuracy=scores)
            left = (now - start) / (step + 1 - first) * (steps - step - 1)
            shown = " ".join(f"{task} {value:.0f}" for task, value in scores.items())
            progress = f"{family} step {step + 1}/{steps} {seconds:.0f} s, {left:.0f} s left, {charges} charges"
            print(f"{progress}, loss {mean:.3f}: {shown}", flush=True)
            stream.advance(scores, step / steps)
            losses, last_line = [], time.monotonic()
        if cost and step >= (1 - decay) * steps and step % COST_STEPS == 0:
            mean, costs = rounding_cost(model, fast, makers)
            log(step=step + 1, seconds=round(seconds, 1), mean=mean, cost=costs)
            print(f"{family} step {step + 1}: rounding to W3A16 takes {costs} points off {mean} %", flush=True)
            if mean >= KNOWS and costs < cost:
                steps = step + 1
        if now - last_save > SAVE_SECONDS:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "generator": stream.generator.get_state(),
                "stage": stream.index,
                "steps": steps,
            }
            write_checkpoint(checkpoint, **state, step=step + 1, seconds=seconds)
            last_save = time.monotonic()

    finish(model, fast, makers, log, steps, round(before + time.monotonic() - start, 1))
    save(model, processor, output)
    os.replace(log_path, output / "training_log.jsonl")
    checkpoint.unlink(missing_ok=True)


def finish(model: Any, fast: nn.Module, makers: Iterable[BatchMaker], log: Log, steps: int, seconds: float) -> None:
    """Log the float accuracy and what rounding to nearest costs."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).to(parameter.dtype)  # what the folder will hold
    scores = accuracy(fast, makers, 20)
    log(step=steps, seconds=seconds, scheme="float", accuracy=scores)
    print("float", scores, flush=True)
    for name in ("W4A16", "W3A16", "W2A16", "W4A8", "W3A8", "W4A4"):
        with rounded(model, SCHEMES[name]):
            scores = accuracy(fast, makers, 20)
        log(step=steps, seconds=seconds, scheme=name, accuracy=scores)
        print("RTN", name, scores, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=BUILDERS)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--minutes", type=float, help="take fewer steps if those would take longer")
    parser.add_argument("--decay", type=float, default=0.4, help="share of the steps over which the rate falls")
    parser.add_argument("--cost", type=float, help="stop when rounding to W3A16 costs fewer points")
    parser.add_argument("--start-from", type=Path, help="a trained folder of this family to go on from")
    parser.add_argument("--lr", dest="peak", type=float, default=1.5e-3)
    parser.add_argument("--pretraining", choices=OBJECTIVES, default="cells", help="what the vision tower learns first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from OUTPUT.checkpoint.pt")
    parser.add_argument("--device", type=torch.device, help="the GPU if there is one")
    train(**vars(parser.parse_args()))
