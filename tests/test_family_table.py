"""``mbq families`` and docs/families.md: the table is what families.py says, and the page's example works."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    Ovis2Config,
    Ovis2ForConditionalGeneration,
    Ovis2ImageProcessor,
    Ovis2Processor,
    PreTrainedModel,
    Qwen2Config,
)
from typer.testing import CliRunner

import mbq
from mbq import architecture, families
from mbq.architecture import bind
from mbq.cli import app
from mbq.errors import MBQError
from mbq.families import FAMILIES, REFUSED, TRAINED
from mbq.family_table import family_rows, markdown_table
from tests.chats import row
from tests.tiny import ALL_FAMILY_NAMES, inputs, randomize, tokenizer
from tests.tiny import tiny as first_tiny
from tests.tiny_families import BUILDERS, template, text_config, tiny

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")


def test_the_page_shows_the_table() -> None:
    assert markdown_table() in PAGE
    assert CliRunner().invoke(app, ["families", "--markdown"]).stdout.strip() == markdown_table()


def test_the_command_names_every_class() -> None:
    printed = CliRunner().invoke(app, ["families"], env={"COLUMNS": "200"}).stdout
    assert all(name in printed for name in (*FAMILIES, *REFUSED))
    assert "q k v, o, gate up, down" in printed
    assert all(all(cell for cell in cells) for cells in family_rows())


EVIDENCE = {  # what a class must hold for its reason to be true: paths in a block
    "experts": ("mlp.experts.gate_up_proj", "feed_forward.experts.gate_up_proj"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_has_what_the_sentence_says(name: str, tmp_path: Path) -> None:
    config = getattr(transformers, name.replace("ForConditionalGeneration", "Config"))()
    with torch.device("meta"):
        model = getattr(transformers, name)(config)
    (reason,) = (word for word in EVIDENCE if word in REFUSED[name])
    names = [parameter for parameter, _ in model.named_parameters()]
    assert any(parameter.endswith(path) for parameter in names for path in EVIDENCE[reason])
    with pytest.raises(MBQError, match=f"{name} has {REFUSED[name]}, which mbq does not quantize yet; choose"):
        bind(model)
    config.architectures = [name]
    config.save_pretrained(tmp_path)  # no weights: it is refused before they are looked for
    with pytest.raises(MBQError, match=f"{name} has .* does not quantize yet"):
        mbq.quantize(tmp_path, method="rtn")


def test_trained_models_are_those_of_the_models_folder() -> None:
    configs = [json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "models").glob("*/config.json")]
    assert {name for config in configs for name in config["architectures"]} == set(TRAINED)


def test_every_entry_has_a_tiny_model() -> None:
    models = [first_tiny(name)[0] for name in ALL_FAMILY_NAMES] + [tiny(name)[0] for name in BUILDERS]
    models.append(first_tiny("internvl2_internlm2", text="llama")[0])
    bound = {bind(model).architecture for model in models}
    assert bound == {variant for variants in FAMILIES.values() for variant in variants}


def _ovis2() -> tuple[PreTrainedModel, Any]:
    """Five of the tower's 20 visual words stand for tokens around a picture."""
    marks = [f"<IMG_{name}>" for name in ("START", "GRID", "COL", "ROW", "END")]
    tokens = tokenizer(["<image>", "<IMG_ATOM>", *marks])
    processor = Ovis2Processor(
        Ovis2ImageProcessor(size={"height": 56, "width": 56}, crop_to_patches=False),
        tokens,
        chat_template=template("<image>"),
        image_seq_length=4,
    )
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Ovis2Config(
        vision_config={**vision, "image_size": 56, "patch_size": 28, "vocab_size": 20},
        text_config=Qwen2Config(**text_config(tokens)),
        image_token_id=tokens.convert_tokens_to_ids("<IMG_ATOM>"),
        visual_indicator_token_ids=tokens.convert_tokens_to_ids(marks),
        vocab_size=len(tokens),
        hidden_size=64,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = Ovis2ForConditionalGeneration(config)
    randomize(model)
    return model.eval(), processor


def test_a_family_is_added_by_the_lines_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = _ovis2()
    with pytest.raises(MBQError, match="Ovis2ForConditionalGeneration is no known family"):
        bind(model)
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    monkeypatch.setattr(families, "FAMILIES", dict(FAMILIES))
    exec(example, vars(families) | vars(architecture))
    rows = [row([0, "What?"], "A red circle."), row([1, "How many?"], "Three.")]
    options = {"data": rows, "num_calibration_samples": 2, "group_size": 32, "device": "cpu"}
    result = mbq.quantize(model, processor, output=tmp_path / "out", **options)
    given = inputs(processor)
    loaded = mbq.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(**given).logits, result.model(**given).logits)
    assert loaded.generate(**given, max_new_tokens=2).shape[1] > given["input_ids"].shape[1]
