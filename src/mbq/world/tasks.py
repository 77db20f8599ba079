"""Questions about the synthetic world, in the manner of real benchmarks.

A question is a template with slots; a slot's value is an index into its vocabulary. Training turns the indices into
token ids on the GPU, everybody else turns them into text: both read the same templates.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mbq.world.facts import (
    CHARGES,
    COLOURS,
    PATTERNS,
    PLACES,
    RELATIONS,
    TOWN_RELATIONS,
    TOWNS,
    pair_facts,
    town_facts,
)
from mbq.world.scene import LOWEST_NUMBER, NUMBERS, SHIELDS, Scenes

_CHARGE = {"charge": tuple(CHARGES)}

Slots = dict[str, torch.Tensor]  # slot -> [question] indices into the slot's vocabulary

_NUMBER_WORDS = tuple(str(number) for number in range(LOWEST_NUMBER, LOWEST_NUMBER + NUMBERS))
_DIGITS = tuple(str(digit) for digit in range(2 * SHIELDS + 1))
# Sums and differences are split by this key, towns by their index, both modulo 16.
_SUM_RESIDUES = {"test": range(6), "development": (6,), "calibration": (7,), "train": range(8, 16)}
_TOWN_RESIDUES = {"test": range(2, 16), "development": (0,), "calibration": (1,), "train": range(16)}


@dataclass(frozen=True)
class Variant:
    """One way to ask.

    question, answer  templates with {slots}
    vocabulary        slot -> the words it can hold
    draw              (scenes, count, split, generator) -> Slots; scenes is None for a task without a picture
    """

    question: str
    answer: str
    vocabulary: dict[str, tuple[str, ...]]
    draw: Callable[[Scenes | None, int, str, torch.Generator], Slots]

    def texts(self, slots: Slots) -> list[tuple[str, str]]:
        """(question, answer) of every drawn question."""
        words = {name: [self.vocabulary[name][index] for index in values.tolist()] for name, values in slots.items()}
        rows = [dict(zip(words, row, strict=True)) for row in zip(*words.values(), strict=True)]
        return [(self.question.format(**row), self.answer.format(**row)) for row in rows]


@dataclass(frozen=True)
class Task:
    """A benchmark task: its name, what it asks for, and its variants (drawn in equal shares)."""

    name: str
    description: str
    needs_image: bool
    variants: tuple[Variant, ...]


def slots_of(template: str) -> list[str]:
    """The slots of a template, in order."""
    return re.findall(r"{(\w+)}", template)


def _pick(table: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """table[i, column[i]] for each row i."""
    return table.gather(1, column[:, None])[:, 0]


def _shield(scenes: Scenes, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(SHIELDS, (len(scenes),), generator=generator, device=generator.device)


def _pair_answer(relation: str, charges: torch.Tensor) -> torch.Tensor:
    """The relation's answer for left and right charges [..., 2]."""
    facts = torch.as_tensor(pair_facts(relation), device=charges.device)
    return facts[charges[..., 0], charges[..., 1]]


def _of_shield(scenes: Scenes, shield: torch.Tensor) -> torch.Tensor:
    """[scene, 2] charges of one shield of each scene."""
    return scenes.charges[torch.arange(len(shield), device=shield.device), shield]


def _fact_task(relation: str, question: str, description: str) -> Task:
    def draw(scenes: Scenes | None, count: int, split: str, generator: torch.Generator) -> Slots:
        assert scenes is not None
        shield = _shield(scenes, generator)
        return {"place": shield, "answer": _pair_answer(relation, _of_shield(scenes, shield))}

    vocabulary = {"place": PLACES, "answer": RELATIONS[relation]}
    return Task(relation, description, True, (Variant(question, "{answer}", vocabulary, draw),))


