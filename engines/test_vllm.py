"""vLLM on the CPU runs the folders that mbq writes, and computes what they say.

One process, an engine after another. Limits are for logits relative to the norm of the reference's.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from vllm import LLM, SamplingParams, envs

from engines.conftest import MAX_TOKENS, Folders

FAMILIES = ("internvl", "llava_onevision", "qwen2_vl")
# What vLLM makes of each scheme: its class, and its kernel's.
KINDS = {
    "W8A8": ("CompressedTensorsW8A8Int8", "CPUInt8ScaledMMLinearKernel"),
    "W4A16": ("CompressedTensorsWNA16", "CPUWNA16LinearKernel"),
    "W4A16_SYM": ("CompressedTensorsWNA16", "CPUWNA16LinearKernel"),
    "W4A8": ("CompressedTensorsWNA8Int", "CPUWNA16LinearKernel"),
}
RUNS = {"W4A8": "W4A8 weights"}  # it leaves the activations of W4A8 in 16 bits, and says nothing
LIMITS = {"W8A8": 0.04, "W4A16": 0.015, "W4A16_SYM": 0.015, "W4A8": 0.015}  # measured: up to 0.028 and 0.009
FUSED = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
BLOCKS = 4


@dataclass(frozen=True)
class Served:
    """What vLLM made of one folder.

    kinds     of every layer that could be quantized: the classes of its method, scheme and kernel
    prompts   token ids
    logits    [question, vocabulary] of the answers' first tokens
    answers   token ids
    products  outputs of the first block's linears for the inputs that ``engines.folders`` drew
    """

    family: str
    scheme: str
    kinds: dict[str, tuple[str, str, str]]
    prompts: list[list[int]]
    logits: torch.Tensor
    answers: list[list[int]]
    products: dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=[(f, s) for f in FAMILIES for s in KINDS], ids=lambda case: "-".join(case))
def served(request: pytest.FixtureRequest, folders: Folders) -> Iterator[Served]:
    yield serve(folders, *request.param)
    gc.collect()


def serve(folders: Folders, family: str, scheme: str) -> Served:
    products = load_file(folders.path / "products.safetensors")
    inputs = {name: products[f"{family} {scheme} {name.split('.')[1]} x"] for name in FUSED}
    llm = engine(str(folders.path / f"{family}-{scheme}"))
    first = llm.chat(folders.chats, SamplingParams(temperature=0, max_tokens=1, logprobs=-1), use_tqdm=False)
    whole = llm.chat(folders.chats, SamplingParams(temperature=0, max_tokens=MAX_TOKENS), use_tqdm=False)
    (found,) = llm.apply_model(lambda model: (kinds_of(model), products_of(model, inputs)))
    return Served(
        family,
        scheme,
        kinds=found[0],
        prompts=[list(each.prompt_token_ids) for each in whole],
        logits=torch.tensor([row_of(each.outputs[0].logprobs[0]) for each in first]),
        answers=[list(each.outputs[0].token_ids) for each in whole],
        products=found[1],
    )


def engine(folder: str) -> LLM:
    envs.disable_envs_cache()  # an engine before this one froze what it read
    return LLM(
        folder,
        dtype="bfloat16",
        max_model_len=512,
        max_num_seqs=16,
        enforce_eager=True,
        logprobs_mode="raw_logits",
        max_logprobs=-1,
    )


def row_of(logprobs: dict[int, Any]) -> list[float]:
    return [logprobs[token].logprob for token in range(len(logprobs))]


def kinds_of(model: torch.nn.Module) -> dict[str, tuple[str, str, str]]:
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "quant_method") and not name.endswith(".attn"):
            scheme = getattr(module, "scheme", None)
            found[name] = tuple(
                type(each).__name__ for each in (module.quant_method, scheme, getattr(scheme, "kernel", None))
            )
    return found


def products_of(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    block = model.get_submodule("language_model.model.layers.0")
    found = {}
    for name, x in inputs.items():
        layer = block.get_submodule(name)
        found[name] = layer.quant_method.apply(layer, x.bfloat16(), layer.bias).float()
    return found


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def test_prompts_are_those_of_transformers(served: Served, folders: Folders) -> None:
    assert served.prompts == folders.expected[served.family]
    assert max(len(prompt) for prompt in served.prompts) > 20  # with the picture's tokens


def test_the_blocks_linears_are_quantized_and_nothing_else(served: Served, report: dict[str, Any]) -> None:
    quantized = {name for name, kinds in served.kinds.items() if kinds[0] == "CompressedTensorsLinearMethod"}
    assert quantized == {f"language_model.model.layers.{i}.{name}" for i in range(BLOCKS) for name in FUSED}
    assert {served.kinds[name][1:] for name in quantized} == {KINDS[served.scheme]}
    others = {name: kinds[0] for name, kinds in served.kinds.items() if name not in quantized}
    assert others["language_model.lm_head"] == "UnquantizedEmbeddingMethod"
    assert all(kind.startswith("Unquantized") for kind in others.values())
    assert sum("vis" in name for name in others) >= 6  # the tower's
    of_folder(report, served)["kernel"] = KINDS[served.scheme][1]


def test_products_are_those_of_the_folders_weights(served: Served, folders: Folders, report: dict[str, Any]) -> None:
    """One block's linears on equal inputs. What a rounding of activations changes is ten times what bf16 does."""
    runs = RUNS.get(served.scheme, served.scheme)
    error = products_error(served, folders, runs)
    of_folder(report, served)["products"] = round(error, 5)
    assert error < 0.005
    if served.scheme == "W4A8":
        assert products_error(served, folders, "W4A8") > 5 * error


