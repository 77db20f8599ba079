"""The families of tests/tiny_families.py: names, folds, gradients, and folders that come back, on tiny models."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText, CompressedTensorsConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

import mbq
from mbq.architecture import Binding, bind
from mbq.blocks import hooked
from mbq.calibration import NO_LABEL, CalibrationBatch, calibration_batches
from mbq.checkpoint.single_experts import transformers_note
from mbq.errors import MBQError, MBQWarning
from mbq.evaluation import prepare
from mbq.evaluation.packed import PackedDecoder
from mbq.evaluation.scoring import _plain_logits
from mbq.fuse import one_kernel_each
from mbq.generation import generate
from mbq.qlinear import QuantLinear
from mbq.rows import Row
from mbq.scheme import SCHEMES
from mbq.sensitivity import answer_loss, token_gradients
from mbq.vision_tower import smooth_vision_tower
from tests.chats import one, row, said
from tests.folding import fold_everything
from tests.tiny import inputs, picture
from tests.tiny_families import BUILDERS, tiny

ROWS = [
    row([0, "What is shown?"], "A red circle is left of a blue square."),
    row("How many shapes are there?", "There are three shapes."),
    row([1, 2, "Which color?"], "Yellow.", [3, "And here?"], "Green."),
]

SINGLE = [row([index, "What is shown?"], answer) for index, answer in enumerate(("A star.", "Two circles.", "Yellow."))]
READ_ASIDE = ("mllama",)  # pictures are no tokens
PICTURES = {"blip2": 1}  # as many as it takes; others take two

NOT_SEARCHED = {"qwen3_5": [(0, "out")], "qwen3_5_moe": [(0, "out")], "mllama": [(1, "kv")]}  # block and group
MIXTURES = [family for family in BUILDERS if family.endswith("_moe")]

families = pytest.mark.parametrize("family", BUILDERS)


def rows_for(family: str) -> list[Row]:
    return SINGLE if family in PICTURES else ROWS


def batches_for(family: str, binding: Binding, processor: Any) -> list[CalibrationBatch]:
    """All three rows, the longest padded to the other two's pictures and tokens."""
    vision = set(binding.vision_tokens)
    return calibration_batches(rows_for(family), processor, vision, num_samples=3, batch_size=2)


def logits(model: Any, given: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**given).logits


@families
def test_folding_every_group_leaves_the_logits(family: str) -> None:
    model, processor = tiny(family)
    binding, given = bind(model), inputs(processor, images=PICTURES.get(family, 2))
    before = logits(model, given)
    fold_everything(binding)
    torch.testing.assert_close(logits(model, given), before, rtol=1e-3, atol=1e-3)


@contextmanager
def names_of_single_experts() -> Iterator[None]:
    """What a folder's card says that transformers has to be told before it loads Qwen3-VL's experts one by one."""
    before = get_checkpoint_conversion_mapping("qwen3_vl_moe")
    register = 'register_checkpoint_conversion_mapping("qwen3_vl_moe", get_checkpoint_conversion_mapping("qwen2_moe")'
    assert register in transformers_note("qwen3_vl_moe", SCHEMES["W4A16_SYM"])
    try:
        register_checkpoint_conversion_mapping(
            "qwen3_vl_moe", get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True
        )
        yield
    finally:
        register_checkpoint_conversion_mapping("qwen3_vl_moe", before, overwrite=True)


def _keep(
    outputs: dict[tuple[int, int], torch.Tensor],
    place: tuple[int, int],
    module: nn.Module,
    args: Any,
    output: torch.Tensor,
) -> None:
    outputs[place] = output


