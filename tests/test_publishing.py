"""``mbq push`` and ``--push-to-hub`` against a Hub on loopback: what arrives, what does not, and how failing ends."""

from __future__ import annotations

import hashlib
import os
import random
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from typer.testing import CliRunner, Result

import mbq
from mbq.cli import app
from mbq.errors import MBQError
from mbq.publishing import model_files, parts
from tests.fake_hub import TOKEN, FakeHub

WEIGHTS = b"weights " * 1000


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def here(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The Hub of this process, to a user who is signed in; its client tries again at once."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
    template = f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    disable_progress_bars()
    yield hub
    enable_progress_bars()


CARD = """---
license: apache-2.0
---

    mbq generate model --image picture.png

mbq.load("model") or a model
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What mbq wrote, as far as an upload looks."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "config.json").write_text("{}")
    (folder / "recipe.yaml").write_text("model: base\n")
    (folder / "README.md").write_text(CARD)
    return folder


def mbq_here(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=False)


def push(*arguments: str | Path) -> Result:
    return mbq_here("push", *arguments)


def sentence(done: Result) -> str:
    """What a command that failed said, which is one line and no secret."""
    assert done.exit_code == 2, done.output
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert TOKEN not in done.output
    assert done.stderr.startswith("mbq: ")
    return done.stderr.strip()


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def uploaded(hub: FakeHub, name: str, revision: str = "main") -> dict[str, bytes]:
    files = hub.repositories[name].files(revision)
    return {path: content for path, content in files.items() if path != ".gitattributes"}


def mbq_process(hub: FakeHub, home: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command as users run it, with the Hub's address in the environment and nothing else changed."""
    settings = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
    return subprocess.run(
        [sys.executable, "-m", "mbq", *(str(each) for each in arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **settings},
        check=False,
    )


def test_quantized_pushed_and_loaded_by_its_name(
    here: FakeHub, float_folder: Callable[[str], Path], calibration: Path, tmp_path: Path
) -> None:
    output, images = tmp_path / "out", calibration.parent / "images"
    data = ["--data", calibration, "--images", images, "--num-calibration-samples", "2"]
    target = ["--output", output, "--push-to-hub", "ada/quantized", "--private"]
    done = mbq_here("quantize", float_folder("internvl"), *data, *target)
    assert done.exit_code == 0, done.output
    assert re.search(
        rf"^Uploaded \d+ files to {here.address}/ada/quantized \(commit \w+\)\.$", done.stdout, re.MULTILINE
    )
    assert here.repositories["ada/quantized"].private
    assert uploaded(here, "ada/quantized") == contents(output)
    assert TOKEN not in done.output
    for name, content in contents(output).items():
        for secret in (TOKEN, str(tmp_path), str(calibration.parent), str(float_folder("internvl").parent)):
            assert secret.encode() not in content, f"{name} says {secret}"

    asked = ["--image", images / "0.png", "--prompt", "What?", "--max-new-tokens", "4"]
    by_name = mbq_here("generate", "ada/quantized", *asked)
    assert by_name.exit_code == 0, by_name.output
    assert by_name.stdout == mbq_here("generate", output, *asked).stdout
    [snapshot] = (tmp_path / "cache" / "models--ada--quantized" / "snapshots").iterdir()
    downloaded = contents(snapshot)
    assert downloaded.items() <= contents(output).items()
    assert {"model.safetensors", "config.json", "README.md"} <= set(downloaded)


def test_an_export_is_pushed(here: FakeHub, float_folder: Callable[[str], Path], options: dict, tmp_path: Path) -> None:
    output = tmp_path / "out"
    data = ["--data", options["data"], "--images", options["images"], "--num-calibration-samples", "2"]
    done = mbq_here("export", float_folder("internvl"), *data, "--output", output, "--push-to-hub", "ada/even")
    assert done.exit_code == 0, done.output
    assert uploaded(here, "ada/even") == contents(output)
    assert "POST /api/validate-yaml" in here.requests
    assert 'from_pretrained("ada/even")' in ModelCard.load(output / "README.md").text


def test_a_model_of_the_hub_is_the_base_of_its_quantized_one(
    here: FakeHub, float_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    readme = b"---\nlicense: other\nlicense_name: heraldic\nlicense_link: LICENSE\nlanguage: [en]\n---\n"
    base = here.add("ada/base", files={**contents(float_folder("internvl")), "README.md": readme, "LICENSE": b"Yes."})
    commit = base.branches["main"]
    flags = ["--method", "rtn", "--output", tmp_path / "out", "--push-to-hub", "ada/w3"]
    done = mbq_here("quantize", f"ada/base@{commit}", *flags)
    assert done.exit_code == 0, done.output
    assert "POST /api/validate-yaml" in here.requests
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "ada/base"
    assert (card.data.license, card.data.license_name, card.data.language) == ("other", "heraldic", ["en"])
    assert card.data.license_link == f"https://huggingface.co/ada/base/blob/{commit}/LICENSE"
    assert (tmp_path / "out" / "LICENSE").read_bytes() == b"Yes."


def test_the_environment_says_where_the_hub_is(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    done = mbq_process(hub, tmp_path / "home", "push", folder, "ada/tiny")
    assert done.returncode == 0, done.stderr
    assert uploaded(hub, "ada/tiny") == contents(folder)
    assert TOKEN not in done.stdout + done.stderr


def test_weights_travel_by_xet_where_it_is_installed(
    here: FakeHub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What huggingface_hub does by default. The Hub sees hashes; the files are in the store, and come back from it."""
    hf_xet = pytest.importorskip("hf_xet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    weights = folder / "model.safetensors"
    weights.write_bytes(random.Random(0).randbytes(300_000))
    [hashed] = hf_xet.hash_files([str(weights)])
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    here.store, here.xet[digest], here.objects[digest] = tmp_path / "store", hashed.hash, weights.read_bytes()
    done = push(folder, "ada/tiny")
    assert done.exit_code == 0, done.output
    assert uploaded(here, "ada/tiny") == contents(folder)
    assert not [request for request in here.requests if request.startswith("PUT")]

    again = Path(snapshot_download("ada/tiny", allow_patterns="*.safetensors"))
    assert (again / "model.safetensors").read_bytes() == weights.read_bytes()
    assert not [request for request in here.requests if request.startswith("GET") and "/resolve/" in request]


def test_the_card_names_the_repository(here: FakeHub, folder: Path) -> None:
    done = push(folder, "engines/W3")
    assert done.exit_code == 0, done.output
    card = uploaded(here, "engines/W3")["README.md"].decode()
    assert card == CARD.replace('"model"', '"engines/W3"').replace("generate model", "generate engines/W3")
    assert uploaded(here, "engines/W3") == contents(folder)


def test_only_a_models_files_are_uploaded(here: FakeHub, folder: Path) -> None:
    before = set(contents(folder))
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "modeling.json").write_text("{}")
    (folder / ".env.json").write_text("{}")
    (folder / "notes.md").write_text("for me")
    (folder / "optimizer.pt").write_text("pickle")
    done = push(folder, "ada/tiny")
    assert set(uploaded(here, "ada/tiny")) == before
    assert "Left out, as no part of a model: .env.json, __pycache__, notes.md, optimizer.pt.\n" in done.stdout


def test_another_model_in_the_repository_is_replaced_and_what_is_not_mbqs_stays(here: FakeHub, folder: Path) -> None:
    shards = {"model-00001-of-00002.safetensors": b"1", "model.safetensors.index.json": b"{}"}
    here.add("ada/tiny", files={**shards, "photo.png": b"png", "other.safetensors": b"mine"})
    assert push(folder, "ada/tiny").exit_code == 0
    assert uploaded(here, "ada/tiny") == {**contents(folder), "photo.png": b"png", "other.safetensors": b"mine"}


def test_a_second_push_uploads_nothing_again(here: FakeHub, folder: Path) -> None:
    first = push(folder, "ada/tiny")
    here.requests.clear()
    second = push(folder, "ada/tiny")
    assert second.exit_code == 0
    assert not [request for request in here.requests if request.startswith("PUT") or "/commit/" in request]
    assert first.stdout == second.stdout


def test_a_branch_is_made(here: FakeHub, folder: Path) -> None:
    done = push(folder, "ada/tiny@w3/a16")
    assert f"to {here.address}/ada/tiny/tree/w3/a16 " in done.stdout
    assert uploaded(here, "ada/tiny", "w3/a16") == contents(folder)
    assert uploaded(here, "ada/tiny", "main") == {}
    assert 'mbq.load("model")' in (folder / "README.md").read_text(), "the repository's name loads its main branch"


def test_python_says_what_it_uploaded(here: FakeHub, folder: Path) -> None:
    pushed = mbq.push(folder, "ada/tiny", private=True)
    assert pushed.files == tuple(sorted(contents(folder)))
    assert here.repositories["ada/tiny"].branches["main"] == pushed.commit
    assert here.repositories["ada/tiny"].private


@pytest.mark.parametrize(("request_", "status", "said"), [
    ("GET /api/whoami-v2", 401, "does not know the token; run hf auth login"),
    ("GET /api/whoami-v2", 500, "the Hub answers 500"),
    ("GET /api/whoami-v2", None, "RemoteProtocolError"),
    ("POST /api/repos/create", 403, "the token may not write there"),
    ("POST /api/repos/create", 500, "the Hub answers 500 (as the test asked)"),
    ("POST /api/validate-yaml", 400, "Invalid metadata in README.md"),
    ("POST /api/models/ada/tiny/preupload/main", 403, "the token may not write there"),
    ("POST /ada/tiny.git/info/lfs/objects/batch", 500, "the Hub answers 500"),
    ("PUT /lfs/.*", 500, "the Hub answers 500"),
    ("PUT /lfs/.*", None, ""),
    ("POST /lfs/verify", 500, "the Hub answers 500"),
    ("POST /api/models/ada/tiny/commit/main", 409, "the Hub answers 409"),
    ("POST /api/models/ada/tiny/commit/main", 500, "the Hub answers 500"),
    ("POST /api/models/ada/tiny/commit/main", None, "RemoteProtocolError"),
])  # fmt: skip
def test_a_hub_that_fails_ends_in_one_sentence(
    here: FakeHub, folder: Path, request_: str, status: int | None, said: str
) -> None:
    here.fails[request_] = status
    told = sentence(push(folder, "ada/tiny", "--private"))
    assert said in told
    assert told.startswith(f"mbq: {folder} is complete, but was not uploaded to ada/tiny: ")
    assert told.endswith(f"upload it again with: mbq push {folder} ada/tiny --private")
    assert "ada/tiny" not in here.repositories or uploaded(here, "ada/tiny") == {}
    here.fails.clear()
    assert push(folder, "ada/tiny", "--private").exit_code == 0
    assert uploaded(here, "ada/tiny") == contents(folder)


def test_nothing_listens(here: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "was not uploaded to ada/tiny: ConnectError" in sentence(push(folder, "ada/tiny"))


def test_offline(here: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "OfflineModeIsEnabled" in sentence(push(folder, "ada/tiny"))


def test_interrupted(here: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", interrupted)
    done = push(folder, "ada/tiny")
    assert done.exit_code == 130
    assert done.stderr.strip().endswith(f"its upload goes on with: mbq push {folder} ada/tiny")


REFUSALS = [
    ("ada", "'ada' is no repository; give OWNER/NAME"),
    ("ada/tiny@", "is no repository"),
    ("a/b/c", "is no repository"),
    ("grace/tiny", "the token's user may not write to grace, but to ada and engines; choose another OWNER"),
    ("readers/tiny", "may not write to readers"),
]


@pytest.mark.parametrize(("repository", "said"), REFUSALS)
@pytest.mark.parametrize("command", ["quantize", "export"])
def test_refused_before_the_search(
    here: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, repository: str, said: str
) -> None:
    monkeypatch.setattr("mbq.pipeline.make", None)
    arguments = [command, "model", "--output", tmp_path / "out", "--push-to-hub", repository]
    assert said in sentence(mbq_here(*arguments))


def test_the_token_decides_before_the_search(here: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(*flags: str) -> str:
        return sentence(mbq_here("quantize", "model", "--output", "out", *flags))

    target = ("--push-to-hub", "ada/tiny")
    here.user["auth"]["accessToken"]["role"] = "read"
    assert "Nothing can be uploaded to ada/tiny: the token may only read; run hf auth login" in told(*target)
    here.user["auth"]["accessToken"]["role"] = "fineGrained"
    here.add("ada/tiny")
    assert "Nothing can be uploaded to ada/tiny: the Hub answers 403" in told(*target)
    here.user["auth"]["accessToken"]["role"] = "write"
    assert "ada/tiny exists and is public; leave --private out" in told(*target, "--private")
    assert "--private is of the repository that --push-to-hub names" in told("--private")
    monkeypatch.setenv("HF_TOKEN", "hf_anotherToken")
    assert "does not know the token" in told(*target)
    monkeypatch.delenv("HF_TOKEN")
    assert "there is no token; run hf auth login" in told(*target)


def test_folders_that_mbq_did_not_write_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MBQError, match="There is no folder"):
        model_files(tmp_path / "nowhere")
    (tmp_path / "secret.json").write_text("{}")
    (folder / "extra.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(MBQError, match=r"extra\.json is a link"):
        model_files(folder)
    (folder / "recipe.yaml").unlink()
    with pytest.raises(MBQError, match=r"was not written by mbq \(it lacks recipe\.yaml"):
        model_files(folder)


def test_parts() -> None:
    assert parts("ada/tiny") == ("ada/tiny", None)
    assert parts("ada/tiny@w3/a16") == ("ada/tiny", "w3/a16")


def test_a_hub_that_hangs_up_during_a_download_ends_in_one_sentence(here: FakeHub) -> None:
    here.fails["GET /api/models/.*"] = None
    done = mbq_here("generate", "ada/tiny", "--prompt", "What?")
    assert "ada/tiny is neither a folder here nor a model that the Hub gives" in sentence(done)


def test_yaml_of_the_card_is_what_the_hub_validates(here: FakeHub, folder: Path) -> None:
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'base_model': '/home/ada/models/base'})}---\n\n# x\n")
    assert '"base_model" is not a valid model id' in sentence(push(folder, "ada/tiny"))
