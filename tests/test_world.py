"""The synthetic world: deterministic, disjoint splits, right answers, pictures that show what is asked."""

from __future__ import annotations

import json
import re
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image

from mbq.errors import MBQError
from mbq.world import TASKS, questions, write
from mbq.world.facts import CHARGES, COLOURS, PATTERNS, PLACES, RELATIONS, pair_facts
from mbq.world.scene import CELL, PIXELS, Scenes, cells, paint, picture, sample_scenes, sprites

SPLITS = ("train", "calibration", "development", "test")


def scene_keys(scenes: Scenes) -> set[tuple[int, ...]]:
    parts = [scenes.charges.flatten(1), scenes.fields.flatten(1), scenes.base, scenes.pattern, scenes.number]
    return {tuple(row) for row in torch.cat(parts, dim=1).tolist()}


def answer(row: dict) -> str:
    return row["messages"][1]["content"][0]["text"]


def question(row: dict) -> str:
    return row["messages"][0]["content"][-1]["text"]


def test_the_same_seed_gives_the_same_questions_and_pictures_and_another_seed_others():
    scenes, rows = questions("test", per_task=20, seed=5)
    again, rows_again = questions("test", per_task=20, seed=5)
    other, rows_other = questions("test", per_task=20, seed=6)
    assert rows == rows_again
    assert scene_keys(scenes) == scene_keys(again)
    assert picture(scenes, 3).tobytes() == picture(again, 3).tobytes()
    assert rows != rows_other
    assert not scene_keys(scenes) & scene_keys(other)


def test_no_number_plates_of_a_picture_are_in_two_splits():
    """The splits are disjoint by construction: by the sum of the plates, not by luck."""
    plates = {}
    for split in SPLITS:
        scenes = sample_scenes(3000, split, torch.Generator().manual_seed(0))
        plates[split] = {tuple(sorted(row)) for row in scenes.number.tolist()}
    for first in SPLITS:
        for second in SPLITS:
            assert first == second or not plates[first] & plates[second]


@pytest.mark.parametrize("task", ["towns", "arithmetic"])
def test_text_questions_of_calibration_development_and_test_share_nothing(task: str):
    asked = {split: {question(row) for row in questions(split, [task], 4000)[1]} for split in SPLITS}
    assert not asked["calibration"] & asked["test"]
    assert not asked["development"] & asked["test"]
    if task == "arithmetic":
        assert not asked["train"] & (asked["test"] | asked["development"] | asked["calibration"])


def test_sums_and_differences_are_right():
    for row in questions("test", ["arithmetic"], 500)[1]:
        first, word, second = re.fullmatch(r"What is (\d+) (plus|minus) (\d+)\?", question(row)).groups()
        assert int(answer(row)) == int(first) + (1 if word == "plus" else -1) * int(second)


def test_answers_agree_with_the_scene():
    """Every image task against a slow reading of the scene."""
    scenes, rows = questions("test", per_task=150, seed=1)
    charges, colours = list(CHARGES), list(COLOURS)
    for position, row in enumerate(rows):
        index = position % 150
        pairs = [[charges[charge] for charge in pair] for pair in scenes.charges[index].tolist()]
        fields = [[colours[colour] for colour in pair] for pair in scenes.fields[index].tolist()]
        flat, flat_fields = list(chain(*pairs)), list(chain(*fields))
        asked, said, task = question(row), answer(row), row["task"]
        place = next((number for number, name in enumerate(PLACES) if name in asked), None)
        charge = next((name for name in flat if re.search(rf"\b{name}\?", asked)), None)
        if task in RELATIONS:
            left, right = scenes.charges[index, place].tolist()
            assert said == RELATIONS[task][pair_facts(task)[left, right]]
        elif task == "steps":
            left, right = scenes.charges[index, flat.index(charge) // 2].tolist()
            assert said == RELATIONS["motto"][pair_facts("motto")[left, right]]
        elif task == "colour":
            assert said == flat_fields[flat.index(charge)]
        elif task == "position":
            assert said == PLACES[flat.index(charge) // 2]
        elif task == "beside":
            assert said == flat[flat.index(charge) ^ 1]
        elif task == "charge":
            assert said == pairs[place]["right" in asked.split("of the")[0]]
        elif task == "count":
            colour = next(name for name in colours if name in asked)
            assert int(said) == flat_fields.count(colour) >= 1
        elif task == "reading":
            assert int(said) == scenes.number[index, place]
        elif task == "pattern":
            pattern, base = scenes.pattern[index, place], scenes.base[index, place]
            assert said == f"{PATTERNS[pattern]} {colours[base]}"
        elif task == "caption":
            for number, name in enumerate(PLACES):
                left, right = pairs[number]
                under_left, under_right = fields[number]
                house = RELATIONS["house"][pair_facts("house")[tuple(scenes.charges[index, number].tolist())]]
                look = f"{PATTERNS[scenes.pattern[index, number]]} {colours[scenes.base[index, number]]} base"
                sentence = (
                    f"{name.capitalize()}: house {house}, {left} on {under_left}, {right} on {under_right}, {look},"
                    f" number {scenes.number[index, number]}."
                )
                assert sentence in said
        else:
            assert not TASKS[task].needs_image


def test_a_picture_shows_every_cell_of_its_scene_and_no_two_cells_look_alike():
    atlas = sprites()
    assert len({sprite.numpy().tobytes() for sprite in atlas}) == len(atlas)
    scenes = sample_scenes(4, "test", torch.Generator().manual_seed(2))
    drawn = np.asarray(picture(scenes, 2))
    assert drawn.shape == (PIXELS, PIXELS, 3)
    for number, cell in enumerate(cells(scenes)[2].tolist()):
        top, left = number // 4 * CELL, number % 4 * CELL
        assert (drawn[top : top + CELL, left : left + CELL] == atlas[cell].numpy()).all()
    assert (paint(cells(scenes), atlas)[2].numpy() == drawn).all()


def test_written_rows_name_pictures_that_are_there(tmp_path):
    path = write(tmp_path / "data", "development", ["motto", "towns"], per_task=3)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["task"] for row in rows] == ["motto"] * 3 + ["towns"] * 3
    for row in rows[:3]:
        image = row["messages"][0]["content"][0]["image"]
        with Image.open(path.parent / image) as picture:
            assert picture.size == (PIXELS, PIXELS)
    assert [part["type"] for part in rows[3]["messages"][0]["content"]] == ["text"]


def test_an_unknown_task_or_split_is_named():
    with pytest.raises(MBQError, match=r"Unknown task 'moto'; choose from house, .*motto"):
        questions("test", ["moto"])
    with pytest.raises(MBQError, match="Unknown split 'exam'; choose from test"):
        questions("exam")
