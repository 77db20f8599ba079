"""A run that is killed, interrupted or runs out of space goes on where it ended, and ends with the same bytes."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mbq
from mbq.checkpoint import state as module
from mbq.errors import MBQError
from mbq.search import _Search
from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six blocks, so that there is something to interrupt."""
    folder = tmp_path_factory.mktemp("model") / "qwen2_vl"
    return tiny.save("qwen2_vl", folder, blocks=6)


@pytest.fixture(scope="module")
def options(model: Path, calibration: Path) -> dict[str, Any]:
    images = calibration.parent / "images"
    return {"data": calibration, "images": images, "num_calibration_samples": 2, "group_size": 32, "model": model}


@pytest.fixture(scope="module")
def wanted(options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of what a run writes that nothing disturbs."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    mbq.quantize(**options, output=output)
    assert not output.with_name("out.unfinished").exists()
    return hashes(output)


TIMES = ("measurements.json", "report.html")  # say how long the run took


def hashes(folder: Path) -> dict[str, str]:
    """Of every file, but for the times in some."""
    return {
        file.name: "" if file.name in TIMES else hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.iterdir())
    }


def unfinished(output: Path) -> Path:
    return output.with_name(f"{output.name}.unfinished")


def stopping_after(blocks: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search raises ``error`` in the block after ``blocks`` of them."""
    search, done = _Search.block, []

    def block(self: _Search, index: int, *args: Any) -> Any:
        if len(done) == blocks:
            raise error
        done.append(index)
        return search(self, index, *args)

    monkeypatch.setattr(_Search, "block", block)


@pytest.mark.parametrize("blocks", [0, 1, 5])
def test_an_interrupted_run_goes_on(
    blocks: int, options: dict[str, Any], wanted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        stopping_after(blocks, KeyboardInterrupt(), patch)
        with pytest.raises(KeyboardInterrupt, match="--resume goes on"):
            mbq.quantize(**options, output=output)
    assert not output.exists()
    assert len(list(unfinished(output).glob("block-*.safetensors"))) == blocks
    with pytest.raises(
        MBQError, match=rf"unfinished run of .*out is in .*, {blocks} blocks done; continue it with --res"
    ):
        mbq.quantize(**options, output=output)
    searched: list[int] = []
    search = _Search.block
    with monkeypatch.context() as patch:
        patch.setattr(
            _Search, "block", lambda self, index, *args: (searched.append(index), search(self, index, *args))[1]
        )
        mbq.quantize(**options, output=output, resume=True)
    assert searched == list(range(blocks, 6))
    assert hashes(output) == wanted
    assert not unfinished(output).exists()


def test_killed_twenty_times(
    options: dict[str, Any], wanted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL at random moments; what is left on the disk is enough each time."""
    torch.set_num_threads(1)
    output, draw, kills = tmp_path / "out", random.Random(0), 0
    begun = time.perf_counter()
    mbq.quantize(**options, output=tmp_path / "timed")
    whole = time.perf_counter() - begun
    while kills < 20:
        child = os.fork()
        if child == 0:
            try:
                mbq.quantize(**options, output=output, resume=True)
            finally:
                os._exit(0)
        deadline = time.perf_counter() + draw.uniform(0.1, 0.5) * whole
        ended = 0
        while not ended and time.perf_counter() < deadline:
            time.sleep(0.01)
            ended, _ = os.waitpid(child, os.WNOHANG)
        if not ended:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
        if output.exists():
            assert hashes(output) == wanted
            for file in output.iterdir():
                file.unlink()
            output.rmdir()
    mbq.quantize(**options, output=output, resume=True)
    assert hashes(output) == wanted


def test_a_full_disk_keeps_what_was_done(
    options: dict[str, Any], wanted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, write = tmp_path / "out", module.os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).name == "block-0003.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "replace", full)
        with pytest.raises(
            MBQError, match=r"block-0003.* \(No space left on device\); free .* --resume goes on with it"
        ):
            mbq.quantize(**options, output=output)
    assert sorted(file.name for file in unfinished(output).glob("block*")) == [
        f"block-000{i}.safetensors" for i in range(3)
    ]
    mbq.quantize(**options, output=output, resume=True)
    assert hashes(output) == wanted


def test_a_damaged_file_is_named_and_its_block_can_be_done_again(
    options: dict[str, Any], wanted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        stopping_after(4, KeyboardInterrupt(), patch)
        with pytest.raises(KeyboardInterrupt):
            mbq.quantize(**options, output=output)
    file = unfinished(output) / "block-0002.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(MBQError, match=r"block-0002\.safetensors is damaged; remove it, and its block is done again"):
        mbq.quantize(**options, output=output, resume=True)
    file.unlink()
    mbq.quantize(**options, output=output, resume=True)
    assert hashes(output) == wanted


def test_another_run_is_not_gone_on_with(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        stopping_after(1, KeyboardInterrupt(), patch)
        with pytest.raises(KeyboardInterrupt):
            mbq.quantize(**options, output=output)
    with pytest.raises(MBQError, match="has another norm; give the same again, or remove that folder"):
        mbq.quantize(**options, output=output, resume=True, norm="mse")
    (unfinished(output) / "run.json").write_text("{")
    with pytest.raises(MBQError, match=r"run\.json is damaged; remove .*unfinished and start anew"):
        mbq.quantize(**options, output=output, resume=True)


def test_a_runs_own_errors_stay_what_they_are(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No trouble of the disk that the state lies on, and nothing is lost by it."""
    output = tmp_path / "out"
    stopping_after(1, OSError(errno.ECONNRESET, "the hub hung up"), monkeypatch)
    with pytest.raises(OSError, match="the hub hung up"):
        mbq.quantize(**options, output=output)
    assert [file.name for file in unfinished(output).glob("block-*")] == ["block-0000.safetensors"]


def test_two_runs_on_one_folder(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, search = tmp_path / "out", _Search.block
    met: list[str] = []

    def block(self: _Search, index: int, *args: Any) -> Any:
        if not met:
            with pytest.raises(MBQError, match=r"Another run is writing .*out; wait for it") as refused:
                mbq.quantize(**options, output=output, resume=True)
            met.append(str(refused.value))
        return search(self, index, *args)

    monkeypatch.setattr(_Search, "block", block)
    mbq.quantize(**options, output=output)
    assert len(met) == 1


def test_nothing_is_left_of_a_run_that_did_nothing(
    float_folder: Callable[[str], Path], options: dict[str, Any], tmp_path: Path
) -> None:
    wrong = {**options, "model": float_folder("internvl"), "group_size": 100}
    with pytest.raises(MBQError, match="no multiple of the group size 100"):
        mbq.quantize(**wrong, output=tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(MBQError, match="--resume goes on with a search"):
        mbq.quantize(options["model"], method="rtn", output=tmp_path / "out", resume=True)
