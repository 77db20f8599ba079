"""``mbq card``: a run's figures in a model card, for readers and for the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from mbq.cli import app
from mbq.evaluation.results import Results
from mbq.evaluation.runs import write_run
from mbq.model_card import model_card
from mbq.recipe import Recipe, recipe_yaml

PERPLEXITY = {"estimate": 5.4321, "low": 5.2, "high": 5.6}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files of a quantized folder that count here."""
    folder = tmp_path / "w3"
    folder.mkdir()
    recipe = Recipe()
    text = recipe_yaml(recipe, "owner/base", None)
    (folder / "recipe.yaml").write_text(text)
    card = model_card(
        recipe,
        text,
        base_model="owner/base",
        inherited={"license": "mit"},
        folder_name="w3",
        transformers="",
        vllm="",
        kept=(),
        files=(),
        megabytes=(4, 1),
    )
    (folder / "README.md").write_text(card)
    return folder


def results(name: str, right: dict[str, list[bool]], questions: str = "same") -> Results:
    return Results(
        model=name,
        correct={task: np.array(answers) for task, answers in right.items()},
        pictures={task: np.arange(len(answers)) for task, answers in right.items()},
        image_tasks=tuple(task for task in right if task != "sums"),
        questions=questions,
    )


RIGHT = {"colour": [True] * 30 + [False] * 10, "count": [True] * 20 + [False] * 20, "sums": [True] * 36 + [False] * 4}
FLOAT = {"colour": [True] * 40, "count": [True] * 30 + [False] * 10, "sums": [True] * 40}


def run(path: Path, found: Results | None, model: Path | None = None, **info: Any) -> Path:
    known = {
        "model": path.name,
        "source": "/home/ada/models/w3",
        "created": "2026-01-02T03:04:05+00:00",
        "device": "cuda:0",
        "dtype": "bfloat16",
        "kernel": "cuda",
        "data": {"data": "/home/ada/exam.jsonl", "tasks": None, "limit": None},
        "versions": {"mbq": "0.1.0"},
    }
    return write_run(path, known | info, found, model=model)


def mbq_card(*arguments: str | Path) -> str:
    """What the command says: where it wrote, or why not."""
    done = CliRunner().invoke(app, ["card", *(str(each) for each in arguments)], catch_exceptions=False)
    assert done.exit_code == (2 if done.stderr else 0)
    return (done.stderr or done.stdout).strip()


def test_figures_of_a_run_beside_its_baseline(folder: Path, tmp_path: Path) -> None:
    own, base = results("w3", RIGHT), results("base", FLOAT)
    measured = run(tmp_path / "runs" / "w3", own, model=folder)
    said = mbq_card(folder, "--results", measured, "--baseline", run(tmp_path / "runs" / "base", base))
    assert said == f"Wrote {folder / 'README.md'}"

    text = (folder / "README.md").read_text()
    section = text.split("## Results\n")[1].split("\n## ")[0]
    assert "Not measured" not in text
    assert "on 2026-01-02, in bfloat16 on cuda, kernel cuda." in section
    assert "the questions of exam.jsonl, beside base, with the paired difference:" in section
    assert "ada" not in text, "a path of the machine"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    assert rows[0] == ["task", "questions", "this model", "base", "difference"]
    images = ("colour", "count")
    expected = {
        "colour": (40, own.accuracy("colour"), base.accuracy("colour"), own.minus(base, ["colour"])),
        "count": (40, own.accuracy("count"), base.accuracy("count"), own.minus(base, ["count"])),
        "**image: mean of 2 tasks**": (80, own.mean(images), base.mean(images), own.minus(base, images)),
        "sums": (40, own.accuracy("sums"), base.accuracy("sums"), own.minus(base, ["sums"])),
    }
    assert rows[2:] == [
        [name, str(count), mine.percent(), other.percent(), difference.percent(signed=True)]
        for name, (count, mine, other, difference) in expected.items()
    ]
    assert rows[2][2].startswith("75.0 (")
    assert rows[2][4].startswith("-25.0 (")


def test_the_hub_reads_them_and_the_rest_of_the_card_stays(folder: Path, tmp_path: Path) -> None:
    before = ModelCard.load(folder / "README.md")
    mbq_card(folder, "--results", run(tmp_path / "runs" / "w3", results("w3", RIGHT), model=folder))
    card = ModelCard.load(folder / "README.md")
    found = {each.dataset_config: each for each in card.data.eval_results}
    assert {task: each.metric_value for task, each in found.items()} == {"colour": 75.0, "count": 50.0, "sums": 90.0}
    assert {task: each.task_type for task, each in found.items()} == {
        "colour": "image-text-to-text",
        "count": "image-text-to-text",
        "sums": "text-generation",
    }
    assert {(each.dataset_type, each.metric_type) for each in found.values()} == {("exam", "exact_match")}
    assert found["count"].metric_name.endswith(results("w3", RIGHT).accuracy("count").percent())
    assert card.data.model_name == "w3"
    for field, value in before.data.to_dict().items():
        assert card.data.get(field) == value, field
    outside = [text.partition("## Results\n")[0] + text.partition("\n## How")[2] for text in (before.text, card.text)]
    assert outside[0] == outside[1]


