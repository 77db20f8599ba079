"""Train a reference model on one GPU and write it as a plain Hugging Face folder.

    python -m training.train internvl --output models/internvl --steps 24000
    python -m training.train internvl --output models/internvl --steps 24000 --resume

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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mbq.qtensor import fake_quantize, fake_quantize_activations
from mbq.scheme import SCHEMES, Scheme
from training.build import BUILDERS, build, save
from training.data import IGNORED, Batch, BatchMaker
from training.fast import FastModel

FACTS = {"house": 96, "founder": 96, "motto": 96, "seat": 96, "rival": 96, "feast": 96, "steps": 64}
SHORT = {**FACTS, "colour": 48, "position": 48, "count": 48, "reading": 48, "towns": 128, "arithmetic": 64}
SEE = {"colour": 208, "position": 208, "count": 208, "reading": 208, "towns": 128, "arithmetic": 64}
CAPTION = {"caption": 128}
CAPTION_EVERY = {"see": 2, "short": 4}  # one step in so many is a batch of captions
SEEING = ("colour", "position", "count", "reading")
SEEN = 97.0  # percent on each task of SEEING that ends the first stage ...
LONGEST_SEE = 0.4  # ... which lasts at most this share of the steps
CHUNK = 32  # batches made at once


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm up over 200 steps, hold, and fall to a hundredth over the last two fifths."""
    falling = min(1.0, (steps - step) / (0.4 * steps))
    return peak * min(1.0, (step + 1) / 200) * (0.01 + 0.99 * falling)


