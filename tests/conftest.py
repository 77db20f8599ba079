"""Folders that several tests read: a tiny float model of each family, and calibration rows with pictures."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Triton reads it when it is imported, and torch may import it: without a GPU its kernels run in the interpreter.
if shutil.which("nvidia-smi") is None:
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

from tests import tiny

torch.set_num_threads(1)

ANSWERS = (
    "A red circle is left of a blue square.",
    "The image shows two green triangles and the number 7.",
    "There are three shapes. The star is yellow.",
    "One word.",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that fork come first: autograd's threads do not outlive a fork, and it refuses to work after one."""
    items.sort(key=lambda item: item.get_closest_marker("forks") is None)


def row(image: str | None, answer: str | None, question: str = "What is shown in the picture?") -> dict:
    """A calibration row in OpenAI style; ``image`` is a path relative to the image folder."""
    content = [{"type": "image", "image": image}] if image else []
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages}


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def float_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's tiny float32 model, made once."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tiny.save(family, tmp_path_factory.mktemp("models") / family)
        return made[family]

    return folder


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight rows with eight pictures: calib.jsonl beside images/0.png .. images/7.png."""
    folder = tmp_path_factory.mktemp("calibration")
    (folder / "images").mkdir()
    for i in range(8):
        tiny.picture(i).save(folder / "images" / f"{i}.png")
    return write_rows(folder / "calib.jsonl", [row(f"{i}.png", ANSWERS[i % len(ANSWERS)]) for i in range(8)])


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A trained model to break and diagnose: ``tests.trained.Trained``."""
    from tests.trained import Trained

    return Trained(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def options(calibration: Path) -> dict[str, Any]:
    images = calibration.parent / "images"
    return {"data": calibration, "images": images, "num_calibration_samples": 4, "batch_size": 2, "device": "cpu"}


@pytest.fixture
def kernel_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where compiled CUDA sources go; skips where nothing compiles them."""
    from mbq.kernels import compiled

    try:
        compiled.bindings()
    except compiled.CompilationError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("MBQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
