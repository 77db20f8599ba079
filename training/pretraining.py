"""What a vision tower learns before the language model is asked anything.

Vision towers come pretrained. Without, the language model has nothing to look at, and the two wait for each other.

cells         tower and projector learn to say what is in each cell of a picture, a vision token a cell
contrastive   the class token of a picture finds the picture's caption among those of the batch, and the caption its
              picture (CLIP, arXiv 2103.00020)
distillation  a student says of one disturbed copy of a picture what its own moving average says of another, at the
              class token and at each patch, without any label (DINO, arXiv 2104.14294, with the Sinkhorn-Knopp
              centring of DINOv2, arXiv 2304.07193; no crops and no masks, as cells tell nothing of each other)

The last two never touch the projector. It then learns to say what is in each cell, alone: the tower is left as it is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel

from training.data import IGNORED, Batch, BatchMaker, cell_contents
from training.fast import FastModel, pixels
from training.schedule import learning_rate

SEE_STEPS, SEE_RATE = 800, 1e-3
ALIGN_STEPS = 400
CHUNK = 32  # batches made at once
PICTURES = 512  # in a batch of pictures and captions, or of pictures alone
WIDTH, PROTOTYPES = 128, 1024  # of the space in which pictures and captions, or student and teacher, are compared
FOLLOW = 0.99  # how much of the teacher is kept in a step
SHARP, SOFT = 0.05, 0.1  # temperatures of teacher and student
SHIFT, TINT, NOISE = 3, 0.1, 0.1  # pixels; share of a channel's brightness; deviation, where white is 1 and black -1

Objective = Callable[[FastModel, Any, BatchMaker, torch.Generator], dict[str, float]]


def cells(fast: FastModel, processor: Any, maker: BatchMaker, generator: torch.Generator) -> dict[str, float]:
    """Tower and projector learn to say what is in each cell."""
    model = fast.model
    language = {*model.model.language_model.parameters(), *model.lm_head.parameters()}
    vision = [parameter for parameter in model.parameters() if parameter not in language]
    return {"cells": name_cells(fast, maker, generator, vision, SEE_STEPS)}


def contrastive(fast: FastModel, processor: Any, maker: BatchMaker, generator: torch.Generator) -> dict[str, float]:
    """Pictures and captions of one batch find each other; then the projector learns alone."""
    model, device = fast.model, maker.device
    tower, tokenizer = model.model.vision_tower, processor.tokenizer
    captions = BatchMaker({"caption": PICTURES}, processor, device)
    first, last = captions.templates[0].prompt_length, captions.templates[0].length
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=model.config.text_config.vocab_size,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=last - first,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).to(device)
    heads = nn.ModuleList([nn.Linear(width, WIDTH, bias=False) for width in (tower.config.hidden_size, WIDTH)])
    heads.to(device)
    scale = nn.Parameter(torch.tensor(math.log(1 / 0.07), device=device))
    truth = torch.arange(PICTURES, device=device)
    right = torch.zeros((), device=device)
    learned = [*tower.parameters(), *text.parameters()]
    for batch in _steps(captions, generator, learned, [*heads.parameters(), scale], SEE_STEPS):
        with torch.autocast(device.type, torch.bfloat16):
            seen = tower(pixels(batch.cells, fast.atlas, torch.bfloat16)).pooler_output
            read = text(batch.tokens[:, first:last]).pooler_output
            one, other = (F.normalize(head(x).float(), dim=1) for head, x in zip(heads, (seen, read), strict=True))
        scores = scale.clamp(max=math.log(100)).exp() * one @ other.T
        (F.cross_entropy(scores, truth) + F.cross_entropy(scores.T, truth)).backward()
        right = (scores.argmax(1) == truth).float().mean()
    aligned = name_cells(fast, maker, generator, [*model.model.multi_modal_projector.parameters()], ALIGN_STEPS)
    return {"pairs": round(100 * right.item(), 2), "cells": aligned}


def distillation(fast: FastModel, processor: Any, maker: BatchMaker, generator: torch.Generator) -> dict[str, float]:
    """A student follows its own moving average, which the tower becomes; then the projector learns alone."""
    model, device = fast.model, maker.device
    pictures = BatchMaker({"caption": PICTURES}, processor, device)
    tower = model.model.vision_tower
    student = nn.ModuleList([tower, *(PrototypeHead(tower.config.hidden_size).to(device) for _ in range(2))])
    teacher = copy.deepcopy(student)
    same = torch.zeros((), device=device)
    for batch in _steps(pictures, generator, [*tower.parameters()], [*student[1:].parameters()], SEE_STEPS):
        clean = pixels(batch.cells, fast.atlas, torch.bfloat16)
        views = [disturbed(clean, generator) for _ in range(2)]
        with torch.autocast(device.type, torch.bfloat16):
            said = [_prototype_scores(student, view) for view in views]
            with torch.no_grad():
                wanted = [_prototype_scores(teacher, view) for view in reversed(views)]
        losses = [
            -(balanced(target) * (score / SOFT).log_softmax(1)).sum(1).mean()
            for scores, targets in zip(said, wanted, strict=True)
            for score, target in zip(scores, targets, strict=True)
        ]
        torch.stack(losses).sum().backward()
        same = (said[0][1].argmax(1) == wanted[0][1].argmax(1)).float().mean()
        with torch.no_grad():  # the optimizer steps behind this; the teacher is a step late
            for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
                old.lerp_(new, 1 - FOLLOW)
    tower.load_state_dict(teacher[0].state_dict())
    aligned = name_cells(fast, maker, generator, [*model.model.multi_modal_projector.parameters()], ALIGN_STEPS)
    return {"same prototype": round(100 * same.item(), 2), "cells": aligned}


class PrototypeHead(nn.Module):
    """From a token [..., width] to the cosines of its likeness to each prototype."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.prototypes = nn.Parameter(torch.randn(PROTOTYPES, WIDTH))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.inner(tokens).float(), dim=-1) @ F.normalize(self.prototypes, dim=-1).T


