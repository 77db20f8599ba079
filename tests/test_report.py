"""What the report says, against the data that it is made from; how it looks is tests/test_report_page.py's."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import mbq
from mbq.cli import app
from mbq.equalization import ALPHAS
from mbq.errors import MBQError
from mbq.evaluation.runs import Run
from mbq.report import making, report
from mbq.report import questions as questions_module
from mbq.report.accuracy import accuracy_panel, accuracy_table, comparisons, flips, history_panel
from mbq.report.charts import VERDICTS
from mbq.report.making import diagnosis, diagnosis_panel, search_panel, sensitivity_panel
from mbq.report.page import HERE, SCRIPTS, page, recipes
from mbq.report.pictures import LONGEST_SIDE, Pictures
from mbq.report.questions import questions
from mbq.report.serving import serving
from mbq.report.subjects import Subject, read_subjects
from mbq.report.wording import NOTHING
from mbq.sensitivity import Sensitivity, ratios
from tests.report_folders import HOSTILE, SENSITIVITY, TASKS, WRONG, put, search_rows, write_records, write_runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_runs(tmp_path_factory.mktemp("report") / "runs")


@pytest.fixture(scope="module")
def subjects(runs: Path) -> list[Subject]:
    return read_subjects([runs])


def folder(subject_path: Path) -> list[Subject]:
    return read_subjects([subject_path])


def rows_of(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return spec["data"]["values"]


@pytest.mark.parametrize("floor", [None, 0.01])
def test_ratios_are_those_that_the_search_weighs_by(floor: float | None, tmp_path: Path) -> None:
    panel = sensitivity_panel(folder(write_records(tmp_path / "model", floor=floor)))
    assert panel is not None
    wanted = ratios(Sensitivity.from_json(SENSITIVITY), floor)
    drawn = {
        (row["part"], row["block"]): row["value"]
        for row in rows_of(panel.charts[1].spec)
        if row["series"] == "raised to the floor"
    }
    assert drawn == {(part, block): value for part, values in wanted.items() for block, value in enumerate(values)}


def test_gradients_are_drawn_and_tabled(tmp_path: Path) -> None:
    panel = sensitivity_panel(folder(write_records(tmp_path / "model")))
    assert panel is not None
    drawn = {(row["series"], row["part"], row["block"]): row["value"] for row in rows_of(panel.charts[0].spec)}
    assert drawn == {
        (side, part, block): value
        for side in ("language", "vision")
        for part, values in SENSITIVITY[side].items()
        for block, value in enumerate(values)
    }
    [table] = panel.tables
    assert len(table.rows) == 8
    assert table.rows[1] == ["model", "attention", "1", "0.001", "3e-05", "0.03", "0.00375", "0.03"]
    assert any("block 3" in note for note in panel.notes), "what a logarithmic axis cannot show is said"


def test_the_search_is_drawn_with_the_alphas_that_it_has(tmp_path: Path) -> None:
    assert [step / making.ALPHA_STEPS for step in range(making.ALPHA_STEPS)] == list(ALPHAS)
    panel = search_panel(folder(write_records(tmp_path / "model")))
    assert panel is not None
    for cell, row in zip(rows_of(panel.charts[0].spec), search_rows(), strict=True):
        assert (cell["block"], cell["group"], cell["alpha"]) == (row["block"], row["group"], row["alpha"])
        assert cell["loss"] == (None if row["alpha"] is None else min(row["losses"]))
    assert panel.readout["2\x1fo"] == f"Block 2, o: {HOSTILE}."
    assert panel.readout["1\x1fqkv"] == "Block 1, qkv: alpha 0.15, loss 1 (1.09 at alpha 0)."


def test_a_diagnosis_is_shown_with_what_it_found(tmp_path: Path) -> None:
    subjects = folder(write_records(tmp_path / "model"))
    panel = diagnosis_panel(subjects)
    assert panel is not None
    drawn = {
        (row["error"], row["part"], row["block"], row["series"]): row["value"] for row in rows_of(panel.charts[0].spec)
    }
    wanted = {}
    for block in (subjects[0].records.diagnosis or {})["blocks"]:
        for kind, errors in (("accumulated", block), ("own", block["own"])):
            for part in ("attn", "mlp"):
                for series, value in errors[part].items():
                    if value is not None:
                        wanted[kind, part, block["block"], series] = value
    assert drawn == wanted
    found = diagnosis(subjects[0])
    assert [finding["title"] for finding in found.findings] == ["Block 2 jumps"]
    assert found.answers is not None
    assert found.answers.rows == [
        ["repetition", "2", "1", "one n-gram over and over"],
        ["no output", "0", NOTHING, NOTHING],
    ]


def test_accuracy_is_that_of_the_runs(runs: Path, subjects: list[Subject]) -> None:
    [comparison] = comparisons(subjects)
    assert [subject.label for subject in comparison.subjects] == ["float", "W3A16-mbq", "W3A16-rtn"]
    table = accuracy_table(comparison)
    assert [row[0] for row in table.rows] == [
        "shapes",
        "colours",
        "mean of 2 image tasks",
        "less float",
        "sums",
        "mean of 1 text task",
        "less float",
    ]
    for column, name in enumerate(WRONG, start=1):
        results = Run.load(runs / name).results
        assert results is not None
        assert table.rows[0][column] == results.accuracy("shapes").percent()
        assert table.rows[2][column] == results.mean(["shapes", "colours"]).percent()


def test_lost_and_gained_are_counted(subjects: list[Subject]) -> None:
    [comparison] = comparisons(subjects)
    before = {(task, index) for task, wrong in WRONG["float"].items() for index in wrong}
    for subject in comparison.others:
        after = {(task, index) for task, wrong in WRONG[subject.label].items() for index in wrong}
        assert flips(subject, comparison.baseline) == (len(after - before), len(before - after))


def test_verdicts_follow_the_intervals(subjects: list[Subject]) -> None:
    panel = accuracy_panel(comparisons(subjects)[0])
    rows = rows_of(panel.charts[1].spec)
    assert len(rows) == 2 * len(TASKS)
    for row in rows:
        wanted = VERDICTS[0] if row["high"] < 0 else VERDICTS[2] if row["low"] > 0 else VERDICTS[1]
        assert row["verdict"] == wanted
        assert row["low"] <= row["difference"] <= row["high"]
    assert {row["verdict"] for row in rows} > {VERDICTS[0]}


def test_questions_stand_with_what_every_model_wrote(subjects: list[Subject]) -> None:
    [comparison] = comparisons(subjects)
    found = questions(comparison, Pictures())
    assert (
        found.known == len(found.shown) == len({(t, i) for w in WRONG.values() for t, each in w.items() for i in each})
    )
    for question in found.shown:
        index = int(question.reference.removeprefix("answer "))
        for said in question.said:
            right = index not in WRONG[said.label].get(question.task, set())
            assert said.right == right
            assert said.text == (f"answer {index}" if right else f"{HOSTILE} of {said.label}")
        for name, direction in question.directions.items():
            before, after = (index not in WRONG[model].get(question.task, set()) for model in ("float", name))
            wanted = {(True, False): "lost", (False, True): "gained", (False, False): "wrong", (True, True): "right"}
            assert direction == wanted[before, after]


def test_of_many_questions_some_of_every_task_are_shown(
    subjects: list[Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(questions_module, "MOST", 6)
    found = questions(comparisons(subjects)[0], Pictures())
    assert found.known > 6
    assert [question.task for question in found.shown].count("shapes") == 2
    assert {question.task for question in found.shown} == set(TASKS)
    assert all({"lost", "gained"} & set(question.directions.values()) for question in found.shown)
    assert "6 of them are here" in " ".join(page(subjects).split())


def test_pictures_are_small_copies_of_pixels_alone(tmp_path: Path) -> None:
    picture = Image.effect_noise((1600, 900), 80).convert("RGB")
    exif = Image.Exif()
    exif[0x010E] = "taken at home"
    picture.save(tmp_path / "photo.jpg", exif=exif)
    kept = Pictures()
    assert kept.number(tmp_path, "photo.jpg") == 0
    assert kept.number(tmp_path, "photo.jpg") == 0, "the same picture is in the page once"
    data = base64.b64decode(kept.addresses[0].removeprefix("data:image/webp;base64,"))
    with Image.open(io.BytesIO(data)) as copy:
        assert max(copy.size) == LONGEST_SIDE
        assert copy.size == kept.sizes[0]
        assert not copy.getexif()
    assert b"taken at home" not in data


def test_pictures_have_a_budget_and_are_never_anything_else(tmp_path: Path) -> None:
    for number in range(3):
        Image.effect_noise((300, 300), 90).save(tmp_path / f"{number}.png")
    (tmp_path / "page.png").write_text("<svg onload=alert(1)>")
    one = Pictures()
    one.number(tmp_path, "0.png")
    kept = Pictures(budget=int(1.5 * len(one.addresses[0])))
    numbers = [kept.number(tmp_path, name) for name in ("0.png", "1.png", "2.png", "page.png", "missing.png")]
    assert numbers == [0, None, None, None, None]
    assert kept.left_out == 4
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "link.png").symlink_to(tmp_path / "1.png")
    assert Pictures().number(tmp_path / "run", "link.png") is None
    assert len(kept.addresses) == 1


def test_nothing_that_files_say_becomes_markup(runs: Path, tmp_path: Path) -> None:
    model = write_records(tmp_path / "evil <b> name")
    (model / "recipe.yaml").write_text(
        "scheme: W3A16\nmethod: mbq\nmodel: '<script>window.harmed = 1</script>'\n'<i>option</i>': '</script><b>'\n"
    )
    rows = search_rows()
    rows[0]["group"] = HOSTILE
    put(model / "search.json", rows)
    html = page(read_subjects([runs, model]))
    scripts = [hashlib.sha256(_text(name).encode()).digest() for name in SCRIPTS]
    running = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert [hashlib.sha256(script.encode()).digest() for script in running] == scripts
    for piece in ("<script>window", "onerror='", "<i>option", "<b> name", "<img src=x"):
        assert piece not in html
    for script in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', html, re.DOTALL):
        json.loads(script)


def test_the_policy_names_every_script_and_no_place(runs: Path) -> None:
    html = page(read_subjects([runs]))
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)
    policy = policy.replace("&#39;", "'")
    assert policy.startswith("default-src 'none';")
    for name in SCRIPTS:
        assert f"'sha256-{base64.b64encode(hashlib.sha256(_text(name).encode()).digest()).decode()}'" in policy
    assert "http" not in policy
    assert "'unsafe-eval'" not in policy
    assert "script-src 'unsafe-inline'" not in policy
    markup = re.sub(r"<script.*?</script>|<style.*?</style>", "", html, flags=re.DOTALL)
    assert not re.findall(r'(?:src|href|action)="(?!#)[^"]*"', markup)


def _text(name: str) -> str:
    text = (HERE / name).read_text(encoding="utf-8")
    return "\n".join(line for line in text.split("\n") if not line.startswith("//# sourceMappingURL")).strip()


def test_a_models_folder_and_its_run_are_one(runs: Path) -> None:
    models = runs.parent / "models"
    found = read_subjects([models / "W3A16-mbq", models / "W3A16-rtn", runs])
    assert [subject.label for subject in found] == ["float", "W3A16-mbq", "W3A16-rtn"]
    assert all(subject.run is not None for subject in found)


def test_runs_of_one_name_are_told_apart_and_make_a_history(runs: Path, tmp_path: Path) -> None:
    later = tmp_path / "later" / "W3A16-mbq"
    later.parent.mkdir()
    shutil.copytree(runs / "W3A16-mbq", later)
    info = json.loads((later / "run.json").read_text())
    put(later / "run.json", {**info, "created": "2026-02-01T00:00:00+00:00"})
    found = read_subjects([runs, later])
    assert [subject.label for subject in found] == [
        "float",
        "W3A16-mbq (2026-01-03 00:00)",
        "W3A16-rtn",
        "W3A16-mbq (2026-02-01 00:00)",
    ]
    panel = history_panel(comparisons(found))
    assert panel is not None
    drawn = {(row["name"], row["created"][:10], row["kind"]) for row in rows_of(panel.charts[0].spec)}
    assert drawn == {
        ("W3A16-mbq", day, kind) for day in ("2026-01-03", "2026-02-01") for kind in ("image tasks", "text tasks")
    }


def test_other_questions_are_another_comparison(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "W3A16-mbq", tmp_path / "other")
    content = json.loads((tmp_path / "other" / "results.json").read_text())
    put(tmp_path / "other" / "results.json", {**content, "questions": "others"})
    found = comparisons(read_subjects([runs, tmp_path / "other"]))
    assert [len(each.subjects) for each in found] == [3, 1]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("recipe.yaml", "[1, 2]"),
        ("recipe.yaml", "a: [unclosed"),
        ("sensitivity.json", '{"vision": {}}'),
        ("sensitivity.json", "[" * 100_000),
        ("sensitivity.json", '{"vision": {"attn": [1], "mlp": [1]}, "language": {"attn": [0], "mlp": [1]}}'),
        ("search.json", '[{"block": "x"}]'),
        ("search.json", '{"block": 0}'),
        ("diagnosis.json", '{"blocks": [5]}'),
        ("measurements.json", '{"seconds": {"load": "long"}}'),
        ("search.json", "\ud800".encode("utf-8", "surrogatepass")),
    ],
)
def test_a_damaged_record_is_a_sentence(file: str, content: str | bytes, tmp_path: Path) -> None:
    model = write_records(tmp_path / "model")
    (model / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(MBQError, match=file):
        report([model], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_what_is_no_run_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(MBQError, match=r"holds no run\.json"):
        read_subjects([tmp_path])
    with pytest.raises(MBQError, match="is no folder"):
        read_subjects([tmp_path / "nowhere"])


def test_only_a_report_is_replaced(tmp_path: Path) -> None:
    model, target = write_records(tmp_path / "model"), tmp_path / "page.html"
    report([model], target)
    first = target.read_bytes()
    assert report([model], target).read_bytes() == first
    target.write_text("my thesis")
    with pytest.raises(MBQError, match="is no report of mbq"):
        report([model], target)
    assert target.read_text() == "my thesis"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "page.html"]


def test_half_a_character_in_an_answer_is_written(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "float", tmp_path / "float")
    lines = (tmp_path / "float/answers.jsonl").read_text().splitlines()
    wrong = next(answer for answer in map(json.loads, lines) if not answer["right"])
    broken = {**wrong, "answer": "half \ud83d"}
    (tmp_path / "float/answers.jsonl").write_text(json.dumps(broken) + "\n")
    assert "half ?" in report([tmp_path / "float"], tmp_path / "page.html").read_text("utf-8")


def test_the_recipe_marks_what_was_chosen(tmp_path: Path) -> None:
    found = recipes(folder(write_records(tmp_path / "model", seed=7)))
    default = {option.name: option.default for option in found["options"]}
    assert not default["seed"]
    assert default["norm"]
    assert default["group_size"], "128, which the scheme has by itself"
    assert "versions" not in default


CARD = """---
license: mit
---

