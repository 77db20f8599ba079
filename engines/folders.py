"""Quantized folders of the reference models, questions, and what a model of each folder has to answer.

python -m engines.folders OUTPUT    in the project's own environment, before the tests of an engine in another one

OUTPUT/FAMILY-SCHEME/         what ``mbq quantize`` writes
OUTPUT/questions.json         texts, pictures and right answers
OUTPUT/expected.json          FAMILY: the token ids of the prompts; "FAMILY NAME": the tokens that are answered, and the
                              least lead of one of them, in logits, over the second best
OUTPUT/logits.safetensors     "FAMILY NAME": logits of each answer's first token, [question, vocabulary], float32
OUTPUT/products.safetensors   "FAMILY SCHEME LAYER x": inputs of a linear of the first block, [row, channel];
                              "FAMILY NAME LAYER y": its outputs. LAYER is as vLLM fuses them: qkv_proj is q, k and v

NAME is "float", a scheme, or "W4A8 weights": its rounded weights, and activations that are not rounded. Weights are as
transformers and mbq unpack them, in bfloat16. All that follows is float32, so that an engine's error is its own.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import mbq
from mbq.architecture import bind
from mbq.demo import reference_model
from mbq.kernels.packed import unpack_weight
from mbq.qlinear import QuantLinear
from mbq.qtensor import dequantize, fake_quantize_activations
from mbq.scheme import ActivationScheme
from mbq.world import TASKS, write

FAMILIES = ("internvl", "llava_onevision", "qwen2_vl")
REFUSED = "W3A16"  # by vLLM on a CPU
SCHEMES = ("W8A8", "W4A16", "W4A16_SYM", "W4A8", REFUSED)
PER_TASK = 2
FUSED = {
    "qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o_proj": ("self_attn.o_proj",),
    "gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "down_proj": ("mlp.down_proj",),
}
ROWS, OUTLIER = 16, 30
SAMPLES = 16  # to calibrate on: the folder is checked here, not the method


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    output: Path = parser.parse_args().output
    started = time.monotonic()
    images = [task.name for task in TASKS.values() if task.needs_image]
    calibration = write(output / "calibration", "calibration", images, per_task=SAMPLES)
    questions = _questions(output)
    expected: dict[str, Any] = {}
    logits: dict[str, torch.Tensor] = {}
    products: dict[str, torch.Tensor] = {}
    for family in FAMILIES:
        source = reference_model(family)
        prompts = _prompts(mbq.load_processor(source), questions, output)
        expected[family] = [prompt["input_ids"][0].tolist() for prompt in prompts]
        models = {"float": mbq.load(source, dtype="float32")}
        for scheme in SCHEMES:
            folder = output / f"{family}-{scheme}"
            mbq.quantize(source, scheme=scheme, data=calibration, output=folder, num_calibration_samples=SAMPLES)
            models[scheme] = _fake_quantized(folder)
            if scheme == "W4A8":
                models["W4A8 weights"] = _fake_quantized(folder, activations=False)
        for name, model in models.items():
            if name != REFUSED:
                expected[f"{family} {name}"], logits[f"{family} {name}"] = _answered(model, prompts)
                products |= {f"{family} {name} {key}": value for key, value in _products(model).items()}
        print(f"{family}: {time.monotonic() - started:.0f} s", flush=True)
    (output / "expected.json").write_text(json.dumps(expected) + "\n")
    save_file(logits, output / "logits.safetensors")
    save_file(products, output / "products.safetensors")


def _questions(output: Path) -> list[dict[str, Any]]:
    """``PER_TASK`` questions of each task of the demo: {"task", "text", "picture": file name or None, "answer"}."""
    rows = map(json.loads, write(output, "test", per_task=PER_TASK).read_text().splitlines())
    found = []
    for row in rows:
        asked, answer = (message["content"] for message in row["messages"])
        picture = next((part["image"] for part in asked if part["type"] == "image"), None)
        text = next(part["text"] for part in asked if part["type"] == "text")
        found.append({"task": row["task"], "text": text, "picture": picture, "answer": answer[0]["text"]})
    (output / "questions.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def _prompts(processor: Any, questions: list[dict[str, Any]], folder: Path) -> list[Any]:
    """What transformers makes of each question: input ids [1, token], pixels, and what else a model takes."""
    prompts = []
    for question in questions:
        content = [{"type": "text", "text": question["text"]}]
        if question["picture"]:
            content.insert(0, {"type": "image", "path": str(folder / question["picture"])})
        prompts.append(
            processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        )
    return prompts


def _answered(model: Any, prompts: list[Any]) -> tuple[list[dict[str, Any]], torch.Tensor]:
    """Greedy answers, and the logits of their first tokens [question, vocabulary]."""
    answers, first = [], []
    for prompt in prompts:
        made = model.generate(**prompt, return_dict_in_generate=True, output_logits=True)
        best, second = torch.cat(made.logits).topk(2).values.unbind(-1)
        tokens = made.sequences[0, prompt["input_ids"].shape[1] :].tolist()
        answers.append({"tokens": tokens, "lead": (best - second).min().item()})
        first.append(made.logits[0][0])
    return answers, torch.stack(first)


def _fake_quantized(folder: Path, activations: bool = True) -> Any:
    """The model of ``folder`` in float32, with dense linears of its rounded weights that round what they read."""
    model = mbq.load(folder, kernel="reference")
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantLinear):
            dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
            dense.weight = nn.Parameter(dequantize(unpack_weight(layer.packed)), requires_grad=False)
            dense.bias = layer.bias
            if activations and layer.scheme.activations is not None:
                dense.register_forward_pre_hook(partial(_round, layer.scheme.activations))
            model.set_submodule(name, dense)
    return model.float()


@torch.no_grad()
def _products(model: Any) -> dict[str, torch.Tensor]:
    """Inputs and outputs of the first block's linears. A channel has outliers, which rounding a token's range shows."""
    block = bind(model).blocks[0]
    found = {}
    for name, parts in FUSED.items():
        linears = [block.get_submodule(part) for part in parts]
        x = torch.randn(ROWS, linears[0].in_features, generator=torch.Generator().manual_seed(0))
        x[:, 0] *= OUTLIER
        x = x.bfloat16().float()
        found[f"{name} x"] = x
        found[f"{name} y"] = torch.cat([linear(x) for linear in linears], -1)
    return found


def _round(scheme: ActivationScheme, _: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (fake_quantize_activations(args[0], scheme),)


if __name__ == "__main__":
    main()
