"""What people get wrong: one sentence that says what to do, status 2, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from mbq.cli import app
from tests.conftest import row, write_rows

ANSWER = "A red circle is left of a blue square."


@pytest.fixture
def refused(float_folder: Callable[[str], Path], calibration: Path, tmp_path: Path) -> Callable[..., str]:
    """Run ``mbq quantize`` on a mistake; the sentence on stderr, after checking all that a mistake must not do."""

    def run(
        *flags: str | Path,
        model: Path | None = None,
        data: Path | None = None,
        output: Path | None = None,
        kept: bool = False,
    ) -> str:
        output = output or tmp_path / "new" / "out"
        if not output.parent.is_file():
            output.parent.mkdir(exist_ok=True)
        before = sorted(output.parent.rglob("*"))
        arguments = ["quantize", model or float_folder("internvl"), "--output", output]
        arguments += ["--data", data or calibration, "--images", calibration.parent / "images"]
        arguments += ["--num-calibration-samples", "1", *flags]
        done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
        assert done.exit_code == 2, done.output
        assert done.stdout == ""
        left = [path for path in sorted(output.parent.rglob("*")) if not (kept and "out.unfinished" in str(path))]
        assert left == before, "something was left behind"
        sentences = [line for line in done.stderr.splitlines() if line.startswith("mbq: ")]
        assert len(sentences) == 1
        assert done.stderr.splitlines()[-1] == sentences[0]
        assert "Traceback" not in done.stderr
        return sentences[0]

    return run


@pytest.fixture
def data(tmp_path: Path) -> Callable[..., Path]:
    return lambda *rows: write_rows(tmp_path / "rows.jsonl", list(rows))


def test_missing_image(refused: Callable[..., str], data: Callable[..., Path]) -> None:
    sentence = refused(data=data(row("gone.png", ANSWER)))
    assert "rows.jsonl, line 1" in sentence
    assert "gone.png does not exist" in sentence
    assert "--images" in sentence


def test_corrupt_image(
    refused: Callable[..., str], data: Callable[..., Path], calibration: Path, tmp_path: Path
) -> None:
    whole = (calibration.parent / "images" / "0.png").read_bytes()
    broken = tmp_path / "broken.png"
    broken.write_bytes(whole[: len(whole) // 2])
    sentence = refused(data=data(row(str(broken), ANSWER)))
    assert "rows.jsonl, line 1" in sentence
    assert f"{broken} cannot be decoded" in sentence


def test_truncated_json_names_the_line(refused: Callable[..., str], tmp_path: Path) -> None:
    path = write_rows(tmp_path / "cut.jsonl", [row("0.png", ANSWER)] * 3)
    path.write_text(path.read_text()[:-20])
    assert "cut.jsonl, line 3: not valid JSON" in refused(data=path)


def test_truncated_json_list_names_the_line(refused: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "cut.json"
    path.write_text("[\n" + ",\n".join(json.dumps(row("0.png", ANSWER)) for _ in range(3)))
    assert "cut.json, line 4" in refused(data=path)


def test_row_without_an_answer(refused: Callable[..., str], data: Callable[..., Path]) -> None:
    sentence = refused(data=data(row("0.png", ANSWER), row("1.png", None)))
    assert "rows.jsonl, line 2: the row has no answer" in sentence


def test_image_without_an_image_token(refused: Callable[..., str], data: Callable[..., Path]) -> None:
    pair = [{"from": "human", "value": "What is this?"}, {"from": "gpt", "value": ANSWER}]
    sentence = refused(data=data({"image": "0.png", "conversations": pair}))
    assert "rows.jsonl, line 1" in sentence
    assert "<image>" in sentence


def test_one_word_answers_in_the_parity_mode(
    refused: Callable[..., str],
    data: Callable[..., Path],
    float_folder: Callable[[str], Path],
    calibration: Path,
    tmp_path: Path,
) -> None:
    """The released mask marks the word alone, whose output predicts nothing: no gradient to divide by."""
    rows = data(row("0.png", "7"), row("1.png", "7"))
    sentence = refused("--parity", data=rows)
    assert "language gradient of block 0 (attn) is zero" in sentence
    assert "every answer is one token; calibrate on longer answers or leave --parity out" in sentence

    arguments = ["quantize", float_folder("internvl"), "--output", tmp_path / "out", "--data", rows]
    arguments += ["--images", calibration.parent / "images", "--num-calibration-samples", "2"]
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output


def test_fewer_samples_than_asked_for(refused: Callable[..., str]) -> None:
    sentence = refused("--num-calibration-samples", "128")
    assert "8 rows" in sentence
    assert "--num-calibration-samples 8" in sentence


def test_answer_behind_the_length_limit(refused: Callable[..., str]) -> None:
    sentence = refused("--max-seq-length", "12")
    assert "calib.jsonl, line " in sentence
    assert "raise --max-seq-length" in sentence


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(
    value: float, refused: Callable[..., str], float_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    model = shutil.copytree(float_folder("internvl"), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name][3, 5] = value
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    sentence = refused(model=model)
    assert "layers.1.mlp.up_proj.weight holds 1 values that are NaN or infinite" in sentence


def test_width_that_groups_do_not_divide(refused: Callable[..., str]) -> None:
    sentence = refused("--group-size", "96")
    assert "layers.0.self_attn.q_proj reads 128 channels, no multiple of the group size 96" in sentence
    assert "--group-size" in sentence
    assert "--ignore" in sentence


def test_the_advice_about_the_width_works(
    float_folder: Callable[[str], Path], calibration: Path, tmp_path: Path
) -> None:
    arguments = ["quantize", float_folder("internvl"), "--output", tmp_path / "out", "--method", "rtn"]
    arguments += ["--group-size", "256", "--ignore", "re:.*self_attn.*", "--ignore", "re:.*(gate|up)_proj"]
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output


def test_output_that_is_not_empty(refused: Callable[..., str], tmp_path: Path) -> None:
    output = tmp_path / "full"
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    assert f"The output folder {output} is not empty" in refused(output=output)
    assert (output / "thesis.txt").read_text() == "years of work"


def test_output_below_a_file_is_refused_before_any_work(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mbq.pipeline.load_model", None)
        sentence = refused(output=tmp_path / "file" / "out")
    assert f"because {tmp_path / 'file'} is a file; choose another output folder" in sentence


def test_a_disk_without_space_is_told_before_any_work(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*args: Any) -> None:
        raise AssertionError("it calibrates")

    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=100_000))
    monkeypatch.setattr("mbq.pipeline._batches", work)
    sentence = refused()
    assert "is full: the model needs about" in sentence
    assert "0.00 GB are free; free some space or choose another output folder" in sentence


@pytest.mark.parametrize("writer", ["mbq.output.save_model", "mbq.output.write_json"])
def test_full_disk(writer: str, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        folder = next(arg for arg in args if isinstance(arg, Path))
        partial = folder / "partial" if folder.is_dir() else folder
        partial.write_text("half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(partial))

    monkeypatch.setattr(writer, full)
    sentence = refused(kept=True)
    assert "is full" in sentence
    assert "free some space or choose another output folder; what is done is kept in" in sentence


def test_model_that_is_quantized_already(
    refused: Callable[..., str], float_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    once = tmp_path / "once"
    arguments = ["quantize", float_folder("internvl"), "--output", once, "--method", "rtn"]
    assert CliRunner().invoke(app, [str(argument) for argument in arguments]).exit_code == 0
    sentence = refused(model=once)
    assert f"{once} is quantized already" in sentence
    assert "give the float model" in sentence


@pytest.mark.parametrize(
    ("option", "value", "advice"),
    [
        ("--max-shard-size", "huge", "give a size such as 5GB or 500MB"),
        ("--max-shard-size", "0GB", "give a size such as 5GB or 500MB"),
        ("--vision-weight", "nan", "give a number from 0 up"),
        ("--floor", "-1", "give a number from 0 up"),
        ("--smooth-alpha", "1.5", "give a number from 0 to 1"),
        ("--seed", "-1", "give a whole number from 0 up"),
        ("--batch-size", "0", "give a whole number from 1 up"),
        ("--norm", "l3", "choose one of mae, mse"),
    ],
)
def test_options_out_of_their_range(option: str, value: str, advice: str, refused: Callable[..., str]) -> None:
    sentence = refused(option, value)
    assert sentence.startswith(f"mbq: {option} is ")
    assert advice in sentence


def test_ignore_pattern_that_matches_nothing(refused: Callable[..., str]) -> None:
    sentence = refused("--ignore", "re:.*donw_proj")
    assert "--ignore re:.*donw_proj matches no linear of the model" in sentence
    assert "re:.*down_proj" in sentence


def test_ignore_patterns_that_leave_nothing(refused: Callable[..., str]) -> None:
    assert "--ignore leaves no linear to quantize" in refused("--ignore", "re:.*")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_the_run_leaves_nothing(
    number: signal.Signals, status: int, float_folder: Callable[[str], Path], calibration: Path, tmp_path: Path
) -> None:
    # The weights are on the disk, the rest of the folder is not, when the signal comes.
    code = (
        "import os, signal, mbq.output\n"
        "save = mbq.output.save_model\n"
        "def interrupted(*args):\n"
        "    save(*args)\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "    signal.pause()\n"
        "mbq.output.save_model = interrupted\n"
        "from mbq.cli import main\n"
        "main()\n"
    )
    arguments = ["quantize", float_folder("internvl"), "--output", tmp_path / "out", "--method", "rtn"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
    if number is signal.SIGINT:
        assert done.stderr.splitlines()[-1] == "mbq: Interrupted; nothing was written."