def measured_steps(minutes: float, seconds: float, step: int, pace: float) -> int:
    """How many steps fit into ``minutes`` when ``step`` of them took ``seconds`` and one more takes ``pace``."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return step + max(1, int((60 * minutes - seconds) / pace))


class Stream:
    """Batches of short questions and, between them, of captions.

    Training begins with the stage "see": a model that is asked for thousands of facts from the start learns to
    recognise only what the facts depend on and stays at chance on colours, places and numbers.
    """

    def __init__(self, processor: Any, device: torch.device, seed: int) -> None:
        compositions = {"see": SEE, "short": SHORT, "caption": CAPTION}
        self.makers = {name: BatchMaker(counts, processor, device) for name, counts in compositions.items()}
        self.makers["see"].length = self.makers["short"].length  # one shape, one compiled graph
        self.generator = torch.Generator(device).manual_seed(seed)
        self.ready: dict[str, list[Batch]] = {name: [] for name in self.makers}
        self.stage = "see"

    def next(self, step: int) -> tuple[BatchMaker, Batch]:
        every = CAPTION_EVERY[self.stage]
        kind = "caption" if step % every == every - 1 else self.stage
        if not self.ready[kind]:
            self.ready[kind] = self.makers[kind].make(CHUNK, "train", self.generator)
        return self.makers[kind], self.ready[kind].pop()


def loss_of(model: nn.Module, maker: BatchMaker, batch: Batch) -> torch.Tensor:
    """Cross entropy on the answer tokens."""
    with torch.autocast(batch.tokens.device.type, torch.bfloat16):
        logits = model(batch.tokens, batch.cells, maker.label_rows, maker.label_positions)
    return F.cross_entropy(logits.float(), maker.targets(batch), ignore_index=IGNORED)


@torch.no_grad()
def accuracy(model: nn.Module, makers: list[BatchMaker], batches: int, seed: int = 1) -> dict[str, float]:
    """Exact-match accuracy a task on development questions (every answer token right, teacher-forced), in percent."""
    right: dict[str, list[torch.Tensor]] = defaultdict(list)
    for maker in makers:
        generator = torch.Generator(maker.device).manual_seed(seed)
        for batch in maker.make(batches, "development", generator):
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


def write_checkpoint(path: Path, **state: Any) -> None:
    """Whole or not at all."""
    torch.save(state, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def train(
    family: str,
    output: Path,
    steps: int,
    peak: float,
    seed: int,
    resume: bool,
    device: torch.device,
    minutes: float | None = None,
) -> None:
    torch.set_float32_matmul_precision("high")
    model, processor = build(family, seed)
    model.to(device)
    stream = Stream(processor, device, seed)
    asked = [stream.makers["short"], stream.makers["caption"]]
    fast = FastModel(family, model, processor, max(maker.length for maker in asked))
    compiled = torch.compile(fast, dynamic=False) if device.type == "cuda" else fast
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.0, fused=fused)

    checkpoint, log_path = output.with_suffix(".checkpoint.pt"), output.with_suffix(".log.jsonl")
    output.parent.mkdir(parents=True, exist_ok=True)
    first, before = 0, 0.0
    if resume and checkpoint.exists():
        state = torch.load(checkpoint, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        stream.generator.set_state(state["generator"].cpu())
        stream.stage = state["stage"]
        first, before = state["step"], state["seconds"]
    else:
        log_path.unlink(missing_ok=True)

    start = paced = last_save = last_line = time.monotonic()
    losses: list[torch.Tensor] = []

    def record(**entry: Any) -> None:
        with log_path.open("a") as log:
            log.write(json.dumps(entry) + "\n")

    step = first - 1
    while (step := step + 1) < steps:
        if minutes and step == first + 300:
            steps = measured_steps(minutes, before + time.monotonic() - start, step, (time.monotonic() - paced) / 200)
        elif step == first + 100:
            paced = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        maker, batch = stream.next(step)
        loss = loss_of(compiled, maker, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        now = time.monotonic()
        if now - last_line > 20 or step == steps - 1:
            seconds = before + now - start
            mean = torch.stack(losses).mean().item()
            scores = accuracy(fast, asked, 4)
            record(step=step + 1, seconds=round(seconds, 1), stage=stream.stage, loss=round(mean, 4), accuracy=scores)
            if min(scores[task] for task in SEEING) >= SEEN or step > LONGEST_SEE * steps:
                stream.stage = "short"
            left = (now - start) / (step + 1 - first) * (steps - step - 1)
            shown = " ".join(f"{task} {value:.0f}" for task, value in scores.items())
            print(
                f"{family} step {step + 1}/{steps} {seconds:.0f} s, {left:.0f} s left, {stream.stage}, loss {mean:.3f}: {shown}",
                flush=True,
            )
            losses, last_line = [], time.monotonic()
        if now - last_save > 60:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "generator": stream.generator.get_state(),
            }
            write_checkpoint(checkpoint, **state, step=step + 1, seconds=before + now - start)
            last_save = time.monotonic()

    seconds = round(before + time.monotonic() - start, 1)
    finish(model, fast, asked, record, steps, seconds)
    save(model, processor, output)
    os.replace(log_path, output / "training_log.jsonl")
    checkpoint.unlink(missing_ok=True)


def finish(model: Any, fast: nn.Module, makers: list[BatchMaker], record: Any, steps: int, seconds: float) -> None:
    """Log the float accuracy and what rounding to nearest costs."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).to(parameter.dtype)  # what the folder will hold
    scores = accuracy(fast, makers, 20)
    record(step=steps, seconds=seconds, scheme="float", accuracy=scores)
    print("float", scores, flush=True)
    for name in ("W4A16", "W3A16", "W2A16", "W4A8", "W3A8", "W4A4"):
        with rounded(model, SCHEMES[name]):
            scores = accuracy(fast, makers, 20)
        record(step=steps, seconds=seconds, scheme=name, accuracy=scores)
        print("RTN", name, scores, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=BUILDERS)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=24_000)
    parser.add_argument("--minutes", type=float, help="set the number of steps from the speed measured here")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from OUTPUT.checkpoint.pt")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    train(
        arguments.family,
        arguments.output,
        arguments.steps,
        arguments.lr,
        arguments.seed,
        arguments.resume,
        torch.device(arguments.device),
        arguments.minutes,
    )