def _prototype_scores(parts: nn.ModuleList, view: torch.Tensor) -> list[torch.Tensor]:
    """Cosines [picture, prototype] of the class tokens and [picture * patch, prototype] of the patches."""
    hidden = parts[0](view).last_hidden_state
    return [parts[1](hidden[:, 0]), parts[2](hidden[:, 1:].flatten(0, 1))]


def disturbed(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """[n, 3, side, side] shifted together by a few pixels, each tinted and noisy: what no cell loses its content by."""
    device = images.device
    shift = torch.randint(-SHIFT, SHIFT + 1, (2,), generator=generator, device=device).tolist()
    tint = 1 + TINT * (2 * torch.rand(len(images), 3, 1, 1, generator=generator, device=device) - 1)
    noise = NOISE * torch.randn(images.shape, generator=generator, device=device)
    return (images.roll(shift, dims=(2, 3)) * tint + noise).to(images.dtype)


def balanced(scores: torch.Tensor, rounds: int = 3) -> torch.Tensor:
    """Cosines [n, prototype] as distributions a row that use all prototypes alike, by Sinkhorn-Knopp: no collapse."""
    shares = (scores / SHARP).exp()
    for _ in range(rounds):
        shares = shares / shares.sum(0, keepdim=True)
        shares = shares / shares.sum(1, keepdim=True)
    return shares


def name_cells(
    fast: FastModel, maker: BatchMaker, generator: torch.Generator, learned: list[nn.Parameter], steps: int
) -> float:
    """``learned`` and a linear head learn to say what is in each cell; returns the last accuracy, in percent."""
    device = maker.device
    contents = cell_contents().to(device)
    sizes = [int(column.max()) + 1 for column in contents.T]
    head = nn.Linear(fast.model.config.text_config.hidden_size, sum(sizes), device=device)
    right = torch.zeros((), device=device)
    for batch in _steps(maker, generator, learned, [*head.parameters()], steps):
        cell = batch.cells
        with torch.autocast(device.type, torch.bfloat16):
            seen = fast.features(fast.model, pixels(cell, fast.atlas, torch.bfloat16))[:, : cell.shape[1]]
            scores = head(seen).flatten(0, 1).float().split(sizes, dim=1)
        targets = contents[cell.flatten()].unbind(1)
        losses = [F.cross_entropy(*pair, ignore_index=IGNORED) for pair in zip(scores, targets, strict=True)]
        torch.stack(losses).sum().backward()
        hits = [(s.argmax(1) == t) | (t == IGNORED) for s, t in zip(scores, targets, strict=True)]
        right = torch.stack(hits).all(0).float().mean()
    fast.model.zero_grad()  # what was not learned has gradients, too
    return round(100 * right.item(), 2)


def _steps(
    maker: BatchMaker,
    generator: torch.Generator,
    learned: list[nn.Parameter],
    heads: list[nn.Parameter],
    steps: int,
) -> Iterable[Batch]:
    """Yields ``steps`` training batches; after each, AdamW follows the gradients that the caller has left.

    Gradients of ``learned`` are clipped, those of ``heads``, which are thrown away, are not.
    """
    optimizer = torch.optim.AdamW([*learned, *heads], weight_decay=0.0, fused=maker.device.type == "cuda")
    batches: list[Batch] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, SEE_RATE, 0.5)
        batches = batches or maker.make(CHUNK, "train", generator)
        yield batches.pop()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()


OBJECTIVES: dict[str, Objective] = {"cells": cells, "contrastive": contrastive, "distillation": distillation}
