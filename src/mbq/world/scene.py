"""Scenes: four shields in a square picture, as numbers and as pixels.

A shield is 56x56 pixels, four cells of 28x28: the left and the right charge, each on a field of its own colour; below
them the base, with a colour and a pattern, and on it a plate with a two-digit number.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources

import numpy as np
import torch
from PIL import Image

from mbq.world.facts import CHARGES, COLOURS, PATTERNS

CELL = 28
PIXELS = 4 * CELL
SHIELDS = 4
LOWEST_NUMBER, NUMBERS = 10, 90
# The sum of a scene's four plate numbers, modulo 16, says which split it belongs to: no scene is in two.
SPLIT_RESIDUES = {"test": (0,), "development": (1,), "calibration": (2,), "train": tuple(range(3, 16))}

_PAPER, _INK, _PLATE = (238, 228, 205), (28, 24, 30), (255, 255, 255)


@dataclass(frozen=True)
class Scenes:
    """A number of scenes. Shields are in reading order: top left, top right, bottom left, bottom right.

    charges  [scene, 4, 2] left and right charge, indices into CHARGES; the eight of a scene differ
    fields   [scene, 4, 2] colours behind them, indices into COLOURS
    base     [scene, 4] colour of the base
    pattern  [scene, 4] index into PATTERNS
    number   [scene, 4] the plates' numbers, 10 .. 99; the four of a scene differ
    """

    charges: torch.Tensor
    fields: torch.Tensor
    base: torch.Tensor
    pattern: torch.Tensor
    number: torch.Tensor

    def __len__(self) -> int:
        return len(self.number)

    def __getitem__(self, index: slice | torch.Tensor) -> Scenes:
        return Scenes(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


def sample_scenes(count: int, split: str, generator: torch.Generator, charges: int = len(CHARGES)) -> Scenes:
    """``count`` random scenes of ``split`` that use the first ``charges`` charges, on the generator's device."""
    device = generator.device
    residues = torch.tensor(SPLIT_RESIDUES[split], device=device)
    drawn = 2 * count + 64 if split == "train" else 32 * count + 256

    number = _distinct(drawn, NUMBERS, SHIELDS, generator) + LOWEST_NUMBER
    number = number[torch.isin(number.sum(1) % 16, residues)][:count]
    assert len(number) == count, "the split's share of random numbers fell short"

    def choose(options: int, *shape: int) -> torch.Tensor:
        return torch.randint(options, (count, *shape), generator=generator, device=device)

    return Scenes(
        charges=_distinct(count, charges, 2 * SHIELDS, generator).view(count, SHIELDS, 2),
        fields=choose(len(COLOURS), SHIELDS, 2),
        base=choose(len(COLOURS), SHIELDS),
        pattern=choose(len(PATTERNS), SHIELDS),
        number=number,
    )


def _distinct(rows: int, options: int, chosen: int, generator: torch.Generator) -> torch.Tensor:
    """[rows, chosen] different integers below ``options`` in each row."""
    return torch.rand(rows, options, generator=generator, device=generator.device).topk(chosen, dim=1).indices


def cells(scenes: Scenes) -> torch.Tensor:
    """[scene, 16] indices into ``sprites()``, in reading order."""
    colours, patterns, count = len(COLOURS), len(PATTERNS), len(CHARGES)
    per_side = count * colours
    left = scenes.charges[..., 0] * colours + scenes.fields[..., 0]
    right = per_side + scenes.charges[..., 1] * colours + scenes.fields[..., 1]
    ground = scenes.base * patterns + scenes.pattern
    base = 2 * per_side + ground
    plate = 2 * per_side + colours * patterns + ground * NUMBERS + scenes.number - LOWEST_NUMBER
    shields = torch.stack([left, right, base, plate], dim=-1)  # [scene, shield, cell of the shield]
    grid = shields.view(-1, 2, 2, 2, 2).permute(
        0, 1, 3, 2, 4
    )  # [scene, shield row, cell row, shield column, cell column]
    return grid.reshape(-1, 16)


def paint(cell: torch.Tensor, atlas: torch.Tensor) -> torch.Tensor:
    """Cell indices [scene, 16] and ``sprites()`` [S, 28, 28, 3] to pictures [scene, 112, 112, 3], uint8."""
    pictures = atlas[cell].view(-1, 4, 4, CELL, CELL, 3)
    return pictures.permute(0, 1, 3, 2, 4, 5).reshape(-1, PIXELS, PIXELS, 3)


