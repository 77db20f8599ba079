"""Comparisons of runs against figures worked out in other ways, and a command that can gate a CI."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from mbq.cli import app
from mbq.evaluation import Answer, Results, Run, write_run
from mbq.evaluation.compare import compare, exceeded, flips

IMAGE, TEXT = "colour", "towns"


def run(
    folder: Path, name: str, image: list[int], text: list[int], wrong: list[Answer] | None = None, digest: str = "d"
) -> Path:
    correct = {IMAGE: np.array(image, bool), TEXT: np.array(text, bool)}
    pictures = {IMAGE: np.arange(len(image)), TEXT: np.arange(len(text)) + 1000}
    results = Results(name, correct, pictures, (IMAGE,), digest)
    return write_run(folder / name, {"model": name, "created": "2026-01-01"}, results, wrong or [])


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Of 20 questions about pictures 3 are lost and 1 is gained; of 10 others 1 is lost."""
    before = run(tmp_path, "before", [1] * 18 + [0] * 2, [1] * 10)
    after = run(tmp_path, "after", [0] * 3 + [1] * 15 + [1, 0], [0] + [1] * 9)
    return [before, after]


def mbq_compare(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["compare", *map(str, arguments)], catch_exceptions=False)


def mcnemar(lost: int, gained: int) -> float:
    """Twice the tail of fair coins, as the textbook has it."""
    flipped = lost + gained
    tail = sum(math.comb(flipped, k) for k in range(min(lost, gained) + 1)) / 2**flipped
    return min(1.0, 2 * tail)


def test_flips_agreement_and_mcnemar_by_task_and_modality(runs: list[Path]) -> None:
    comparison = compare([Run.load(folder) for folder in runs])[0]
    lines = {line.name: line for line in comparison.lines}
    assert list(lines) == [IMAGE, "image tasks", TEXT, "text tasks"]
    for name in (IMAGE, "image tasks"):
        line = lines[name]
        assert (line.questions, line.lost, line.gained) == (20, 3, 1)
        assert line.agreement == pytest.approx(16 / 20)
        assert line.p == pytest.approx(mcnemar(3, 1))
        assert (line.before.estimate, line.after.estimate) == (0.9, 0.8)
        assert line.difference.estimate == pytest.approx(-0.1)
    assert (lines[TEXT].lost, lines[TEXT].gained) == (1, 0)
    assert lines[TEXT].p == 1.0


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (5, 0), (9, 2), (40, 22), (300, 200), (7, 7)])
def test_mcnemar_is_the_binomial_tail(tmp_path: Path, lost: int, gained: int) -> None:
    before = run(tmp_path, "a", [1] * lost + [0] * gained + [1], [1])
    after = run(tmp_path, "b", [0] * lost + [1] * gained + [1], [1])
    line = compare([Run.load(before), Run.load(after)])[0].lines[0]
    assert line.p == pytest.approx(mcnemar(lost, gained), rel=1e-9)


def test_the_difference_has_the_interval_of_the_paired_bootstrap(runs: list[Path]) -> None:
    """Against drawing questions with replacement, one set of draws at a time."""
    before, after = (Run.load(folder) for folder in runs)
    generator = np.random.default_rng(1)
    each = after.results.correct[IMAGE].astype(float) - before.results.correct[IMAGE]
    draws = [generator.choice(each, len(each)).mean() for _ in range(4000)]
    found = compare([before, after])[0].lines[0].difference
    assert [found.low, found.high] == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.051)


def test_all_are_compared_with_the_first(tmp_path: Path, runs: list[Path]) -> None:
    third = run(tmp_path, "third", [1] * 20, [0] * 10)
    found = compare([Run.load(folder) for folder in (*runs, third)])
    assert [(each.baseline, each.model) for each in found] == [("before", "after"), ("before", "third")]
    assert [line.difference.estimate for line in found[1].lines] == pytest.approx([0.1, 0.1, -1, -1])


def test_the_gate_looks_at_each_modality_and_allows_just_what_it_says(runs: list[Path]) -> None:
    comparison = compare([Run.load(folder) for folder in runs])[0]  # both modalities fell by ten points

    def names(*arguments: float | bool) -> list[str]:
        return [line.name for line in exceeded(comparison, *arguments)]

    assert names(10.0) == []
    assert names(9.9) == ["image tasks", "text tasks"]
    bound = -100 * comparison.lines[1].difference.low
    assert bound > 20
    assert "image tasks" in names(bound - 0.1, True)
    assert "image tasks" not in names(bound, True)


