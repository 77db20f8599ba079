"""mbq diagnose: what it prints, what it writes and where, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

import mbq
from mbq import blocks, diagnosis
from mbq.architecture import Binding
from mbq.cli import app
from mbq.diagnosis import Loading, pair
from mbq.diagnosis.bad_answers import KINDS
from mbq.rows import read_rows
from tests.conftest import row, write_rows

FEW = ("--samples", "4", "--answers", "2", "--max-new-tokens", "4", "--device", "cpu", "--batch-size", "2")


@pytest.fixture(scope="module")
def quantized(float_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("quantized") / "tiny-w8"
    mbq.quantize(float_folder("internvl"), scheme="W8A8", method="rtn", output=output)
    return output


def diagnose(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["diagnose", *map(str, arguments)], catch_exceptions=False)


def test_a_folder_gets_its_record_only_when_it_is_named(
    quantized: Path, float_folder: Callable[[str], Path], calibration: Path
) -> None:
    before = sorted(quantized.iterdir())
    given = [quantized, "--baseline", float_folder("internvl"), "--data", calibration, *FEW]
    given += ["--images", calibration.parent / "images"]
    done = diagnose(*given, "--no-speed")
    assert done.exit_code == 0, done.output
    assert "Nothing wrong was found." in done.stdout
    assert "no language-only questions" in done.stdout
    assert f"--output {quantized}" in done.stdout
    assert "errors: 2/2" in done.stderr
    assert sorted(quantized.iterdir()) == before

    done = diagnose(*given, "--output", quantized)
    assert done.exit_code == 0, done.output
    assert f"Wrote {quantized / 'diagnosis.json'}." in done.stdout
    assert sorted(quantized.iterdir()) == sorted([*before, quantized / "diagnosis.json"])
    record = json.loads((quantized / "diagnosis.json").read_text())
    assert (record["format"], record["samples"], record["scheme"]) == (1, 4, "W8A8")
    assert (record["model"], record["baseline"]) == ("tiny-w8", "internvl")
    assert [each["block"] for each in record["blocks"]] == [0, 1]
    for errors in record["blocks"]:
        for kind in (errors, errors["own"], errors["expected"]):
            assert 0 < kind["attn"]["language"] < 0.2
            assert 0 < kind["mlp"]["vision"] < 0.2
    assert {"block", "linears", "modality", "channel", "ratio", "share"} <= set(record["outliers"][0])
    assert set(record["answers"]) == set(record["definitions"]) == set(KINDS)
    assert record["answered"] == 2
    assert record["speed"]["kernels"] == {"reference": 14}
    for finding in record["findings"]:  # on a CPU, perhaps that it is slow
        assert set(finding) == {"rule", "title", "evidence", "advice"}
        assert finding["rule"] == "no_speed_up"
    assert str(quantized.parent) not in (quantized / "diagnosis.json").read_text()
    mbq.load(quantized)


def test_a_file_is_written_too(
    quantized: Path, float_folder: Callable[[str], Path], calibration: Path, tmp_path: Path
) -> None:
    images = calibration.parent / "images"
    given = [quantized, "--baseline", float_folder("internvl"), "--data", calibration, "--images", images, *FEW]
    done = diagnose(*given, "--no-speed", "--answers", "0", "--limit", "1", "--output", tmp_path / "found.json")
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "found.json").read_text())
    assert record["answers"] == {}
    assert any("--answers 0" in note for note in record["notes"])


def test_a_recipe_of_others_prints_nothing_but_options(quantized: Path, tmp_path: Path) -> None:
    recipe = pair._recipe(str(quantized))
    assert (recipe["scheme"], recipe["method"], recipe["ignore"]) == ("W8A8", "rtn", [])
    folder = shutil.copytree(quantized, tmp_path / "other")
    bad = {"method": "\x1b[2J", "norm": ["a", ["b"]], "floor": {"a": 1}, "ignore": ["a", "\x07"], "seed": 3}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(bad))
    assert pair._recipe(str(folder)) == {"seed": 3}


def test_a_float_model_that_does_not_fit_is_measured_block_by_block(
    quantized: Path, float_folder: Callable[[str], Path], calibration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU that is too small does, but for the moving: on the CPU blocks are where they compute."""
    rows = read_rows(calibration, calibration.parent / "images")
    few = {"samples": 4, "answers": 2, "max_new_tokens": 4, "batch_size": 2, "loading": Loading(device="cpu")}
    whole = diagnosis.diagnose(quantized, float_folder("internvl"), data=rows, **few).measurements
    monkeypatch.setattr(pair, "_placed", lambda *given: False)
    arrived = []

    @contextmanager
    def streamed(binding: Binding) -> Iterator[None]:
        arrived.append(binding.model)
        with blocks.streamed(binding):
            yield

    monkeypatch.setattr(pair, "streamed", streamed)
    found = diagnosis.diagnose(quantized, float_folder("internvl"), data=rows, **few).measurements
    assert len(arrived) == 1, "the float model alone"
    assert found.propagation == whole.propagation
    assert found.answers == whole.answers
    assert found.speed.reference is None
    assert any("its decode step was not timed" in note for note in found.notes)


def test_what_cannot_be_compared_is_refused_in_a_sentence(
    quantized: Path, float_folder: Callable[[str], Path], calibration: Path, tmp_path: Path
) -> None:
    images = ["--images", calibration.parent / "images"]
    own, data = ["--baseline", float_folder("internvl")], ["--data", calibration]
    text = write_rows(tmp_path / "no-answer.jsonl", [row(None, None)])
    for arguments, sentence in (
        ([float_folder("internvl"), *own, *data], "is not quantized, so there is nothing to diagnose"),
        ([quantized, "--baseline", float_folder("qwen2_vl"), *data], "was not made from"),
        ([quantized, "--baseline", quantized, *data], "is quantized already"),
        ([quantized, *own, "--data", text], "the row has no answer"),
        ([quantized, *own, *data, "--samples", "0"], "--samples is 0; give a whole number from 1 up"),
        ([quantized, *own, *data, "--output", tmp_path / "no" / "x.json"], "lies in a folder that does not exist"),
        ([quantized, *own, *data, "--output", tmp_path / "x"], "is no folder and no .json file"),
    ):
        done = diagnose(*arguments, *images, *FEW[:2], "--device", "cpu")
        if "--samples" in arguments:
            done = diagnose(*arguments, *images)
        assert done.exit_code == 2, done.output
        last = done.stderr.strip().splitlines()[-1]  # transformers may have drawn a bar
        assert last.startswith("mbq: ")
        assert sentence in last