def products_error(served: Served, folders: Folders, name: str) -> float:
    """Of the linear with the largest, from those of the model ``name``."""
    products = load_file(folders.path / "products.safetensors")
    expected = {layer: products[f"{served.family} {name} {layer.split('.')[1]} y"] for layer in FUSED}
    return max(relative(served.products[layer], expected[layer]) for layer in FUSED)


def test_logits_are_those_of_the_folders_weights(served: Served, folders: Folders, report: dict[str, Any]) -> None:
    """Within the limit, and at four bits at least three times nearer than to the float model.

    At W8A8 the float model itself is no farther away than what bf16 does to the codes of activations.
    """
    logits = load_file(folders.path / "logits.safetensors")
    expected = logits[f"{served.family} {RUNS.get(served.scheme, served.scheme)}"]
    error = relative(served.logits, expected)
    to_float = relative(served.logits, logits[f"{served.family} float"])
    of_folder(report, served).update({"logits": round(error, 4), "to float": round(to_float, 4)})
    assert error < LIMITS[served.scheme]
    if served.scheme != "W8A8":
        assert to_float > 3 * error


def test_answers_are_equal_where_rounding_cannot_decide(
    served: Served, folders: Folders, report: dict[str, Any]
) -> None:
    """A token whose lead is less than twice the largest error of a logit may lose it; few answers have one."""
    name = f"{served.family} {RUNS.get(served.scheme, served.scheme)}"
    expected = folders.expected[name]
    error = (served.logits - load_file(folders.path / "logits.safetensors")[name]).abs().max().item()
    equal = [found == each["tokens"] for found, each in zip(served.answers, expected, strict=True)]
    leads = [each["lead"] for each in expected]
    of_folder(report, served).update({"questions": len(equal), "equal": sum(equal)})
    assert all(same for same, lead in zip(equal, leads, strict=True) if lead > 2 * error)
    assert sum(lead > 2 * error for lead in leads) > len(leads) / 2
    assert sum(equal) >= 0.9 * len(equal)


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="needs a CPU with AMX")
def test_a_cpu_with_amx_rounds_activations_unless_it_is_told_not_to(
    folders: Folders, report: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own default for every 4-bit folder, W4A16 too: ten times the error of 16-bit activations."""
    monkeypatch.delenv("VLLM_CPU_INT4_W4A8")
    served = serve(folders, "internvl", "W4A16")
    error = products_error(served, folders, "W4A16")
    logits = load_file(folders.path / "logits.safetensors")["internvl W4A16"]
    report["amx"] = {"products": round(error, 5), "logits": round(relative(served.logits, logits), 4)}
    assert 0.01 < error < 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_three_bits_are_refused_in_words(family: str, folders: Folders, report: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="uint3") as raised:
        engine(str(folders.path / f"{family}-W3A16"))
    sentence = re.search(r"[^\n]*Quant type \(uint3\) not supported by CPUWNA16", str(raised.value))
    assert sentence
    report["folders"][f"{family}-W3A16"] = {"refused": sentence[0].strip()}


def of_folder(report: dict[str, Any], served: Served) -> dict[str, Any]:
    return report["folders"].setdefault(f"{served.family}-{served.scheme}", {})
