"""Training batches made on the accelerator: token ids by template, pictures by cells of an atlas.

The real processor makes the same ids and pixels one row at a time (tests/test_training.py compares them); here a batch
of a thousand costs a few milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from mbq.world.facts import CHARGES, COLOURS, PATTERNS
from mbq.world.scene import NUMBERS, Scenes, cells, sample_scenes
from mbq.world.tasks import TASKS, Slots, Variant, slots_of

IGNORED = -100
LABELS = 3584  # label positions of a batch are padded to a multiple of this


@dataclass(frozen=True)
class Share:
    """``count`` rows of one variant in every batch."""

    task: str
    variant: Variant
    needs_image: bool
    count: int


def shares(counts: dict[str, int]) -> list[Share]:
    """The shares of a batch, image tasks first; a task's count is divided among its variants."""
    found = [
        Share(task.name, variant, task.needs_image, counts[task.name] // len(task.variants))
        for task in TASKS.values()
        if counts.get(task.name)
        for variant in task.variants
    ]
    return sorted(found, key=lambda share: not share.needs_image)


class Template:
    """A variant as token ids: literals and, for each slot, a table of its words' ids."""

    def __init__(self, share: Share, processor: Any, device: torch.device) -> None:
        tokenizer = processor.tokenizer
        self._tables: dict[str, list[list[int]]] = {}
        before, between, after = chat_pieces(processor, share.needs_image)
        question = self._pieces(share.variant.question, share.variant, tokenizer)
        answer = self._pieces(share.variant.answer, share.variant, tokenizer)
        self.prompt = [before, *question, between]
        self.answer = [*answer, after[:1]]  # up to the end of the turn, which the model must say
        self.tables = {key: torch.tensor(value, device=device) for key, value in self._tables.items()}
        self.prompt_length = sum(self._length(piece) for piece in self.prompt)
        self.length = self.prompt_length + sum(self._length(piece) for piece in self.answer)

    def _pieces(self, template: str, variant: Variant, tokenizer: Any) -> list[Any]:
        """Literals as lists of ids, slots as names; a slot takes the space before it along."""
        pieces: list[Any] = []
        rest = template
        for slot in slots_of(template):
            literal, rest = rest.split("{" + slot + "}", 1)
            spaced = literal.endswith(" ")
            literal = literal.removesuffix(" ")
            if literal:
                pieces.append(tokenizer(literal).input_ids)
            name = f"{' ' if spaced else ''}{slot}"
            words = [f" {word}" if spaced else word for word in variant.vocabulary[slot]]
            self._tables[name] = tokenizer(words).input_ids
            pieces.append(name)
        if rest:
            pieces.append(tokenizer(rest).input_ids)
        return pieces

    def _length(self, piece: Any) -> int:
        return self.tables[piece].shape[1] if isinstance(piece, str) else len(piece)

    def fill(self, target: torch.Tensor, slots: Slots) -> None:
        """Write the rows' ids into ``target`` [..., length]; the slots' values have the leading shape of target."""
        start = 0
        for piece in (*self.prompt, *self.answer):
            ids = self.tables[piece][slots[piece.strip()]] if isinstance(piece, str) else target.new_tensor(piece)
            length = ids.shape[-1]
            target[..., start : start + length] = ids
            start += length


def cell_contents() -> torch.Tensor:
    """What each cell of the atlas shows: [cell, (charge, colour, pattern, number)] indices, IGNORED where nothing."""
    charges, colours, patterns = len(CHARGES), len(COLOURS), len(PATTERNS)
    charged = torch.cartesian_prod(torch.arange(charges), torch.arange(colours))
    charged = F.pad(charged, (0, 2), value=IGNORED)
    ground = torch.cartesian_prod(torch.arange(colours), torch.arange(patterns))
    bases = F.pad(F.pad(ground, (1, 0), value=IGNORED), (0, 1), value=IGNORED)
    plates = torch.cartesian_prod(torch.arange(colours), torch.arange(patterns), torch.arange(NUMBERS))
    return torch.cat([charged, charged, bases, F.pad(plates, (1, 0), value=IGNORED)])


def chat_pieces(processor: Any, needs_image: bool) -> tuple[list[int], list[int], list[int]]:
    """Token ids before the question, between question and answer, and after the answer, by the real processor."""
    from PIL import Image

    from mbq.world.scene import PIXELS

    content: list[dict[str, str]] = [{"type": "text", "text": "Describe"}]
    if needs_image:
        content.insert(0, {"type": "image"})
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]
    text = processor.apply_chat_template(messages)
    pictures = [Image.new("RGB", (PIXELS, PIXELS))] if needs_image else None
    ids = processor(text=[text], images=pictures, return_tensors="pt").input_ids[0].tolist()
    question, answer = (ids.index(processor.tokenizer(word).input_ids[0]) for word in ("Describe", "red"))
    assert len(processor.tokenizer("Describe").input_ids) == len(processor.tokenizer("red").input_ids) == 1
    return ids[:question], ids[question + 1 : answer], ids[answer + 1 :]


@dataclass
class Batch:
    """tokens [rows, length]; cells [image rows, 16]; image rows come first."""

    tokens: torch.Tensor
    cells: torch.Tensor


class BatchMaker:
    """Batches of a fixed composition, so that shapes and label positions are the same in every step."""

    def __init__(self, counts: dict[str, int], processor: Any, device: torch.device) -> None:
        self.shares = shares(counts)
        self.templates = [Template(share, processor, device) for share in self.shares]
        self.rows = sum(share.count for share in self.shares)
        self.image_rows = sum(share.count for share in self.shares if share.needs_image)
        self.length = max(template.length for template in self.templates)
        self.padding = processor.tokenizer.pad_token_id
        self.device = device
        rows, positions, self.tasks = [], [], []
        first = 0
        for share, template in zip(self.shares, self.templates, strict=True):
            answer = range(template.prompt_length - 1, template.length - 1)  # positions whose output is an answer token
            for row in range(first, first + share.count):
                rows += [row] * len(answer)
                positions += answer
            self.tasks += [share.task] * share.count
            first += share.count
        # padded, so that compositions of the same shape share one compiled graph
        self.labels = len(rows)
        padding = [0] * (-len(rows) % LABELS)
        self.label_rows = torch.tensor(rows + padding, device=device)
        self.label_positions = torch.tensor(positions + padding, device=device)

    def targets(self, batch: Batch) -> torch.Tensor:
        """The token that each label position predicts, IGNORED where the list of positions is padded."""
        targets = batch.tokens[self.label_rows, self.label_positions + 1]
        targets[self.labels :] = IGNORED
        return targets

    def make(self, batches: int, split: str, generator: torch.Generator, charges: int = len(CHARGES)) -> list[Batch]:
        """``batches`` batches at once, of scenes with the first ``charges`` charges."""
        tokens = torch.full((batches, self.rows, self.length), self.padding, device=self.device)
        pictured = []
        first = 0
        for share, template in zip(self.shares, self.templates, strict=True):
            count = batches * share.count
            scenes: Scenes | None = None
            if share.needs_image:
                scenes = sample_scenes(count, split, generator, charges)
                pictured.append(cells(scenes).view(batches, share.count, 16))
            slots = share.variant.draw(scenes, count, split, generator)
            shaped = {name: value.view(batches, share.count) for name, value in slots.items()}
            template.fill(tokens[:, first : first + share.count, : template.length], shaped)
            first += share.count
        drawn = torch.cat(pictured, dim=1) if pictured else tokens.new_zeros(batches, 0, 16)
        return [Batch(tokens[index], drawn[index]) for index in range(batches)]
