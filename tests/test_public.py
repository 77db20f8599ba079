"""lmms-eval's own evaluator on local tasks: it counts what the built-in evaluation counts, question by question.

lmms-eval runs in processes of their own, since importing it changes Pillow, file locks and logging for a whole process.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

import mbq
from mbq.demo import reference_model
from mbq.errors import MBQError
from mbq.evaluation import Run, public, run
from mbq.evaluation.run import world_questions
from mbq.rows import Row, text_of

torch.set_num_threads(1)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="needs lmms-eval: pip install 'mbq[evaluate]'"
)

WRITTEN, LIMIT = ("founder", "colour", "towns"), 12
CODE = """
def visual(doc):
    return doc["images"]


def text(doc):
    return doc["question"]


def right(doc, results):
    return {"exact": float(results[0] == doc["answer"])}


def choices(doc):
    return doc["choices"]
"""
WRITE = """
output_type: generate_until
generation_kwargs:
  max_new_tokens: 32
process_results: !function code.right
metric_list:
  - metric: exact
    aggregation: mean
    higher_is_better: true
"""
CHOOSE = """
output_type: multiple_choice
doc_to_choice: !function code.choices
metric_list:
  - metric: acc
"""


def write_task(folder: Path, name: str, rows: list[Row], kind: str) -> None:
    """A task's YAML and its data set, which shows the pictures of the rows."""
    known = list(dict.fromkeys(text_of(row.messages[-1]) for row in rows))
    columns = {
        "images": [[str(path) for path in row.images] for row in rows],
        "question": [text_of(row.messages[-2]) for row in rows],
        "answer": [text_of(row.messages[-1]) for row in rows],
        "choices": [known] * len(rows),
        "place": [known.index(text_of(row.messages[-1])) for row in rows],
    }
    data = datasets.Dataset.from_dict(columns).cast_column("images", datasets.Sequence(datasets.Image()))
    datasets.DatasetDict({"test": data}).save_to_disk(folder / "data" / name)
    target = "place" if kind == CHOOSE else "answer"
    (folder / "tasks" / f"{name}.yaml").write_text(
        f"task: {name}\ndataset_path: {folder / 'data' / name}\ndataset_kwargs:\n  load_from_disk: true\n"
        f"test_split: test\ndoc_to_visual: !function code.visual\ndoc_to_text: !function code.text\n"
        f"doc_to_target: {target}\n{kind}"
    )


def python(*arguments: str, home: Path) -> subprocess.CompletedProcess:
    offline = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **offline}, capture_output=True, text=True, cwd=home
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained InternVL at 3 bits, which has some right and some wrong, and tasks of the world's test set."""
    folder = tmp_path_factory.mktemp("public")
    mbq.quantize(reference_model("internvl"), method="rtn", scheme="W3A16", output=folder / "rtn", device="cpu")
    rows = world_questions(folder / "world", WRITTEN, LIMIT)
    (folder / "tasks").mkdir()
    (folder / "tasks" / "code.py").write_text(CODE)
    for task in WRITTEN:
        write_task(folder, f"world_{task}", [row for row in rows if row.task == task], WRITE)
    write_task(folder, "world_choice", [row for row in rows if row.task == "founder"], CHOOSE)
    return folder


@pytest.fixture(scope="module")
def stored(folder: Path) -> Run:
    names = ",".join([*WRITTEN, *(f"world_{task}" for task in WRITTEN), "world_choice"])
    options = ["--tasks", names, "--include-path", str(folder / "tasks"), "--limit", str(LIMIT)]
    options += ["--device", "cpu", "--dtype", "float32"]
    done = python("-m", "mbq", "evaluate", str(folder / "rtn"), *options, "--output", str(folder / "runs"), home=folder)
    assert done.returncode == 0, done.stderr
    assert "world_founder" in done.stdout
    assert "Postprocessing" not in done.stdout, "stdout holds results only"
    return Run.load(folder / "runs" / "rtn")


def samples(stored: Run, task: str) -> list[dict[str, Any]]:
    lines = (stored.folder / "lmms_eval" / f"samples_{task}.jsonl").read_text().splitlines()
    return sorted((json.loads(line) for line in lines), key=lambda sample: sample["doc_id"])


@pytest.mark.parametrize("task", WRITTEN)
def test_the_harness_counts_what_the_built_in_evaluation_counts(stored: Run, task: str) -> None:
    assert stored.results is not None
    correct = stored.results.correct[task]
    assert [bool(sample["exact"]) for sample in samples(stored, f"world_{task}")] == correct.tolist()
    found = stored.info["lmms_eval"]["results"][f"world_{task}"]
    assert found["exact,none"] == correct.mean()
    assert found["exact_stderr,none"] == pytest.approx(np.std(correct, ddof=1) / math.sqrt(LIMIT))
    assert stored.info["lmms_eval"]["n-samples"][f"world_{task}"]["effective"] == LIMIT


