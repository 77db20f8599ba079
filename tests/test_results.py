"""Results come back from disk as they were, and the results page says what they hold."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from benchmarks import results as bench
from benchmarks.results_page import page
from mbq.errors import MBQError
from mbq.evaluation import Results, run
from mbq.evaluation.table import results_table
from tests import tiny


def made(
    name: str, shares: dict[str, float], seed: int = 0, count: int = 200, digest: str = "q", **recipe: object
) -> Results:
    generator = np.random.default_rng(seed)
    return Results(
        model=name,
        correct={task: generator.random(count) < share for task, share in shares.items()},
        pictures={task: np.arange(count) + 1000 * (task == "towns") for task in shares},
        image_tasks=tuple(task for task in shares if task != "towns"),
        questions=digest,
        recipe={"weights": "w", **recipe},
        seconds=1.25,
    )


SHARES = {"arms": 0.9, "colour": 0.6, "towns": 0.8}


def test_saving_and_loading_changes_nothing(tmp_path: Path) -> None:
    before = made("a model", SHARES, count=203)
    before.pictures["arms"][:] = np.random.default_rng(0).integers(0, 50, 203)
    before.save(tmp_path / "r.json")
    after = Results.load(tmp_path / "r.json")
    for field in ("model", "image_tasks", "questions", "recipe", "seconds"):
        assert getattr(after, field) == getattr(before, field)
    for task in SHARES:
        np.testing.assert_array_equal(after.correct[task], before.correct[task])
        np.testing.assert_array_equal(after.pictures[task], before.pictures[task])


def test_a_stored_run_takes_a_bit_a_question(tmp_path: Path) -> None:
    """14 tasks of 2,000 questions: 28,000 bits are 3.5 kB, 4.7 kB in base64; 200 runs stay below 3 MB."""
    made("a", {f"task {i}": 0.5 for i in range(14)}, count=2000).save(tmp_path / "r.json")
    assert (tmp_path / "r.json").stat().st_size < 10_000


def test_only_the_same_questions_are_compared() -> None:
    with pytest.raises(MBQError, match="different questions"):
        made("a", SHARES).minus(made("b", SHARES, digest="other"))


def test_difference_is_of_means_over_the_tasks_asked_for() -> None:
    first, second = made("a", SHARES), made("b", SHARES, seed=1)
    expected = np.mean([first.correct[task].mean() - second.correct[task].mean() for task in ("arms", "colour")])
    found = first.minus(second, ("arms", "colour"))
    assert found.estimate == pytest.approx(expected)
    assert found.low < expected < found.high


def test_the_table_shows_every_task_mean_and_difference() -> None:
    first, second = made("float", SHARES), made("quantized", SHARES, seed=1)
    out = io.StringIO()
    Console(file=out, width=80).print(results_table([first, second]))
    text = out.getvalue()
    for task in SHARES:
        line = next(line for line in text.splitlines() if line.split()[:1] == [task])
        shares = [100 * result.correct[task].mean() for result in (first, second)]
        assert [float(word) for word in line.split() if re.fullmatch(r"[\d.]+", word)] == pytest.approx(
            shares, abs=0.051
        )
    gain = 100 * second.minus(first, first.image_tasks).estimate
    assert f"{gain:+.1f} ±" in text


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and four questions of two tasks about two pictures in a file."""
    folder = tmp_path_factory.mktemp("evaluate")
    tiny.save("internvl", folder / "models" / "internvl")
    for i in range(2):
        tiny.picture(i).save(folder / f"{i}.png")
    rows = [
        {
            "task": task,
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": f"{i}.png"}, {"type": "text", "text": "What?"}],
                },
                {"role": "assistant", "content": "Yellow."},
            ],
        }
        for task in ("colour", "star")
        for i in range(2)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_run_prints_a_table_and_stores_results(folders: Path, tmp_path: Path) -> None:
    import mbq

    model = folders / "models" / "internvl"
    mbq.quantize(model, method="rtn", output=tmp_path / "rtn")
    out = io.StringIO()
    data = folders / "questions.jsonl"
    found = run(
        tmp_path / "rtn", baseline=model, data=data, output=tmp_path / "stored", console=Console(file=out, width=80)
    )
    assert [result.model for result in found] == ["internvl", "rtn"]
    assert found[0].tasks == ("colour", "star")
    assert "less internvl" in out.getvalue()
    stored = Results.load(tmp_path / "stored" / "rtn" / "results.json")
    assert stored.correct["star"].tolist() == found[1].correct["star"].tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["chess"]}, "Unknown task 'chess'; choose from colour, star"),
        ({"limit": 0}, "--limit is 0"),
        ({"data": None, "tasks": ["chess"]}, "Unknown task 'chess'; choose from house"),
        ({"data": None, "images": "pictures"}, "--images belongs to --data"),
        ({"images": "models"}, "0.png does not exist"),
    ],
)
def test_mistakes_are_sentences(folders: Path, options: dict, message: str) -> None:
    data = folders / "questions.jsonl"
    if options.get("images") == "models":
        options = {**options, "images": folders / "models"}
    with pytest.raises(MBQError, match=message):
        run(folders / "models" / "internvl", **{"data": data, **options})