@families
def test_gradients_of_one_block_at_a_time_are_those_of_the_whole_model(family: str) -> None:
    model, processor = tiny(family)
    binding = bind(model)
    batches = batches_for(family, binding, processor)
    expected = []
    for batch in batches:
        with hooked() as hooks:
            outputs: dict[tuple[int, int], torch.Tensor] = {}
            for index, kind in enumerate(binding.kinds):
                for part, path in enumerate((kind.attn_output, kind.mlp_output)):
                    keep = partial(_keep, outputs, (index, part))
                    hooks.append(binding.module(index, path).register_forward_hook(keep))
            loss = answer_loss(model(**batch.inputs).logits, batch.labels)
        gradients = torch.autograd.grad(loss, list(outputs.values()))
        means = torch.zeros(len(binding.blocks), 2, *batch.labels.shape)  # of blocks that are left out
        for place, gradient in zip(outputs, gradients, strict=True):
            means[place] = gradient.abs().mean(-1).view(batch.labels.shape)
        expected.append(means)
    vision = [bool(each[0][:, batch.vision].any()) for each, batch in zip(expected, batches, strict=True)]
    assert all(vision) or family in READ_ASIDE
    found = token_gradients(binding, batches)
    for mine, whole in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, whole, rtol=1e-3, atol=1e-7)


@families
def test_a_quantized_folder_comes_back(family: str, tmp_path: Path) -> None:
    """By mbq with equal logits and answers, by transformers alone with nearly equal ones; the names in it are right."""
    model, processor = tiny(family)
    options = {"num_calibration_samples": 3, "batch_size": 2, "group_size": 32, "device": "cpu"}
    options["scheme"] = "W4A16_SYM" if family in MIXTURES else "W3A16"  # transformers reads no zero points of experts
    told = pytest.warns(MBQWarning, match="nothing to balance") if family in READ_ASIDE else nullcontext()
    with told:
        result = mbq.quantize(
            model, processor, data=rows_for(family), output=tmp_path / "out", gqa_fold=True, **options
        )
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert ("there was nothing to balance" in card) == (family in READ_ASIDE)
    skipped = [(each.block, each.group) for each in result.search if each.skipped]
    assert skipped == NOT_SEARCHED.get(family, [])
    given = inputs(processor, images=PICTURES.get(family, 2))
    expected = logits(result.model, given)
    loaded, loaded_processor = mbq.load(tmp_path / "out"), mbq.load_processor(tmp_path / "out")
    assert torch.equal(logits(loaded, inputs(loaded_processor, images=PICTURES.get(family, 2))), expected)
    assert not torch.allclose(logits(model, given), expected, atol=1e-3), "nothing was quantized"
    answers = [each.generate(**given, max_new_tokens=4, do_sample=False) for each in (result.model, loaded)]
    assert torch.equal(*answers)
    assert answers[0].shape[1] > given["input_ids"].shape[1]
    with nullcontext() if family != "qwen3_vl_moe" else names_of_single_experts():
        alone = AutoModelForImageTextToText.from_pretrained(
            tmp_path / "out", quantization_config=CompressedTensorsConfig(dequantize=True)
        )
    torch.testing.assert_close(logits(alone, given), expected, atol=1e-3, rtol=1e-3)
    _check_checkpoint_names(result.model, bind(model), load_file(tmp_path / "out" / "model.safetensors"))


def _check_checkpoint_names(model: nn.Module, binding: Binding, tensors: dict[str, torch.Tensor]) -> None:
    """Engines look for the ignore patterns in the checkpoint's names, transformers in the modules'."""

    def ignored(name: str) -> bool:
        return any(re.match(p[3:], name) if p.startswith("re:") else p == name for p in binding.ignore())

    quantized = [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]
    assert len(quantized) == sum(isinstance(module, QuantLinear) for module in model.modules())
    assert not any(ignored(name) for name in quantized)
    kept = [model.get_submodule(name).weight for name in binding.kept if not name.endswith("lm_head")]
    for weight in kept:  # found by their numbers, which are random
        (name,) = (name for name, each in tensors.items() if each.shape == weight.shape and torch.equal(each, weight))
        assert ignored(name.removesuffix(".weight"))


@families
def test_every_linear_is_quantized_or_kept(family: str) -> None:
    model, _ = tiny(family)
    binding = bind(model)
    blocks = [name for name, module in binding.blocks.named_modules() if isinstance(module, nn.Linear)]
    small = ("in_proj_a", "in_proj_b", "shared_expert_gate")  # Qwen3.5's rows a head, and a row
    blocks = [name for name in blocks if name.rpartition(".")[2] not in small]
    assert set(binding.names) == {f"{binding.architecture.blocks}.{name}" for name in blocks}
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(binding.kept) == linears - set(binding.names)


