"""What a card takes over from the float model's card, and what it calls the float model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCardData

from mbq import front_matter as module
from mbq.front_matter import base_name, front_matter, inherited_fields, license_files
from mbq.output import write_licenses

STATED = {
    "license": "other",
    "license_name": "qwen",
    "license_link": "https://example.org/license",
    "language": ["en", "fr"],
    "datasets": ["a/b"],
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    return folder


def write_card(folder: Path, stated: dict[str, Any] | str) -> Path:
    front = stated if isinstance(stated, str) else yaml.safe_dump(stated)
    (folder / "README.md").write_text(f"---\n{front}\n---\n\n# A model\n")
    return folder


def test_fields_that_hold_for_the_quantized_model_too(base: Path) -> None:
    write_card(base, {**STATED, "pipeline_tag": "text-generation", "tags": ["chat"], "base_model": "c/d"})
    assert inherited_fields(str(base)) == STATED


@pytest.mark.parametrize("front", [
    "license: [unclosed",
    "just text",
    "license: {a: b}",
    f"license: {'x' * 10_000}",
    "language: [false, 3]",
    "[" * 100_000,
    "license: apache-2.0\n" + "#" * 2**20,
])  # fmt: skip
def test_what_a_strangers_card_may_hold_is_left_out(base: Path, front: str) -> None:
    assert inherited_fields(str(write_card(base, front))) == {}


def test_no_card(base: Path) -> None:
    assert inherited_fields(str(base)) == {}
    assert inherited_fields("LlavaForConditionalGeneration") == {}, "a loaded model without files"


def test_a_license_in_a_file_goes_with_the_model(base: Path, tmp_path: Path) -> None:
    write_card(base, {"license": "other", "license_link": "LICENSE"})
    assert inherited_fields(str(base)) == {"license": "other"}, "the file is not there"
    (base / "LICENSE").write_text("You may.")
    (base / "NOTICE.txt").write_text("By ada.")
    assert inherited_fields(str(base))["license_link"] == "LICENSE"
    (tmp_path / "out").mkdir()
    write_licenses(tmp_path / "out", str(base))
    assert (tmp_path / "out" / "LICENSE").read_text() == "You may."
    assert [file.name for file in license_files(tmp_path / "out")] == ["LICENSE", "NOTICE.txt"]


def test_a_license_on_the_hub_is_linked_there(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_card(base, {"license": "other", "license_link": "LICENSE"})
    monkeypatch.setattr(module, "model_folder", lambda name, weights: base)
    link = inherited_fields("Qwen/Qwen2-VL@abc")["license_link"]
    assert link == "https://huggingface.co/Qwen/Qwen2-VL/blob/abc/LICENSE"


def test_no_path_of_the_machine_is_a_models_name(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert base_name(str(base)) == "base"
    assert base_name(f"{base}/") == "base"
    assert base_name("/home/ada/models/gone") == "gone"
    assert base_name("Qwen/Qwen2-VL@abc") == "Qwen/Qwen2-VL@abc"
    assert base_name("LlavaForConditionalGeneration") == "LlavaForConditionalGeneration"
    monkeypatch.chdir(base)
    assert base_name(".") == "base"


def test_a_folder_of_the_hubs_cache_is_the_model_on_the_hub(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--Qwen--Qwen2-VL-7B-Instruct" / "snapshots" / "0a1b2c"
    snapshot.mkdir(parents=True)
    assert base_name(str(snapshot)) == "Qwen/Qwen2-VL-7B-Instruct@0a1b2c"


def test_the_hubs_parser_reads_it_back() -> None:
    text = front_matter("Qwen/Qwen2-VL", STATED, library="transformers", tags=["mbq"], relation="quantized")
    read = ModelCardData(**yaml.safe_load(text))
    assert read.base_model == "Qwen/Qwen2-VL"
    assert {field: read.get(field) for field in STATED} == STATED