def test_benchmark_measures_once_and_writes_the_page(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "STORED", tmp_path / "stored")
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    monkeypatch.setattr(bench, "PAGE", tmp_path / "results.md")
    monkeypatch.setattr(bench, "SAMPLES", 3)
    arguments = ["--models", str(folders / "models"), "--families", "internvl", "--schemes", "W3A16", "W4A8"]
    arguments += ["--methods", "rtn", "awq", "mbq-mae", "--device", "cpu", "--per-task", "4"]
    arguments += ["--seeds", "0", "1"]
    monkeypatch.setattr(bench, "CALIBRATIONS", {"captions": ("colour",), "questions": ("count", "colour")})
    bench.main(arguments)
    files = sorted(path.relative_to(tmp_path / "stored").as_posix() for path in (tmp_path / "stored").rglob("*.json"))
    each = ["awq-0", "awq-1", "mbq-mae-0", "mbq-mae-1", "rtn-0"]
    assert files == [
        *(f"internvl/{scheme}-{name}.json" for scheme in ("W3A16", "W4A8") for name in each),
        "internvl/float.json",
        *(f"questions/internvl/{scheme}-{name}.json" for scheme in ("W3A16", "W4A8") for name in each[:-1]),
    ]
    text = (tmp_path / "results.md").read_text()
    assert text.count("### InternVL, W") == 2
    assert text.count("- InternVL at W3A16: MBQ has") == 2
    assert "## What MBQ gains, calibrated on questions" in text
    again = []
    monkeypatch.setattr(bench, "measure", lambda run, *rest: again.append(run))
    bench.main(arguments)
    assert again == []
    assert (tmp_path / "results.md").read_text() == text
    (tmp_path / "stored/internvl/W4A8-awq-1.json").write_text(
        (tmp_path / "stored/internvl/W4A8-awq-1.json").read_text().replace('"seed": 1', '"seed": 7')
    )
    bench.main(arguments)
    assert [(run.scheme, run.method, run.seed) for run in again] == [("W4A8", "awq", 1)]


def test_the_page_states_the_figures_of_the_stored_runs(tmp_path: Path) -> None:
    folder = tmp_path / "internvl"
    folder.mkdir()
    made("float", SHARES).save(folder / "float.json")
    found = {}
    for method, share, seeds in (("rtn", 0.5, 1), ("awq", 0.3, 2), ("mbq-mae", 0.7, 2)):
        for seed in range(seeds):
            found[method, seed] = made(method, dict.fromkeys(SHARES, share), seed=seed, num_calibration_samples=128)
            found[method, seed].save(folder / f"W3A16-{method}-{seed}.json")
    text = page(tmp_path, ["internvl", "qwen2_vl"], ["W3A16"])
    assert not [line for line in text.splitlines() if "Qwen2-VL" in line and line.startswith(("|", "- Qwen", "#"))]
    image = ("arms", "colour")
    mean = {
        method: np.mean(
            [result.correct[task].mean() for (name, _), result in found.items() if name == method for task in image]
        )
        for method in ("rtn", "awq", "mbq-mae")
    }
    sentence = next(line for line in text.splitlines() if line.startswith("- InternVL at W3A16"))
    by_seed = [
        np.mean([found["mbq-mae", s].correct[task].mean() - found["awq", s].correct[task].mean() for task in image])
        for s in range(2)
    ]
    wanted = [mean["mbq-mae"], mean["awq"], mean["mbq-mae"] - mean["awq"], *by_seed]
    shown = re.search(r"MBQ has (\S+) % right, more than AWQ's (\S+) % \((\S+) \(.*?by draw (\S+), (\S+)\)", sentence)
    assert shown is not None
    assert [float(figure) for figure in shown.groups()] == pytest.approx([100 * value for value in wanted], abs=0.051)
    towns = next(line for line in text.splitlines() if line.startswith("| towns"))
    assert f"{100 * found['rtn', 0].correct['towns'].mean():.1f} (" in towns
