"""A run's folder holds what was asked and answered, and comes back from disk as it was."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import mbq
from mbq.demo import reference_model
from mbq.errors import MBQError
from mbq.evaluation import Answer, Results, Run, answers, run, write_run
from mbq.evaluation.command import run_names
from mbq.evaluation.examples import Examples
from mbq.evaluation.questions import prepare
from mbq.evaluation.run import world_questions
from mbq.evaluation.runs import picture_names
from mbq.rows import Row, text_of
from tests import tiny

LIMIT, TASKS = 12, ["founder", "colour", "feast", "towns"]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained InternVL at 3 bits, rounded to nearest: it gets much wrong, and not all."""
    folder = tmp_path_factory.mktemp("models") / "W3A16-rtn"
    mbq.quantize(reference_model("internvl"), method="rtn", scheme="W3A16", output=folder, device="cpu")
    return folder


@pytest.fixture(scope="module")
def stored(quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    console = Console(file=io.StringIO())
    run(
        quantized,
        baseline=reference_model("internvl"),
        tasks=TASKS,
        limit=LIMIT,
        output=folder,
        answers=3,
        console=console,
    )
    return folder


def test_both_models_answer_every_shown_question(stored: Path, quantized: Path, tmp_path: Path) -> None:
    """What the answers say is what each model writes to the question alone, and right where the results say so."""
    floats, rounded = Run.load(stored / "internvl"), Run.load(stored / "W3A16-rtn")
    assert (floats.name, rounded.name) == ("internvl", "W3A16-rtn")
    places = [(answer.task, answer.index) for answer in rounded.answers]
    assert places == [(answer.task, answer.index) for answer in floats.answers]
    assert places == sorted(places, key=lambda place: (TASKS.index(place[0]), place[1]))
    rows = world_questions(tmp_path, TASKS, LIMIT)
    for found, source in ((floats, reference_model("internvl")), (rounded, quantized)):
        assert found.results is not None
        model, processor = mbq.load(source), mbq.load_processor(source)
        for task in TASKS:
            expected = np.flatnonzero(~found.results.correct[task])[:3]
            shown = [answer for answer in found.answers if answer.task == task and not answer.right]
            if found is rounded:  # its own wrong answers; the baseline's may come on top
                assert {answer.index for answer in shown} >= set(expected) - set(
                    np.flatnonzero(~floats.results.correct[task])
                )
        for answer in found.answers:
            row = [each for each in rows if each.task == answer.task][answer.index]
            assert answer.question == text_of(row.messages[-2])
            assert answer.reference == text_of(row.messages[-1])
            assert answer.right == bool(found.results.correct[answer.task][answer.index])
            assert answer.answer == answers(model, processor, [row], max_new_tokens=128)[0]
            assert answer.right == (answer.answer == answer.reference)
            assert [Image.open(found.folder / name).tobytes() for name in answer.pictures] == [
                Image.open(path).tobytes() for path in row.images
            ]


def test_run_json_says_what_was_run(stored: Path, quantized: Path) -> None:
    info = Run.load(stored / "W3A16-rtn").info
    assert info["source"] == str(quantized)
    assert info["data"] == {
        "tasks": TASKS,
        "data": None,
        "images": None,
        "limit": LIMIT,
        "include_path": None,
        "perplexity": None,
    }
    assert info["bytes"] == sum(file.stat().st_size for file in quantized.glob("*.safetensors"))
    assert info["kernel"] == "reference"
    assert Run.load(stored / "internvl").info["kernel"] is None
    assert info["versions"]["torch"]
    assert (stored / "W3A16-rtn" / "model" / "recipe.yaml").read_bytes() == (quantized / "recipe.yaml").read_bytes()
    assert not (stored / "internvl" / "model").exists()


def test_a_run_is_not_overwritten_and_the_model_is_not_even_loaded(stored: Path) -> None:
    before = {path: path.read_bytes() for path in stored.rglob("*") if path.is_file()}
    with pytest.raises(MBQError, match="is not empty"):
        run("no-model", baseline=reference_model("internvl"), output=stored)
    assert {path: path.read_bytes() for path in stored.rglob("*") if path.is_file()} == before


def results_of(correct: list[bool], name: str = "a") -> Results:
    return Results(name, {"t": np.array(correct)}, {"t": np.arange(len(correct))}, (), "digest")


def test_each_later_model_shows_first_what_it_alone_has_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no model is needed again once it has passed."""
    model, processor = tiny.tiny("internvl")
    rows = [
        Row(
            [
                {"role": "user", "content": [{"type": "text", "text": f"Question {i}?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": f"answer {i}"}]},
            ],
            f"row {i}",
            "t",
        )
        for i in range(8)
    ]
    examples = Examples(prepare(rows, processor), per_task=2, max_new_tokens=2)
    examples.add(model, results_of([True, False, False, False, True, True, True, True]))
    examples.add(model, results_of([True, True, False, False, True, False, False, False]))
    first, second = examples.of(0), examples.of(1)
    assert [answer.index for answer in first] == [answer.index for answer in second] == [1, 2, 5, 6]
    assert [answer.right for answer in first] == [False, False, True, True]
    assert [answer.right for answer in second] == [True, False, False, False]
    assert first[2].answer == "answer 5"
    assert second[2].answer == answers(model, processor, [rows[5]], max_new_tokens=2)[0] != "answer 5"


def test_writing_and_reading_changes_nothing(tmp_path: Path) -> None:
    sources = [tmp_path / "a b.png", tiny.picture(1), tmp_path / "x" / "a b.png", (tmp_path / "a b.png")]
    (tmp_path / "x").mkdir()
    for i, source in enumerate(sources):
        if isinstance(source, Path) and not source.exists():
            tiny.picture(i).save(source)
    sources.append(sources[0].read_bytes())
    names = picture_names(sources)
    assert names == ["pictures/a_b.png", "pictures/00001.png", "pictures/a_b-2.png", names[0], "pictures/00003.png"]
    asked = [Answer("t", 0, "Wo? — \u2028 ё", "hier", 'da\n"', False, tuple(names)), Answer("t", 1, "", "", "", True)]
    results = results_of([False, True])
    folder = write_run(
        tmp_path / "run", {"model": "m", "seconds": 1.5}, results, asked, dict(zip(names, sources, strict=True))
    )
    found = Run.load(folder)
    assert found.answers == asked
    assert found.info == {"format": 1, "model": "m", "seconds": 1.5}
    assert found.results.correct["t"].tolist() == [False, True]
    assert Image.open(folder / names[1]).tobytes() == sources[1].tobytes()
    assert Run.load(write_run(tmp_path / "bare", {"model": "m"})).results is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.json", None, "is no run: it holds no run.json"),
        ("run.json", "{", "is damaged"),
        ("run.json", "[]", "is damaged"),
        ("run.json", '{"format": 2}', "of format 2, not 1"),
        ("results.json", '{"model": "m"}', "is damaged"),
        ("answers.jsonl", '{"task": 1}', "is damaged"),
        ("answers.jsonl", "escape", "lies outside"),
        ("answers.jsonl", "other", "question 1 of t|is damaged"),
    ],
)
def test_a_folder_that_is_no_run_is_a_sentence(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    folder = write_run(tmp_path / "run", {"model": "m"}, results_of([True]), [Answer("t", 0, "q", "r", "a", True)])
    if content is None:
        (folder / name).unlink()
    elif content == "escape":
        line = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**line, "pictures": ["../../secret.png"]}))
    elif content == "other":
        (folder / name).write_text((folder / name).read_text().replace('"index": 0', '"index": 1'))
    else:
        (folder / name).write_text(content)
    with pytest.raises(MBQError, match=message):
        Run.load(folder)


def test_names_tell_folders_of_one_name_apart() -> None:
    assert run_names(["a/m", "b/m", "owner/m@main"]) == ["m", "m-2", "m@main"]