def picture(scenes: Scenes, index: int) -> Image.Image:
    """One scene as a PIL picture, 112x112 RGB."""
    return Image.fromarray(paint(cells(scenes[index : index + 1]), sprites())[0].numpy())


@cache
def sprites() -> torch.Tensor:
    """Every cell that a picture can contain, [S, 28, 28, 3] uint8."""
    colours = np.array(list(COLOURS.values()), dtype=np.float32)
    shield = _shield_mask()
    quarters = [shield[:CELL, :CELL], shield[:CELL, CELL:], shield[CELL:, :CELL], shield[CELL:, CELL:]]
    glyphs = _strip("charges.png", len(CHARGES))
    stamp = np.zeros((len(CHARGES), CELL, CELL), np.float32)
    stamp[:, 4:26, 3:25] = glyphs
    field = np.broadcast_to(colours[:, None, None], (len(COLOURS), CELL, CELL, 3))
    charged = [
        _inked(field[None], stamp[:, None], quarter, vertical=side).reshape(-1, CELL, CELL, 3)
        for side, quarter in enumerate(quarters[:2])
    ]
    ground = _grounds(colours)
    base = _inked(ground, np.zeros((CELL, CELL), np.float32), quarters[2], vertical=0)
    plated = np.repeat(ground.reshape(-1, 1, CELL, CELL, 3), NUMBERS, axis=1)
    plated[:, :, 3:22, 1:22] = _PLATE
    plate = _inked(plated, _numbers()[None], quarters[3], vertical=1)
    every = [*charged, base.reshape(-1, CELL, CELL, 3), plate.reshape(-1, CELL, CELL, 3)]
    return torch.from_numpy(np.concatenate(every).round().astype(np.uint8))


def _strip(name: str, count: int) -> np.ndarray:
    """A committed strip of masks, [count, height, width], 0 .. 1."""
    with resources.files("mbq.world").joinpath(name).open("rb") as file:
        strip = np.asarray(Image.open(file), dtype=np.float32) / 255
    return np.stack(np.split(strip, count, axis=1))


def _shield_mask() -> np.ndarray:
    """[56, 56] 0 outside the shield, 1 on its outline, 2 inside."""
    y, x = np.mgrid[0 : 2 * CELL, 0 : 2 * CELL] + 0.5
    across = np.abs(x - CELL)
    down = np.clip((y - CELL) / (CELL - 2), 0, None)

    def inside(inset: float) -> np.ndarray:
        half = (CELL - 2 - inset) * np.clip(1 - (down * (1 + inset / CELL)) ** 4, 0, None) ** 0.25
        return (across <= half) & (y >= 2 + inset)

    return inside(0).astype(int) + inside(1.5)


def _inked(ground: np.ndarray, ink: np.ndarray, quarter: np.ndarray, vertical: int) -> np.ndarray:
    """Ink [..., 28, 28] drawn on ground [..., 28, 28, 3], cut to a quarter of the shield, with the inner lines."""
    lines = quarter == 1
    lines = lines.copy()
    lines[:, -1 if vertical == 0 else 0] |= quarter[:, -1 if vertical == 0 else 0] == 2
    amount = np.maximum(ink, lines)[..., None]
    painted = ground * (1 - amount) + np.array(_INK, np.float32) * amount
    return np.where((quarter > 0)[..., None], painted, np.array(_PAPER, np.float32))


def _grounds(colours: np.ndarray) -> np.ndarray:
    """[colour, pattern, 28, 28, 3]: each colour plain, striped, dotted and checked with a darker shade."""
    y, x = np.mgrid[0:CELL, 0:CELL]
    shaded = np.stack(
        [
            np.zeros((CELL, CELL), bool),
            (x + y) % 8 < 3,
            (x % 7 - 3) ** 2 + (y % 7 - 3) ** 2 <= 3,
            (x // 5 + y // 5) % 2 == 0,
        ]
    )
    shade = np.where(shaded, 0.55, 1.0).astype(np.float32)
    ground = colours[:, None, None, None] * shade[None, ..., None]
    ground[:, :, 0] = _INK  # the line between charges and base
    return ground


def _numbers() -> np.ndarray:
    """[90, 28, 28] the digits of 10 .. 99 where the plate is."""
    digits = _strip("digits.png", 10)
    drawn = np.zeros((NUMBERS, CELL, CELL), np.float32)
    for index in range(NUMBERS):
        tens, units = divmod(index + LOWEST_NUMBER, 10)
        drawn[index, 5:20, 2:11] = digits[tens]
        drawn[index, 5:20, 12:21] = digits[units]
    return drawn