# A model

## Load it

With `mbq`, <script>window.harmed = 1</script>:

```python
model = mbq.load("a<b")
## no heading
```

### vLLM

See [this](javascript:alert(1)) ![and](https://elsewhere/picture.png) <https://elsewhere>.

## Results

Not measured yet.
"""


def test_how_to_run_it_is_what_the_card_says(tmp_path: Path) -> None:
    write_records(tmp_path / "a")
    (write_records(tmp_path / "b") / "README.md").write_text(CARD)
    [(label, html)] = serving(read_subjects([tmp_path / "a", tmp_path / "b"])).items()
    assert label == "b"
    assert "<code>mbq</code>" in html
    assert "mbq.load(&quot;a&lt;b&quot;)\n## no heading" in html
    assert "<h3>vLLM</h3>" in html
    assert not re.findall(r"<(?:script|a|img)\b", html)
    assert "Load it" not in html
    assert "Not measured" not in html


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


@pytest.mark.parametrize("theme", range(3))
def test_colours_can_be_told_apart(theme: int) -> None:
    """WCAG 2.2: text 4.5 to 1 on what lies behind it, lines and marks of charts 3 to 1. Light, dark, dark by hand."""
    css = (HERE / "templates/page.css").read_text()
    block = re.findall(r":root[^{]*\{([^}]*--paper[^}]*)\}", css)[theme]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
    pairs = [
        (text, back, 4.5) for text in ("ink", "soft", "link", "lost", "gained") for back in ("sheet", "tint", "paper")
    ]
    pairs += [("band-ink", "band", 4.5), ("band-soft", "band", 4.5), ("edge", "sheet", 3.0)]
    pairs += [
        (mark, "sheet", 3.0) for mark in colours if mark in ("language", "vision", "accent") or mark[:4] == "step"
    ]
    for front, back, least in pairs:
        high, low = sorted((luminance(colours[front]), luminance(colours[back])), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= least, (front, back)


def test_both_ways_to_dark_are_the_same_colours() -> None:
    blocks = re.findall(r":root[^{]*\{([^}]*--paper[^}]*)\}", (HERE / "templates/page.css").read_text())
    assert blocks[1].split() == blocks[2].split()


def test_charts_come_with_their_licences() -> None:
    licences = (HERE / "vendor/LICENSES.txt").read_text()
    for name in ("vega", "vega-lite", "vega-embed", "d3"):
        assert re.search(rf"^{name} \d", licences, re.MULTILINE)


def test_quantize_writes_a_page_about_what_it_found(
    float_folder: Callable[[str], Path], options: dict[str, Any], tmp_path: Path
) -> None:
    made = mbq.quantize(float_folder("qwen2_vl"), output=tmp_path / "model", **options, group_size=32)
    html = (tmp_path / "model" / "report.html").read_text("utf-8")
    assert "<title>qwen2_vl, W3A16 by MBQ</title>" in html
    assert "`report.html`" in (tmp_path / "model" / "README.md").read_text()
    took = json.loads((tmp_path / "model" / "measurements.json").read_text())
    assert (took["bytes"]["before"], took["bytes"]["after"]) == (made.bytes_before, made.bytes_after)
    steps = {step: seconds for step, seconds in made.seconds.items() if step != "write"}
    assert took["seconds"] == pytest.approx(steps, abs=1e-3)
    assert took["peak_memory"]["process"] > took["bytes"]["before"]
    assert took["resumed"] is False
    for sentence in ("mbq generate model --image", "<h3>transformers</h3>", "<h3>vLLM</h3>"):
        assert sentence in html, "the card's section on loading"
    again = report([tmp_path / "model"], tmp_path / "again.html").read_text("utf-8")
    assert again == html, "the page of a folder is that of its files"


def test_the_page_can_be_left_out(float_folder: Callable[[str], Path], tmp_path: Path) -> None:
    made = mbq.quantize(
        float_folder("qwen2_vl"), method="rtn", output=tmp_path / "model", report=False, group_size=32, device="cpu"
    )
    assert made.folder is not None
    assert not (tmp_path / "model" / "report.html").exists()
    assert "report.html" not in (tmp_path / "model" / "README.md").read_text()


def test_the_command(runs: Path, tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    models = runs.parent / "models"
    done = CliRunner().invoke(app, ["report", str(models / "W3A16-mbq"), str(runs), "-o", str(target)])
    assert (done.exit_code, done.output) == (0, f"Wrote {target}.\n")
    assert target.read_text("utf-8") == page(read_subjects([models / "W3A16-mbq", runs]))
    refused = CliRunner().invoke(app, ["report", str(tmp_path / "nowhere"), "-o", str(tmp_path / "other.html")])
    assert refused.exit_code == 2
    assert "is no folder" in refused.output
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
