"""Activations on disk: what memory makes, to the byte, and nothing stays there."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import mbq
from mbq.errors import MBQError
from mbq.sensitivity import token_gradients
from mbq.storage import on_disk
from tests.calibrated import calibrated


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_tensor_on_disk_is_the_same_and_its_file_has_no_name(dtype: torch.dtype, tmp_path: Path) -> None:
    values = (torch.randn(3, 5, 7) * 10).to(dtype).transpose(0, 1)
    found = on_disk(values, tmp_path)
    assert found.dtype == dtype
    assert torch.equal(found, values)
    assert not list(tmp_path.iterdir())
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    del found
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("family", ["internvl", "qwen2_vl"])
def test_gradients_from_disk_are_those_from_memory(family: str, tmp_path: Path) -> None:
    binding, batches = calibrated(family)
    wanted = token_gradients(binding, batches)
    found = token_gradients(binding, batches, partial(on_disk, folder=tmp_path))
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


@pytest.mark.parametrize("distorted", [False, True])
@pytest.mark.parametrize("family", ["internvl", "qwen2_vl"])
def test_disk_makes_the_folder_that_memory_makes(
    family: str, distorted: bool, float_folder: Callable[[str], Path], options: dict[str, Any], tmp_path: Path
) -> None:
    made: dict[str, mbq.QuantizationResult] = {}
    for where in ("cpu", "disk"):
        made[where] = mbq.quantize(
            float_folder(family), output=tmp_path / where, activations=where, distorted_input=distorted, **options
        )
    assert made["disk"].sensitivity == made["cpu"].sensitivity
    assert made["disk"].search == made["cpu"].search
    weights = [(tmp_path / where / "model.safetensors").read_bytes() for where in made]
    assert weights[0] == weights[1]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cpu", "disk"]


@pytest.mark.forks
@pytest.mark.parametrize("end", ["error", "interrupt", "kill"])
def test_nothing_stays_on_the_disk_of_a_run_that_ends_early(
    end: str, float_folder: Callable[[str], Path], options: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "activations"
    folder.mkdir()
    child = os.fork()
    if child == 0:

        def stop(*args: Any) -> None:
            if f"{folder}/" in Path("/proc/self/maps").read_text():
                (tmp_path / "seen").touch()
            if end == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt if end == "interrupt" else MBQError("Stop.")

        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("mbq.search._Search.block", stop)
                mbq.quantize(float_folder("internvl"), activations="disk", offload_folder=folder, **options)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert (tmp_path / "seen").exists()
    assert not list(folder.iterdir())


def test_a_full_disk_of_activations_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(MBQError, match=r"Activations cannot be kept in .*nowhere .*give an --offload-folder"):
        on_disk(torch.ones(3), tmp_path / "nowhere")