def test_a_later_run_replaces_an_earlier_one(folder: Path, tmp_path: Path) -> None:
    mbq_card(folder, "--results", run(tmp_path / "first", results("w3", FLOAT), model=folder))
    later = run(tmp_path / "later", results("w3", {"sums": [True, False]}), model=folder)
    mbq_card(folder, "--results", later)
    text = (folder / "README.md").read_text()
    assert text.count("## Results") == 1
    assert "colour" not in text
    assert [each.metric_value for each in ModelCard(text).data.eval_results] == [50.0]
    mbq_card(folder, "--results", later)
    assert (folder / "README.md").read_text() == text, "the same again"


def test_perplexity_alone(folder: Path, tmp_path: Path) -> None:
    text = {"rows": 3, "tokens": 99, "perplexity": PERPLEXITY, "perplexity_ratio": None, "kl": None, "top1": None}
    mbq_card(folder, "--results", run(tmp_path / "runs" / "w3", None, model=folder, text=text))
    card = ModelCard.load(folder / "README.md")
    assert "| perplexity | 5.432 (5.2 to 5.6) |" in card.text
    assert "KL" not in card.text
    assert card.data.eval_results is None


def test_tasks_of_lmms_eval(folder: Path, tmp_path: Path) -> None:
    def summary(accuracy: float) -> dict[str, Any]:
        metrics = {
            "alias": "t",
            "acc,none": accuracy,
            "acc_stderr,none": 0.05,
            "f1,strict": 0.5,
            "f1_stderr,strict": "N/A",
        }
        return {"version": "0.9", "limit": 50, "results": {"ocrbench": metrics}}

    base = run(tmp_path / "runs" / "base", None, lmms_eval=summary(0.8))
    own = run(tmp_path / "runs" / "w3", None, model=folder, lmms_eval=summary(0.75))
    mbq_card(folder, "--results", own, "--baseline", base)
    card = ModelCard.load(folder / "README.md")
    assert "lmms-eval 0.9, the first 50 documents of each task, ± one standard error:" in card.text
    assert "| task | metric | this model | base |" in card.text
    assert "| ocrbench | acc | 0.7500 ±0.0500 | 0.8000 ±0.0500 |" in card.text
    assert "| ocrbench | f1 (strict) | 0.5000 | 0.5000 |" in card.text
    found = {each.metric_type: each for each in card.data.eval_results}
    assert {name: each.metric_value for name, each in found.items()} == {"acc": 0.75, "f1": 0.5}
    assert {each.dataset_type for each in found.values()} == {"ocrbench"}
    mbq_card(folder, "--results", own)
    assert "| ocrbench | acc | 0.7500 ±0.0500 |\n" in (folder / "README.md").read_text()


def test_a_card_without_the_section_gets_it_at_its_end(folder: Path, tmp_path: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
    mbq_card(folder, "--results", run(tmp_path / "runs" / "w3", results("w3", RIGHT), model=folder))
    card = ModelCard.load(folder / "README.md")
    assert card.text.startswith("\n# Mine\n\n## Results\n")
    assert card.data.license == "mit"


def test_what_does_not_belong_together_is_refused(folder: Path, tmp_path: Path) -> None:
    before = (folder / "README.md").read_bytes()
    own = run(tmp_path / "own", results("w3", RIGHT), model=folder)
    other = tmp_path / "w4"
    other.mkdir()
    (other / "recipe.yaml").write_text("scheme: W4A16\n")
    wrong = run(tmp_path / "wrong", results("w4", RIGHT), model=other)
    base = run(tmp_path / "base", results("base", FLOAT, questions="other"))
    empty = run(tmp_path / "empty", None, model=folder)
    assert "was made by another recipe" in mbq_card(folder, "--results", wrong)
    assert "was made by another recipe" in mbq_card(folder, "--results", base)
    assert "answered different questions" in mbq_card(folder, "--results", own, "--baseline", base)
    assert "asked no questions" in mbq_card(folder, "--results", own, "--baseline", empty)
    assert "holds no figures" in mbq_card(folder, "--results", empty)
    assert "is no run" in mbq_card(folder, "--results", folder)
    assert "holds no model that mbq wrote" in mbq_card(other, "--results", wrong)
    assert (folder / "README.md").read_bytes() == before
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    assert "cannot be read" in mbq_card(folder, "--results", own)