@families
def test_vision_tokens_and_answers_are_found(family: str) -> None:
    model, processor = tiny(family)
    binding = bind(model)
    batches = batches_for(family, binding, processor)
    if family in PICTURES:
        expected, pictured = {"A star.<|im_end|>", "Two circles.<|im_end|>", "Yellow.<|im_end|>"}, [1, 1, 1]
    else:
        last = "Yellow.<|im_end|>Green.<|im_end|>"
        expected = {"A red circle is left of a blue square.<|im_end|>", "There are three shapes.<|im_end|>", last}
        pictured = [0, 1, 1]
    answers = {processor.tokenizer.decode(labels[labels != NO_LABEL]) for batch in batches for labels in batch.labels}
    assert {each.strip() for each in answers} == expected
    seen = sorted(int(vision.any()) for batch in batches for vision in batch.vision)
    assert seen == ([0, 0, 0] if family in READ_ASIDE else pictured)


@families
def test_evaluation_sees_each_question_as_if_alone(family: str) -> None:
    """Where questions about one picture are packed, and where they are not: the logits of the answers are the same."""
    model, processor = tiny(family)
    rows = [row([index % 2, f"What is {index}?"], "ab" * (index + 1)) for index in range(4)]
    rows += [] if family in PICTURES else [row("How many?", "red")]
    packs = PackedDecoder.supports(model)
    assert packs == bind(model).architecture.packs
    with torch.inference_mode():
        alone = [_plain_logits(model, single, single.batches[0]) for single in (prepare([r], processor) for r in rows)]
        questions = prepare(rows, processor, batch_size=6)
        packed = PackedDecoder(model, questions) if packs else None
        for number, batch in enumerate(questions.batches):
            found = packed.logits(number) if packed else _plain_logits(model, questions, batch)
            expected = torch.cat([alone[index] for index in batch.rows.tolist()])
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@families
def test_smoothing_the_vision_tower_leaves_the_logits(family: str) -> None:
    model, processor = tiny(family)
    binding, given = bind(model), inputs(processor)
    before = logits(model, given)
    if family == "mllama":  # two towers, one behind the other: --vision-tower smooths the blocks of one
        with pytest.raises(MBQError, match="The blocks of MllamaVisionModel are none that --vision-tower knows"):
            smooth_vision_tower(binding, batches_for(family, binding, processor))
        return
    names = smooth_vision_tower(binding, batches_for(family, binding, processor))
    assert names
    torch.testing.assert_close(logits(model, given), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("turn", ["What?", [0, 1, "What?"]])
def test_blip2_takes_one_picture(turn: Any, tmp_path: Path) -> None:
    model, processor = tiny("blip2")
    asked = row(turn, "A star.")
    with pytest.raises(MBQError, match=r"line 1: .* \(BLIP-2 takes one picture"):
        one(asked, processor)
    with pytest.raises(MBQError, match=r"line 1: .* \(BLIP-2 takes one picture"):
        prepare([asked], processor)
    pictures = [tmp_path / f"{index}.png" for index in range(len(turn) - 1 if isinstance(turn, list) else 0)]
    for path in pictures:
        picture().save(path)
    with pytest.raises(MBQError, match=r"refuses the question \(BLIP-2 takes one picture"):
        generate(model, processor, "What?", pictures)


def test_blip2_answers_a_question() -> None:
    """Transformers' own processor puts the picture's tokens before the text; the chat's question and answer follow."""
    _, processor = tiny("blip2")
    batch = one(row(["What?", 0], "A star."), processor)  # its template writes the picture first, wherever it is
    ids = batch.inputs["input_ids"][0].tolist()
    assert processor.tokenizer.decode(ids) == "<image>" * 4 + "Question: What? Answer: A star.<|im_end|>"
    assert said(processor, batch) == " A star.<|im_end|>"


def test_a_norm_that_takes_a_gate_keeps_its_own_code() -> None:
    """Qwen3.5's delta nets end in one; the kernel for norms takes no gate."""
    model, processor = tiny("qwen3_5")
    given = inputs(processor)
    before = logits(model, given)
    one_kernel_each(model)
    assert torch.equal(logits(model, given), before)
