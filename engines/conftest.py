"""What the tests of engines share: the folders that ``engines.folders`` wrote, and the report that they fill."""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

# Read when vllm is imported. A gigabyte of cache holds more than all prompts. Without the third, vLLM rounds what
# 4-bit layers read to 8 bits on a CPU with AMX.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # one process, so that tests can look at the model
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_INT4_W4A8="0",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
)

MAX_TOKENS = 160  # of an answer, as in the models' generation_config.json
PACKAGES = ("vllm-cpu", "torch", "transformers", "compressed-tensors")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--folders", type=Path, required=True, help="what engines.folders wrote")
    parser.addoption("--report", type=Path, help="a JSON file to write what was measured into, if every test passes")


@dataclass(frozen=True)
class Folders:
    """The folders, questions and expected answers under ``path``; engines/folders.py says what they are."""

    path: Path
    questions: list[dict[str, Any]]
    expected: dict[str, Any]

    @property
    def chats(self) -> list[list[dict[str, Any]]]:
        """The questions as OpenAI's API takes them, pictures as data URLs."""
        return [[{"role": "user", "content": self._content(question)}] for question in self.questions]

    def _content(self, question: dict[str, Any]) -> list[dict[str, Any]]:
        text = {"type": "text", "text": question["text"]}
        if not question["picture"]:
            return [text]
        data = base64.b64encode((self.path / question["picture"]).read_bytes()).decode()
        return [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}, text]


@pytest.fixture(scope="session")
def folders(request: pytest.FixtureRequest) -> Folders:
    path = request.config.getoption("--folders")
    questions, expected = (json.loads((path / f"{name}.json").read_text()) for name in ("questions", "expected"))
    return Folders(path, questions, expected)


@pytest.fixture(scope="session")
def report(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """What was measured; written at the end, and only where all tests ran and passed."""
    found: dict[str, Any] = {"versions": {name: version(name) for name in PACKAGES}, "folders": {}}
    started = time.monotonic()
    yield found
    found["seconds"] = round(time.monotonic() - started)
    path = request.config.getoption("--report")
    if path is not None and not request.session.testsfailed:
        path.write_text(json.dumps(found, indent=2) + "\n")
