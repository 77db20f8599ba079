"""The installed wheel carries what ``mbq demo`` needs, and its command starts without torch."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pure wheel is installed by unpacking it."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run(installed: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=installed, env=environment, check=True, capture_output=True, text=True
    )
    return done.stdout


def test_holds_every_module_its_data_and_the_demos_model(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("mbq/") and not name.startswith("mbq/models/")}
        models = {name for name in archive.namelist() if name.startswith("mbq/models/")}
    files = (path for path in (ROOT / "src/mbq").rglob("*") if path.is_file() and path.suffix != ".pyc")
    sources = {str(path.relative_to(ROOT / "src")) for path in files}
    assert sources <= held
    model = {str(Path("mbq") / path.relative_to(ROOT)) for path in (ROOT / "models/internvl").iterdir()}
    assert models == model
    assert {"mbq/models/internvl/config.json", "mbq/models/internvl/model.safetensors"} <= model


def test_is_imported_from_the_wheel_and_shows_its_version(installed: Path) -> None:
    printed = run(installed, "-c", "import mbq; print(mbq.__file__, mbq.__version__)").split()
    assert printed == [str(installed / "mbq/__init__.py"), "0.1.0"]


def test_the_demo_finds_the_model_in_the_wheel(installed: Path) -> None:
    printed = run(installed, "-c", "from mbq.demo import reference_model; print(reference_model('internvl'))")
    assert printed.strip() == str(installed / "mbq/models/internvl")


def test_help_imports_neither_torch_nor_transformers(installed: Path) -> None:
    code = (
        "import sys\n"
        "from mbq.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: print(sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    assert run(installed, "-c", code).splitlines()[-1] == "[]"
