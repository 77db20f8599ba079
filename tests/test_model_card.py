"""README.md of a quantized folder, as the hub and a reader take it."""

from __future__ import annotations

import pytest
import yaml

from mbq.model_card import model_card
from mbq.recipe import Recipe, recipe_yaml


def card(recipe: Recipe, base_model: str = "llava-hf/llava-onevision-qwen2-7b-ov-hf", files: tuple = ()) -> str:
    return model_card(
        recipe,
        recipe_yaml(recipe, base_model, data_hash="ab" * 32),
        base_model=base_model,
        folder_name="out",
        loading_note="transformers loads it with CALL.",
        kept=("lm_head", "re:.*vision_tower.*"),
        files=files,
        megabytes=(1000.0, 250.0),
    )


def test_front_matter_is_what_the_hub_reads() -> None:
    _, front_matter, _ = card(Recipe()).split("---\n", 2)
    assert yaml.safe_load(front_matter) == {
        "base_model": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["compressed-tensors", "mbq", "w3a16"],
    }


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        (Recipe(), "3-bit asymmetric integer weights with one scale per 128 input channels."),
        (
            Recipe(scheme="W4A16", group_size=64),
            "4-bit asymmetric integer weights with one scale per 64 input channels.",
        ),
        (
            Recipe(scheme="W4A8"),
            "4-bit symmetric integer weights with one scale per output row, 8-bit activations with one dynamic scale "
            "per token.",
        ),
        (Recipe(scheme="W4A8", vision_tower="W8A8"), "The vision tower's blocks are W8A8, by SmoothQuant."),
    ],
)
def test_says_what_the_numbers_are(recipe: Recipe, sentence: str) -> None:
    assert sentence in card(recipe)


def test_code_of_the_models_own_has_to_be_allowed() -> None:
    text = card(Recipe(trust_remote_code=True))
    assert 'mbq.load("out", trust_remote_code=True)' in text
    assert '--prompt "What is shown?" --trust-remote-code\n' in text


def test_says_how_to_load_what_is_kept_and_how_large_it_is() -> None:
    text = card(Recipe(), files=("config.json", "search.json"))
    assert 'mbq.load("out")' in text
    assert "transformers loads it with CALL." in text
    assert "In 16 bits: `lm_head`, `re:.*vision_tower.*`." in text
    assert "1000.0 MB before, 250.0 MB on disk now." in text
    assert "search.json" in text
    assert "sensitivity.json" not in text, "a file that is not there"


def test_holds_the_recipe_without_folders_of_the_machine() -> None:
    recipe = Recipe(data="/home/someone/secret/calib.jsonl", images="/home/someone/pictures")
    block = card(recipe).split("```yaml\n")[1].split("```")[0]
    written = yaml.safe_load(block)
    assert (written["data"], written["images"]) == ("calib.jsonl", "pictures")
    assert "someone" not in block
    options = set(vars(recipe))
    assert options <= set(written), "every option is written"
