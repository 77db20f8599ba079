"""README.md of a quantized folder, as the hub and a reader take it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from typer.main import get_command

from mbq.cli import app
from mbq.model_card import model_card, with_plain_call, with_serve_command
from mbq.recipe import Recipe, recipe_yaml


def card(
    recipe: Recipe,
    base_model: str = "llava-hf/llava-onevision-qwen2-7b-ov-hf",
    files: tuple = (),
    inherited: dict[str, Any] | None = None,
) -> str:
    return model_card(
        recipe,
        recipe_yaml(recipe, base_model, data_hash="ab" * 32),
        base_model=base_model,
        inherited=inherited or {},
        folder_name="out",
        transformers=with_plain_call(recipe, "out", "transformers loads it with CALL."),
        vllm=with_serve_command(recipe, "out", "vLLM serves it."),
        kept=("lm_head", "re:.*vision_tower.*"),
        files=files,
        megabytes=(1000.0, 250.0),
    )


def test_front_matter_is_what_the_hub_reads() -> None:
    inherited = {"license": "apache-2.0", "language": ["en", "zh"], "datasets": ["lmms-lab/LLaVA-OneVision-Data"]}
    data = ModelCard(card(Recipe(), inherited=inherited)).data
    assert data.to_dict() == {
        "base_model": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["compressed-tensors", "mbq", "w3a16"],
        **inherited,
    }


def test_a_folders_name_is_no_model_of_the_hub() -> None:
    data = ModelCard(card(Recipe(), base_model="internvl")).data
    assert "base_model" not in data.to_dict()
    assert "base_model_relation" not in data.to_dict()


def test_a_revision_is_linked_and_not_part_of_the_models_name() -> None:
    text = card(Recipe(), base_model="Qwen/Qwen2-VL-7B-Instruct@abc123")
    assert ModelCard(text).data.base_model == "Qwen/Qwen2-VL-7B-Instruct"
    assert "](https://huggingface.co/Qwen/Qwen2-VL-7B-Instruct/tree/abc123)" in text


@pytest.mark.parametrize(("recipe", "keys"), [
    (Recipe(), ["li2025mbq"]),
    (Recipe(method="awq"), ["lin2024awq"]),
    (Recipe(method="awq", vision_tower="W8A8"), ["lin2024awq", "xiao2023smoothquant"]),
    (Recipe(method="rtn"), []),
])  # fmt: skip
def test_says_what_to_cite(recipe: Recipe, keys: list[str]) -> None:
    section = card(recipe).split("## Citation\n")[1]
    assert re.findall(r"^@inproceedings\{(\w+),$", section, re.MULTILINE) == keys
    assert section.count("{") == section.count("}")
    assert "[llava-hf/llava-onevision-qwen2-7b-ov-hf](https://huggingface.co/llava-hf/" in section


def test_says_that_nothing_was_measured_and_how_to_measure_it() -> None:
    section = card(Recipe()).split("## Results\n")[1].split("\n## ")[0]
    assert "Not measured yet." in section
    base = "llava-hf/llava-onevision-qwen2-7b-ov-hf"
    evaluate, write = re.findall(r"^    mbq (.*)$", section, re.MULTILINE)
    assert evaluate == f"evaluate out --baseline {base} --output runs"
    assert write == "card out --results runs/out --baseline runs/llava-onevision-qwen2-7b-ov-hf"
    for arguments in (evaluate, write):  # they are this version's commands
        found = get_command(app).commands[arguments.split()[0]]
        assert {"--baseline"} <= {flag for option in found.params for flag in option.opts}


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
    assert "vllm serve out --trust-remote-code\n" in text
    assert "AutoModelForImageTextToText" not in text, "the model's own code says which class it has"


def test_says_how_to_load_what_is_kept_and_how_large_it_is() -> None:
    text = card(Recipe(), files=("config.json", "search.json"))
    assert 'mbq.load("out")' in text
    assert 'AutoModelForImageTextToText.from_pretrained("out")' in text
    assert "transformers loads it with CALL." in text
    assert "    vllm serve out\n\nvLLM serves it.\n" in text
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
