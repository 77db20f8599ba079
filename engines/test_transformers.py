"""transformers alone reads the folders, in the versions that vLLM brings, which are older than those of mbq's tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from engines.conftest import Folders

FAMILIES = ("internvl", "llava_onevision", "qwen2_vl")
LIMITS = {"W8A8": 0.05, "W4A16": 0.03, "W4A16_SYM": 0.03, "W4A8": 0.05}
ASKED = 8  # questions; the plain code is slow


@pytest.mark.parametrize("scheme", LIMITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_plain_call_loads_what_is_in_the_folder(
    family: str, scheme: str, folders: Folders, report: dict[str, Any]
) -> None:
    path = folders.path / f"{family}-{scheme}"
    model, processor = AutoModelForImageTextToText.from_pretrained(path).eval(), AutoProcessor.from_pretrained(path)
    found = []
    for question in folders.questions[:ASKED]:
        picture = {"type": "image", "path": str(folders.path / question["picture"])}
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": [picture, {"type": "text", "text": question["text"]}]}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            found.append(model(**prompt).logits[0, -1].float())
    expected = load_file(folders.path / "logits.safetensors")[f"{family} {scheme}"][:ASKED]
    error = ((torch.stack(found) - expected).norm() / expected.norm()).item()
    report.setdefault("transformers", {})[f"{family}-{scheme}"] = round(error, 4)
    assert error < LIMITS[scheme]


@pytest.mark.parametrize("family", FAMILIES)
def test_compressed_tensors_before_0_18_pads_words_of_three_bits(family: str, folders: Folders) -> None:
    with pytest.raises(RuntimeError, match="must match the size"):
        AutoModelForImageTextToText.from_pretrained(folders.path / f"{family}-W3A16")