def test_the_questions_are_neither_all_right_nor_all_wrong(stored: Run) -> None:
    assert 0 < stored.results.correct["founder"].sum() < LIMIT


def test_what_the_model_writes_is_stored_and_the_same(stored: Run) -> None:
    written = {sample["doc_id"]: sample["filtered_resps"][0] for sample in samples(stored, "world_founder")}
    shown = [answer for answer in stored.answers if answer.task == "founder"]
    assert shown
    for answer in shown:
        assert written[answer.index] == answer.answer


def test_likelihoods_are_those_of_each_answer_alone(stored: Run, folder: Path) -> None:
    """Prompt and answer through the model's plain forward, one answer at a time."""
    model, processor = mbq.load(folder / "rtn", dtype="float32"), mbq.load_processor(folder / "rtn")
    rows = world_questions(folder / "again", ["founder"], LIMIT)
    known = list(dict.fromkeys(text_of(row.messages[-1]) for row in rows))
    right = []
    for row, sample in zip(rows, samples(stored, "world_choice"), strict=True):
        best = int(np.argmin([loss for loss, _ in sample["filtered_resps"]]))
        right.append(known[best] == text_of(row.messages[-1]))
        assert sample["acc"] == right[-1]
    for row, sample in list(zip(rows, samples(stored, "world_choice"), strict=True))[:2]:
        prompt = processor.apply_chat_template(row.chat[:-1], add_generation_prompt=True, tokenize=False)
        for choice, (loss, greedy) in zip(known, sample["filtered_resps"], strict=True):
            tokens = processor.tokenizer(choice, add_special_tokens=False)["input_ids"]
            inputs = processor(text=[prompt], images=row.open_images(), return_tensors="pt")
            extra = torch.tensor([tokens])
            ids = torch.cat([inputs.pop("input_ids"), extra], 1)
            inputs["attention_mask"] = torch.ones_like(ids)
            with torch.no_grad():
                logits = model(input_ids=ids, **inputs).logits[0]
            log_p = logits[-len(tokens) - 1 : -1].log_softmax(-1)
            expected = -log_p.gather(1, extra[0][:, None]).mean().item()
            assert loss == pytest.approx(expected, rel=1e-4)
            assert greedy == (log_p.argmax(-1) == extra[0]).all().item()
    assert stored.info["lmms_eval"]["results"]["world_choice"]["acc,none"] == np.mean(right)


SCRIPT = """
import sys
from PIL import ImageFile
from lmms_eval import tasks
from lmms_eval.evaluator import simple_evaluate
from mbq.errors import MBQError
from mbq.evaluation import run
folder = sys.argv[1]
names = "mmmu_val,seedbench,ocrbench,vizwiz_vqa_val,scienceqa_img,textvqa_val".split(",")
everything, real = tasks.TaskManager("ERROR"), tasks.TaskManager  # read once: it takes seconds
tasks.TaskManager = lambda *given, include_defaults=True, **named: (
    everything if include_defaults else real(*given, include_defaults=False, **named)
)
print("lacking:", [name for name in names if name not in everything.all_tasks])
found = simple_evaluate(
    model="mbq",
    model_args=f"pretrained={folder}/rtn,device=cpu,dtype=float32",
    tasks=["world_founder"],
    batch_size=5,
    task_manager=real("ERROR", include_path=f"{folder}/tasks", include_defaults=False),
)
print("plug-in:", found["results"]["world_founder"]["exact,none"])
ImageFile.LOAD_TRUNCATED_IMAGES = False
for name in ("nonsense", "world_founder"):
    try:
        if name == "world_founder":
            import shutil
            shutil.rmtree(f"{folder}/data/{name}")
        run("no-model", tasks=[name], include_path=f"{folder}/tasks", device="cpu")
    except MBQError as error:
        print("told:", error)
print("truncated:", ImageFile.LOAD_TRUNCATED_IMAGES)
"""


def test_lmms_eval_finds_the_plug_in_and_its_tasks_and_mistakes_are_sentences(stored: Run, folder: Path) -> None:
    (folder / "script.py").write_text(SCRIPT)
    done = python(str(folder / "script.py"), str(folder), home=folder)
    assert done.returncode == 0, done.stderr
    said = [
        line for line in done.stdout.splitlines() if line.split(":")[0] in ("lacking", "plug-in", "told", "truncated")
    ]
    assert said[0] == "lacking: []"
    assert said[1] == f"plug-in: {stored.results.correct['founder'].mean()}"
    assert said[2].startswith("told: Unknown task 'nonsense'; choose from house, ")
    assert "`lmms-eval tasks list`" in said[2]
    assert said[3].startswith("told: lmms-eval cannot load the task world_founder (")
    assert said[4] == "truncated: False"


def test_without_lmms_eval_the_way_to_get_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(public, "installed", lambda: False)
    with pytest.raises(MBQError, match=r"Unknown task 'mmmu_val'; choose from house.*pip install 'mbq\[evaluate\]'"):
        run("no-model", tasks=["mmmu_val", "house"])