@pytest.mark.parametrize(("limit", "status"), [("10", 0), ("9", 1), ("0", 1)])
def test_the_command_is_a_gate(runs: list[Path], tmp_path: Path, limit: str, status: int) -> None:
    report = tmp_path / "report.json"
    done = mbq_compare(*runs, "--max-drop", limit, "--json", report)
    assert done.exit_code == status
    assert ("fell by 10.00 points against before, more than --max-drop" in done.stderr) == bool(status)
    stored = json.loads(report.read_text())
    assert len(stored["failures"]) == 2 * status
    assert [each["name"] for each in stored["comparisons"][0]["lines"]][:2] == [IMAGE, "image tasks"]
    assert stored["runs"][1] == {"folder": str(runs[1]), "model": "after", "created": "2026-01-01"}
    line = next(line.split() for line in done.stdout.splitlines() if line.split()[:1] == [IMAGE])
    assert line[1:3] == ["90.0", "80.0"]
    assert line[-4:] == ["3", "1", "80.0", f"{mcnemar(3, 1):.3f}"]


def test_without_a_limit_a_fall_is_no_failure(runs: list[Path]) -> None:
    assert mbq_compare(*runs).exit_code == 0


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("other questions", "answered different questions"),
        ("one run", "needs two runs"),
        ("no run", "holds no run.json"),
        ("no questions", "have no questions in common"),
    ],
)
def test_what_cannot_be_compared_is_a_sentence_and_status_2(
    runs: list[Path], tmp_path: Path, case: str, message: str
) -> None:
    folders = {
        "other questions": [runs[0], run(tmp_path, "other", [1] * 20, [1] * 10, digest="e")],
        "one run": runs[:1],
        "no run": [runs[0], tmp_path],
        "no questions": [runs[0], write_run(tmp_path / "bare", {"model": "bare"})],
    }[case]
    done = mbq_compare(*folders, "--max-drop", "0")
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_flipped_questions_are_shown_with_what_each_wrote(tmp_path: Path) -> None:
    lost = Answer(IMAGE, 1, "Which colour?", "red", "\x1b[31mblue", False)
    both = Answer(IMAGE, 2, "And this?", "red", "green", False)
    gained = Answer(TEXT, 0, "Which town?", "Rye", "Ely", False)
    before = run(tmp_path, "a", [1, 1, 0], [0], [both, gained])
    after = run(tmp_path, "b", [1, 0, 0], [1], [lost, both])
    found = flips(Run.load(before), Run.load(after))
    assert [(flip.task, flip.index, flip.lost, flip.before, flip.after) for flip in found] == [
        (IMAGE, 1, True, "red", "\x1b[31mblue"),
        (TEXT, 0, False, "Ely", "Rye"),
    ]
    text = mbq_compare(before, after, "--show", "1").stdout
    assert "colour 1, lost: Which colour?" in text
    assert "blue" in text
    assert "\x1b" not in text
    assert "Which town?" not in text


def test_two_runs_of_one_model_are_told_by_their_folders(tmp_path: Path) -> None:
    folders = [run(tmp_path / part, "m", [1], [1]) for part in ("old", "new")]
    found = compare([Run.load(folder) for folder in folders])[0]
    assert (found.baseline, found.model) == tuple(map(str, folders))


def public(folder: Path, name: str, **tasks: list) -> Path:
    """A run of lmms-eval's tasks alone; a task's samples as the harness logs them."""
    files = folder / f"{name}-files"
    files.mkdir()
    for task, values in tasks.items():
        lines = [
            {"doc_id": i, "target": "t", "arguments": [f"question {i}"], "metric": value}
            for i, value in enumerate(values)
        ]
        (files / f"samples_{task}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in reversed(lines)))
    better = {task: {"metric": True} for task in tasks}
    results = {task: {"metric,none": 0.5} for task in tasks}
    info = {"model": name, "lmms_eval": {"version": "0", "results": results, "higher_is_better": better}}
    return write_run(folder / name, info, lmms_eval=files)


def test_lmms_evals_documents_are_compared_too(tmp_path: Path) -> None:
    before = public(tmp_path, "a", vqa=[1.0, 0.3, 0.6, 0.0], ocr=[{"score": 1}] * 4, mmmu=[{"answer": "A"}] * 4)
    after = public(tmp_path, "b", vqa=[0.6, 0.3, 0.0, 0.9], ocr=[{"score": 0}] * 4, mmmu=[{"answer": "B"}] * 4)
    lines = {line.name: line for line in compare([Run.load(before), Run.load(after)])[0].lines}
    assert list(lines) == ["vqa", "ocr", "lmms-eval tasks"], "MMMU's documents have no number of their own"
    assert lines["vqa"].difference.estimate == pytest.approx((1.8 - 1.9) / 4)
    assert (lines["vqa"].lost, lines["vqa"].gained, lines["vqa"].agreement) == (2, 1, 0.25)
    assert lines["lmms-eval tasks"].difference.estimate == pytest.approx((-0.025 - 1) / 2)
    assert lines["ocr"].p == pytest.approx(mcnemar(4, 0))
    assert mbq_compare(before, after, "--max-drop", "50").exit_code == 1
    assert mbq_compare(before, after, "--max-drop", "52").exit_code == 0


def test_other_documents_are_refused(tmp_path: Path) -> None:
    done = mbq_compare(public(tmp_path, "a", vqa=[1.0, 0.0]), public(tmp_path, "b", vqa=[1.0]))
    assert done.exit_code == 2
    assert "answered different questions" in done.stderr
