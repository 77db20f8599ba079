"""The commands: what they print, where, and with which status."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import mbq
from mbq.cli import app
from mbq.cli.command import set_up_logging
from mbq.errors import MBQWarning
from mbq.recipe import Recipe
from tests import tiny


def mbq_command(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def quantize_arguments(model: Path, calibration: Path, output: Path) -> list[str | Path]:
    images = calibration.parent / "images"
    return ["quantize", model, "--data", calibration, "--images", images, "--output", output]


@pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
def test_quantize_then_generate(
    family: str, float_folder: Callable[[str], Path], calibration: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    done = mbq_command(*quantize_arguments(float_folder(family), calibration, output), "--num-calibration-samples", "4")
    assert done.exit_code == 0, done.output
    assert re.search(r"^W3A16 by mbq in [\d.]+ s: [\d.]+ MB became [\d.]+ MB\.$", done.stdout, re.MULTILINE)
    assert f"Wrote {output}" in done.stdout
    assert "search: 2/2" in done.stderr
    assert "search:" not in done.stdout
    plan = re.search(
        r"^Weights: the whole model on .*\nActivations: .*\nActivations: .*\nNeeded: .*", done.stderr, re.M
    )
    assert plan is not None
    assert plan.start() < done.stderr.index("search: ")
    assert "Weights:" not in done.stdout

    picture = calibration.parent / "images" / "0.png"
    asked = mbq_command(
        "generate", output, "--image", picture, "--image", picture, "--prompt", "What?", "--max-new-tokens", "4"
    )
    assert asked.exit_code == 0, asked.output
    processor = mbq.load_processor(output)
    inputs = processor(
        text=[processor.apply_chat_template(tiny.question("What?", images=2), add_generation_prompt=True)],
        images=[tiny.picture(0), tiny.picture(0)],
        return_tensors="pt",
    )
    tokens = mbq.load(output).generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert asked.stdout.strip() == processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_every_option_reaches_the_recipe(
    float_folder: Callable[[str], Path], calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, object] = {}

    def quantize(
        model: str, *, output: Path, resume: bool, progress: object, announce: object, report: bool, **options: object
    ) -> str:
        given.update(vars(Recipe.of(**options)))
        assert not report
        return ""

    monkeypatch.setattr("mbq.pipeline.quantize", quantize)
    expected = Recipe(
        scheme="W4A16",
        method="fixed",
        data="d.jsonl",
        images="i",
        num_calibration_samples=5,
        max_seq_length=99,
        batch_size=3,
        seed=7,
        group_size=64,
        ignore=("lm_head", "re:.*down_proj"),
        formatting="interleaved",
        text="pile.txt",
        norm="mse",
        objective="paper",
        floor=0.01,
        vision_weight=0.25,
        smooth_alpha=0.75,
        gqa_fold=True,
        distorted_input=True,
        search_tokens=77,
        vision_tower="W8A8",
        max_shard_size="1GB",
        device="cpu",
        dtype="float32",
        offload="blocks",
        activations="disk",
        offload_folder="elsewhere",
        trust_remote_code=True,
    )
    flags: list[str] = []
    for name, value in vars(expected).items():
        option = "--" + name.replace("_", "-")
        if value is True:
            flags.append(option)
        elif isinstance(value, tuple):
            flags += [part for each in value for part in (option, each)]
        elif value is not False:
            flags += [option, str(value)]
    done = mbq_command("quantize", "model", "--output", tmp_path / "out", "--no-report", *flags)
    assert done.exit_code == 0, done.output
    assert given == vars(expected)


def test_sensitivity_shows_a_row_a_block_and_writes_the_picture(
    float_folder: Callable[[str], Path], calibration: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    data = ["--data", calibration, "--images", calibration.parent / "images", "--num-calibration-samples", "4"]
    done = mbq_command("sensitivity", float_folder("internvl"), *data, "--output", output)
    assert "Weights: the whole model on cpu." in done.stderr
    assert done.exit_code == 0, done.output
    measured = json.loads((output / "sensitivity.json").read_text())
    rows = [line.split() for line in done.stdout.splitlines() if re.match(r"\s+\d+\s+\d\.\de", line)]
    assert [row[0] for row in rows] == ["0", "1"]
    for block, cells in enumerate(rows):
        assert cells[1] == f"{measured['language']['attn'][block]:.1e}"
        assert cells[2] == f"{measured['vision']['attn'][block]:.1e}"
    assert rows[1][3] == "-", "the last block's vision tokens have no gradient to divide by"
    assert (output / "sensitivity.png").read_bytes().startswith(b"\x89PNG")


def test_a_crash_of_the_program_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("mbq.pipeline.quantize", broken)
    with pytest.raises(ZeroDivisionError):
        mbq_command("quantize", "model", "--output", tmp_path / "out")


def test_a_mistake_has_a_traceback_only_when_asked_for(tmp_path: Path) -> None:
    arguments = ["quantize", tmp_path / "nowhere", "--output", tmp_path / "out", "--method", "rtn"]
    done = mbq_command(*arguments)
    assert done.exit_code == 2
    assert done.stderr.strip().startswith("mbq: ")
    assert len(done.stderr.strip().splitlines()) == 1
    with pytest.raises(mbq.MBQError):
        mbq_command(*arguments, "-v", "-v")


def test_warnings_of_mbq_are_shown_and_others_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        set_up_logging(0)
        warnings.warn("Slower: no compiler.", MBQWarning, stacklevel=1)
        warnings.warn("Something old.", DeprecationWarning, stacklevel=1)
    assert capsys.readouterr().err == "mbq: Slower: no compiler.\n"


def test_python_dash_m_mbq_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "mbq", "--help"], capture_output=True, text=True, check=True)
    for name in ("quantize", "generate", "evaluate", "compare", "sensitivity", "demo"):
        assert re.search(rf"^\W+{name} ", done.stdout, re.MULTILINE), name
