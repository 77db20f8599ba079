"""The demo on a tiny random model: everything but the accuracy."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from mbq import demo as module
from mbq.demo import demo
from mbq.errors import MBQError
from mbq.evaluation.runs import Run
from tests import tiny


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("demo")
    source = tiny.save("internvl", folder / "tiny")
    out = io.StringIO()
    before = module.SAMPLES
    module.SAMPLES = 4
    try:
        demo(folder / "out", model=source, per_task=3, tasks=["colour", "towns"], console=Console(file=out, width=100))
    finally:
        module.SAMPLES = before
    return out.getvalue(), folder / "out"


def test_it_shows_every_method_of_both_schemes(printed: tuple[str, Path]) -> None:
    text, _ = printed
    for scheme, methods in module.SCHEMES.items():
        table = text[text.index(f"{scheme}: right answers") :]
        header = next(line for line in table.splitlines() if "task" in line.split())
        assert header.split() == ["task", "float", *(module.NAMES[method] for method in methods)]
    for row in ("colour", "towns", "image: mean of 1 task", "weights on disk, MB", "quantized in, s"):
        lines = [line for line in text.splitlines() if line.strip().startswith(row)]
        assert len(lines) == len(module.SCHEMES)


def test_it_shows_an_answer_a_model_beside_its_picture(printed: tuple[str, Path]) -> None:
    text, output = printed
    picture = next(line.split()[-1] for line in text.splitlines() if line.startswith("  picture"))
    assert Path(picture).is_file()
    assert output in Path(picture).parents
    answers = text[text.index("  answer") : text.index("The quantized models")].splitlines()[1:]
    assert [line.split()[0] for line in answers] == [
        "float",
        *(f"{scheme}-{method}" for scheme, methods in module.SCHEMES.items() for method in methods),
    ]


def test_it_ends_with_a_page_about_all_models(printed: tuple[str, Path]) -> None:
    text, output = printed
    line = text.splitlines()[-1]
    assert line.startswith("All of it on one page: ")
    html = Path(line.removeprefix("All of it on one page: ")).read_text("utf-8")
    names = ["float", *(f"{scheme}-{method}" for scheme, methods in module.SCHEMES.items() for method in methods)]
    assert sorted(path.name for path in (output / "runs").iterdir()) == sorted(names)
    for name in names:
        assert f'<th scope="row">{name}</th>' in html
        run = Run.load(output / "runs" / name)
        assert str(output.parent) not in json.dumps(run.info), (
            "a page may be given away; folders are one's own business"
        )
        assert run.answers
        assert all((run.folder / picture).is_file() for answer in run.answers for picture in answer.pictures)
    assert 'class="card"' in html
    assert "data:image/webp" in html


def test_it_leaves_checkpoints_that_load(printed: tuple[str, Path]) -> None:
    import mbq

    _, output = printed
    for scheme, methods in module.SCHEMES.items():
        for method in methods:
            assert (output / f"{scheme}-{method}" / "config.json").is_file()
    model = mbq.load(output / "W3A16-mbq")
    processor = mbq.load_processor(output / "W3A16-mbq")
    assert model(**tiny.inputs(processor)).logits.isfinite().all()


def test_it_does_not_write_over_anything(printed: tuple[str, Path]) -> None:
    _, output = printed
    before = sorted(output.rglob("*"))
    with pytest.raises(MBQError, match="not empty"):
        demo(output, model=output)
    assert sorted(output.rglob("*")) == before


def test_a_missing_model_is_a_sentence() -> None:
    with pytest.raises(MBQError, match="reference model nowhere is missing"):
        module.reference_model("nowhere")
