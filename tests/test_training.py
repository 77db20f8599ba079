"""The training's fast path is the model's own function, and a run that is cut off goes on where it was."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from mbq.qtensor import fake_quantize
from mbq.scheme import SCHEMES
from mbq.world import TASKS
from mbq.world.scene import LOWEST_NUMBER, cells, paint, sample_scenes, sprites
from training import pretraining
from training import train as training
from training.build import BUILDERS, build
from training.data import IGNORED, BatchMaker, cell_contents
from training.fast import FastModel

CPU = torch.device("cpu")
COUNTS = {"motto": 1, "caption": 1, "charge": 2, "towns": 4, "arithmetic": 2}


@pytest.mark.parametrize("family", BUILDERS)
def test_fast_batches_and_forward_equal_the_processor_and_the_model(family: str):
    """Same token ids, same pixels, same logits as one row at a time through the real processor and model."""
    model, processor = build(family)
    model.eval()
    maker = BatchMaker(COUNTS, processor, CPU)
    fast = FastModel(family, model, processor, maker.length)
    batch = maker.make(1, "train", torch.Generator().manual_seed(0))[0]
    with torch.no_grad():
        logits = fast(batch.tokens, batch.cells, maker.label_rows, maker.label_positions)
    row = 0
    for share, template in zip(maker.shares, maker.templates, strict=True):
        for _ in range(share.count):
            ids = batch.tokens[row, : template.length]
            text = processor.tokenizer.decode(ids)
            pictures = None
            if share.needs_image:
                pictures = [Image.fromarray(paint(batch.cells[row : row + 1], sprites())[0].numpy())]
                opening, rest = text.split("user\n", 1)
                rest = rest[max(rest.rfind(mark) + len(mark) for mark in ("</img>\n", "<image>\n", "<|vision_end|>")) :]
                turn = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])
                placeholder = turn.split("user\n")[1].removesuffix("<|im_end|>\n")
                text = f"{opening}user\n{placeholder}{rest}"
            inputs = processor(text=[text], images=pictures, return_tensors="pt")
            assert inputs["input_ids"][0].tolist() == ids.tolist()
            with torch.no_grad():
                expected = model(**inputs).logits[0]
            mine = maker.label_rows[: maker.labels] == row
            got, where = logits[: maker.labels][mine], maker.label_positions[: maker.labels][mine]
            torch.testing.assert_close(got, expected[where], rtol=1e-4, atol=1e-5)
            row += 1


def test_the_contents_of_cells_are_those_of_their_scenes():
    scenes = sample_scenes(50, "train", torch.Generator().manual_seed(0))
    left, right, base, plate = (
        cell_contents()[cells(scenes)].view(50, 2, 2, 2, 2, 4).permute(2, 4, 0, 1, 3, 5).flatten(0, 1)
    )
    nothing = torch.full((50, 4), IGNORED)
    for side, cell in enumerate((left, right)):
        expected = [scenes.charges[..., side], scenes.fields[..., side], nothing, nothing]
        assert torch.equal(cell.reshape(50, 4, 4), torch.stack(expected, dim=-1))
    assert torch.equal(base.reshape(50, 4, 4), torch.stack([nothing, scenes.base, scenes.pattern, nothing], dim=-1))
    number = scenes.number - LOWEST_NUMBER
    assert torch.equal(plate.reshape(50, 4, 4), torch.stack([nothing, scenes.base, scenes.pattern, number], dim=-1))


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "LOOK", dict.fromkeys(training.LOOK, 4))
    monkeypatch.setattr(training, "LEARN", dict.fromkeys(training.LEARN, 4))
    monkeypatch.setattr(training, "CAPTION", {"caption": 2})
    monkeypatch.setattr(training, "CHUNK", 2)
    monkeypatch.setattr(pretraining, "SEE_STEPS", 1)


@pytest.mark.parametrize(("objective", "family"), [("contrastive", "llava_clip"), ("distillation", "llava_dinov2")])
def test_a_tower_learns_alone_and_then_the_projector(objective: str, family: str, monkeypatch: pytest.MonkeyPatch):
    """With no step of alignment only the tower has changed; with no step before it, only the projector.

    Two steps, because the teacher that the tower becomes is one behind.
    """
    monkeypatch.setattr(pretraining, "PICTURES", 4)
    monkeypatch.setattr(pretraining, "CHUNK", 1)
    model, processor = build(family)
    maker = BatchMaker({"colour": 4}, processor, CPU)
    fast = FastModel(family, model, processor, maker.length)
    for part, steps in (("model.vision_tower.", (2, 0)), ("model.multi_modal_projector.", (0, 1))):
        monkeypatch.setattr(pretraining, "SEE_STEPS", steps[0])
        monkeypatch.setattr(pretraining, "ALIGN_STEPS", steps[1])
        before = copy.deepcopy(model.state_dict())
        pretraining.OBJECTIVES[objective](fast, processor, maker, torch.Generator().manual_seed(0))
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert changed
        assert all(name.startswith(part) for name in changed)
        assert all(parameter.grad is None for parameter in model.parameters())


def test_targets_of_a_teacher_use_all_prototypes_alike():
    """However alike the scores are: rows are distributions, columns weigh the same, and the best stays the best."""
    scores = 0.9 + 0.1 * torch.rand(64, 8, generator=torch.Generator().manual_seed(0))
    shares = pretraining.balanced(scores, rounds=50)
    torch.testing.assert_close(shares.sum(1), torch.ones(64))
    torch.testing.assert_close(shares.sum(0), torch.full((8,), 8.0), rtol=1e-3, atol=1e-3)
    centred = (scores / pretraining.SHARP).softmax(1)
    column = shares[:, 0] / shares[:, 1] / (centred[:, 0] / centred[:, 1])
    torch.testing.assert_close(column, column[:1].expand(64), rtol=1e-3, atol=1e-3)  # two columns are only reweighted


@pytest.mark.usefixtures("small_batches")
def test_the_cost_of_rounding_is_that_of_the_image_tasks():
    model, processor = build("qwen2_vl")
    stream = training.Stream(processor, CPU, 0, training.FROM_SCRATCH)
    makers = [stream.makers["learn"], stream.makers["caption"]]
    fast = FastModel("qwen2_vl", model, processor, max(maker.length for maker in makers))
    scores = iter(
        [dict.fromkeys(TASKS, 90.0), {name: 60.0 if task.needs_image else 0.0 for name, task in TASKS.items()}]
    )
    weights = []

    def accuracy(*args: object) -> dict[str, float]:
        weights.append(model.model.language_model.layers[0].mlp.up_proj.weight.clone())
        return next(scores)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "accuracy", accuracy)
        assert training.rounding_cost(model, fast, makers) == (90.0, 30.0)
    assert torch.equal(weights[1], fake_quantize(weights[0], SCHEMES["W3A16"].weights))
    assert torch.equal(model.model.language_model.layers[0].mlp.up_proj.weight, weights[0])


@pytest.mark.usefixtures("small_batches")
def test_a_run_stops_where_rounding_costs_what_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Looked at only while the learning rate falls: the last 40 % of 10 steps."""
    monkeypatch.setattr(training, "COST_STEPS", 1)
    looks = iter([(50.0, 9.0), (98.0, 25.0), (98.0, 22.0)])
    monkeypatch.setattr(training, "rounding_cost", lambda *args: next(looks))
    training.train("qwen2_vl", tmp_path / "model", 10, device=CPU, cost=23.0)
    log = [json.loads(line) for line in (tmp_path / "model" / "training_log.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["cost"]) for entry in log if "cost" in entry] == [(7, 9.0), (8, 25.0), (9, 22.0)]
    assert {entry["step"] for entry in log if "scheme" in entry} == {9}


@pytest.mark.usefixtures("small_batches")
def test_a_run_that_was_cut_off_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(training, "write_checkpoint", cut_off_at(3, training.write_checkpoint))
    output = tmp_path / "model"
    with pytest.raises(KeyboardInterrupt):
        training.train("qwen2_vl", output, 5, device=CPU)
    assert not output.exists()
    monkeypatch.setattr(training, "write_checkpoint", lambda *args, **state: None)
    training.train("qwen2_vl", output, 5, resume=True, device=CPU)
    log = [json.loads(line) for line in (output / "training_log.jsonl").read_text().splitlines()]
    steps = [entry["step"] for entry in log if "loss" in entry]
    assert steps == sorted(set(steps))
    assert steps[-1] == 5
    assert not output.with_name("model.checkpoint.pt").exists()


def cut_off_at(step: int, write):
    def writing(path: Path, **state) -> None:
        write(path, **state)
        if state["step"] == step:
            raise KeyboardInterrupt

    return writing
