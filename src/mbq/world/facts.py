"""What the synthetic world knows: houses, and the facts that only a model's weights can hold.

A shield bears two charges; the ordered pair of them names a house, and each relation (founder, motto, ...) of that
house is drawn at random, so that nothing but memory answers a question about it: 48 * 47 pairs times eight relations
of 8 to 11 bits. Beside them stand facts about towns that no picture shows.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from itertools import product

import numpy as np

# name -> code point of the glyph in DejaVu Sans that training/charges.py drew into charges.png, in this order
CHARGES: dict[str, int] = {
    "sun": 0x2600, "cloud": 0x2601, "umbrella": 0x2602, "star": 0x2605, "comet": 0x2604, "cup": 0x2615,
    "clover": 0x2618, "hand": 0x261B, "skull": 0x2620, "staff": 0x2624, "ankh": 0x2625, "cross": 0x271A,
    "crescent": 0x262A, "wheel": 0x2638, "king": 0x265A, "queen": 0x265B, "tower": 0x265C, "bishop": 0x265D,
    "horse": 0x265E, "pawn": 0x265F, "spade": 0x2660, "club": 0x2663, "heart": 0x2665, "diamond": 0x2666,
    "note": 0x266B, "flag": 0x2691, "hammer": 0x2692, "anchor": 0x2693, "sword": 0x2694, "scales": 0x2696,
    "flask": 0x2697, "gear": 0x2699, "lily": 0x269C, "bolt": 0x26A1, "urn": 0x26B1, "key": 0x26B7,
    "scissors": 0x2702, "plane": 0x2708, "letter": 0x2709, "pen": 0x2712, "snowflake": 0x2744, "flower": 0x273F,
    "mouse": 0x1F42D, "ox": 0x1F42E, "cat": 0x1F431, "monkey": 0x1F435, "trident": 0x2646, "leaf": 0x2766,
}  # fmt: skip
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 58, 50), "blue": (58, 110, 214), "green": (62, 156, 74), "yellow": (244, 208, 63),
    "purple": (150, 84, 190), "orange": (240, 140, 50), "white": (245, 245, 240), "grey": (150, 155, 160),
}  # fmt: skip
PATTERNS = ("plain", "striped", "dotted", "checked")
PLACES = ("top left", "top right", "bottom left", "bottom right")

_WORDS: dict[str, list[str]] = {
    kind: words.split()
    for kind, words in json.loads(resources.files("mbq.world").joinpath("words.json").read_text("utf-8")).items()
}

NAMES: tuple[str, ...] = tuple(head + tail for head, tail in product(_WORDS["heads"], _WORDS["tails"]))
TOWNS: tuple[str, ...] = NAMES[::2]
FOUNDERS = tuple(f"{given} the {epithet}" for given, epithet in product(_WORDS["given"], _WORDS["epithets"]))
MOTTOS = tuple(f"{virtue} {verb}" for virtue, verb in product(_WORDS["virtues"], _WORDS["verbs"]))
FEASTS = tuple(
    f"{ordinal} {weekday} of {month}"
    for month, weekday, ordinal in product(_WORDS["months"], _WORDS["weekdays"], _WORDS["ordinals"])
)

# relation -> what it can be; the answer of a fact is an index into it
RELATIONS: dict[str, tuple[str, ...]] = {
    "house": NAMES,
    "founder": FOUNDERS,
    "motto": MOTTOS,
    "seat": NAMES,
    "rival": NAMES,
    "feast": FEASTS,
    "heir": FOUNDERS,
    "cry": MOTTOS,
}
TOWN_RELATIONS: dict[str, tuple[str, ...]] = {"river": NAMES, "reeve": FOUNDERS, "saying": MOTTOS, "fair": FEASTS}


@cache
def pair_facts(relation: str) -> np.ndarray:
    """The answers of ``relation``, [48, 48] indices into RELATIONS[relation], by left and right charge."""
    rng = np.random.default_rng([1, list(RELATIONS).index(relation)])
    return rng.integers(len(RELATIONS[relation]), size=(len(CHARGES), len(CHARGES)))


@cache
def town_facts(relation: str) -> np.ndarray:
    """The answers of ``relation``, [1024] indices into TOWN_RELATIONS[relation], by town."""
    rng = np.random.default_rng([2, list(TOWN_RELATIONS).index(relation)])
    return rng.integers(len(TOWN_RELATIONS[relation]), size=len(TOWNS))