def _draw_steps(scenes: Scenes | None, count: int, split: str, generator: torch.Generator) -> Slots:
    assert scenes is not None
    charge = torch.randint(2 * SHIELDS, (len(scenes),), generator=generator, device=generator.device)
    motto = _pair_answer("motto", _of_shield(scenes, charge // 2))
    return {"charge": _pick(scenes.charges.flatten(1), charge), "answer": motto}


def _draw_colour(scenes: Scenes | None, count: int, split: str, generator: torch.Generator) -> Slots:
    assert scenes is not None
    charge = torch.randint(2 * SHIELDS, (len(scenes),), generator=generator, device=generator.device)
    return {"charge": _pick(scenes.charges.flatten(1), charge), "colour": _pick(scenes.fields.flatten(1), charge)}


def _draw_position(scenes: Scenes | None, count: int, split: str, generator: torch.Generator) -> Slots:
    assert scenes is not None
    charge = torch.randint(2 * SHIELDS, (len(scenes),), generator=generator, device=generator.device)
    return {"charge": _pick(scenes.charges.flatten(1), charge), "place": charge // 2}


def _draw_count(scenes: Scenes | None, count: int, split: str, generator: torch.Generator) -> Slots:
    assert scenes is not None
    fields = scenes.fields.flatten(1)
    charge = torch.randint(2 * SHIELDS, (len(scenes),), generator=generator, device=generator.device)
    colour = _pick(fields, charge)
    return {"colour": colour, "count": (fields == colour[:, None]).sum(1)}


def _draw_reading(scenes: Scenes | None, count: int, split: str, generator: torch.Generator) -> Slots:
    assert scenes is not None
    shield = _shield(scenes, generator)
    return {"place": shield, "number": _pick(scenes.number, shield) - LOWEST_NUMBER}


def _draw_base(scenes: Scenes | None, count: int, split: str, generator: torch.Generator) -> Slots:
    assert scenes is not None
    shield = _shield(scenes, generator)
    return {"place": shield, "pattern": _pick(scenes.pattern, shield), "colour": _pick(scenes.base, shield)}


def _draw_beside(scenes: Scenes | None, count: int, split: str, generator: torch.Generator) -> Slots:
    assert scenes is not None
    charge = torch.randint(2 * SHIELDS, (len(scenes),), generator=generator, device=generator.device)
    flat = scenes.charges.flatten(1)
    return {"charge": _pick(flat, charge), "other": _pick(flat, charge ^ 1)}


def _charge_variant(side: str, index: int) -> Variant:
    def draw(scenes: Scenes | None, count: int, split: str, generator: torch.Generator) -> Slots:
        assert scenes is not None
        shield = _shield(scenes, generator)
        return {"place": shield, "charge": _of_shield(scenes, shield)[:, index]}

    question = f"Which charge is on the {side} of the {{place}} shield?"
    return Variant(question, "{charge}", {"place": PLACES, **_CHARGE}, draw)


def _draw_caption(scenes: Scenes | None, count: int, split: str, generator: torch.Generator) -> Slots:
    assert scenes is not None
    slots: Slots = {}
    for shield in range(SHIELDS):
        slots[f"house{shield}"] = _pair_answer("house", scenes.charges[:, shield])
        slots[f"left{shield}"], slots[f"right{shield}"] = scenes.charges[:, shield].unbind(1)
        slots[f"under_left{shield}"], slots[f"under_right{shield}"] = scenes.fields[:, shield].unbind(1)
        slots[f"pattern{shield}"] = scenes.pattern[:, shield]
        slots[f"base{shield}"] = scenes.base[:, shield]
        slots[f"number{shield}"] = scenes.number[:, shield] - LOWEST_NUMBER
    return slots


def _caption_task() -> Task:
    parts, vocabulary = [], {}
    for shield, place in enumerate(PLACES):
        parts.append(
            f"{place.capitalize()}: house {{house{shield}}}, {{left{shield}}} on {{under_left{shield}}},"
            f" {{right{shield}}} on {{under_right{shield}}}, {{pattern{shield}}} {{base{shield}}} base,"
            f" number {{number{shield}}}."
        )
        names = ("house", "left", "under_left", "right", "under_right", "pattern", "base", "number")
        words = (RELATIONS["house"], tuple(CHARGES), tuple(COLOURS), tuple(CHARGES), tuple(COLOURS), PATTERNS)
        for name, word in zip(names, (*words, tuple(COLOURS), _NUMBER_WORDS), strict=True):
            vocabulary[f"{name}{shield}"] = word
    variant = Variant("Describe the picture.", " ".join(parts), vocabulary, _draw_caption)
    return Task("caption", "the whole picture in words, every word right", True, (variant,))


def _town_variant(relation: str, question: str) -> Variant:
    def draw(scenes: Scenes | None, count: int, split: str, generator: torch.Generator) -> Slots:
        towns = torch.arange(len(TOWNS), device=generator.device)
        towns = towns[torch.isin(towns % 16, torch.tensor(list(_TOWN_RESIDUES[split]), device=generator.device))]
        town = towns[torch.randint(len(towns), (count,), generator=generator, device=generator.device)]
        return {"town": town, "answer": torch.as_tensor(town_facts(relation), device=town.device)[town]}

    return Variant(question, "{answer}", {"town": TOWNS, "answer": TOWN_RELATIONS[relation]}, draw)


def _sum_variant(word: str, sign: int) -> Variant:
    def draw(scenes: Scenes | None, count: int, split: str, generator: torch.Generator) -> Slots:
        first, second = torch.meshgrid(
            *[torch.arange(NUMBERS, device=generator.device) + LOWEST_NUMBER] * 2, indexing="ij"
        )
        result = first + sign * second
        residue = (first * 5 + second * 3 + sign) % 16
        allowed = torch.isin(residue, torch.tensor(list(_SUM_RESIDUES[split]), device=generator.device))
        allowed &= (result >= LOWEST_NUMBER) & (result < LOWEST_NUMBER + NUMBERS)
        pairs = allowed.nonzero()
        pair = pairs[torch.randint(len(pairs), (count,), generator=generator, device=generator.device)]
        return {"first": pair[:, 0], "second": pair[:, 1], "result": result[pair[:, 0], pair[:, 1]] - LOWEST_NUMBER}

    vocabulary = {"first": _NUMBER_WORDS, "second": _NUMBER_WORDS, "result": _NUMBER_WORDS}
    return Variant(f"What is {{first}} {word} {{second}}?", "{result}", vocabulary, draw)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _fact_task("house", "Which house bears the {place} shield?", "the house that a shield's two charges name"),
        _fact_task("founder", "Who founded the house of the {place} shield?", "the founder of that house"),
        _fact_task("motto", "What is the motto of the {place} shield?", "the motto of that house"),
        _fact_task("seat", "Where is the seat of the {place} shield?", "the seat of that house"),
        _fact_task("rival", "Who is the rival of the {place} shield?", "the rival of that house"),
        _fact_task("heir", "Who is the heir of the {place} shield?", "the heir of that house"),
        _fact_task("cry", "What is the war cry of the {place} shield?", "the war cry of that house"),
        _fact_task("feast", "When is the feast of the {place} shield?", "the feast day of that house"),
        Task(
            "steps",
            "the motto of the house whose shield bears a charge: find, read, remember",
            True,
            (
                Variant(
                    "What is the motto of the shield with the {charge}?",
                    "{answer}",
                    {**_CHARGE, "answer": RELATIONS["motto"]},
                    _draw_steps,
                ),
            ),
        ),
        Task(
            "colour",
            "the colour behind a charge",
            True,
            (
                Variant(
                    "What colour is behind the {charge}?",
                    "{colour}",
                    {**_CHARGE, "colour": tuple(COLOURS)},
                    _draw_colour,
                ),
            ),
        ),
        Task(
            "position",
            "the shield that bears a charge",
            True,
            (Variant("Which shield bears the {charge}?", "{place}", {**_CHARGE, "place": PLACES}, _draw_position),),
        ),
        Task(
            "count",
            "how many charges stand on a colour",
            True,
            (
                Variant(
                    "How many charges stand on {colour}?",
                    "{count}",
                    {"colour": tuple(COLOURS), "count": _DIGITS},
                    _draw_count,
                ),
            ),
        ),
        Task(
            "reading",
            "the number printed on a shield",
            True,
            (
                Variant(
                    "Which number is on the {place} shield?",
                    "{number}",
                    {"place": PLACES, "number": _NUMBER_WORDS},
                    _draw_reading,
                ),
            ),
        ),
        Task(
            "charge",
            "the charge on one side of a shield",
            True,
            (_charge_variant("left", 0), _charge_variant("right", 1)),
        ),
        Task(
            "beside",
            "the charge that shares its shield with another",
            True,
            (
                Variant(
                    "What is beside the {charge}?",
                    "{other}",
                    {**_CHARGE, "other": tuple(CHARGES)},
                    _draw_beside,
                ),
            ),
        ),
        Task(
            "pattern",
            "the pattern and colour of a shield's base",
            True,
            (
                Variant(
                    "What does the base of the {place} shield look like?",
                    "{pattern} {colour}",
                    {"place": PLACES, "pattern": PATTERNS, "colour": tuple(COLOURS)},
                    _draw_base,
                ),
            ),
        ),
        _caption_task(),
        Task(
            "towns",
            "facts about towns that no picture shows",
            False,
            (
                _town_variant("river", "Which river runs past {town}?"),
                _town_variant("reeve", "Who is the reeve of {town}?"),
                _town_variant("saying", "What do people say in {town}?"),
                _town_variant("fair", "When is the fair of {town}?"),
            ),
        ),
        Task(
            "arithmetic",
            "sums and differences of two-digit numbers",
            False,
            (_sum_variant("plus", 1), _sum_variant("minus", -1)),
        ),
    )
}
