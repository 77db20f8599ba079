"""Perplexity of answers about pictures in llama.cpp: k-quants of the original and of the equalized language model,
without an importance matrix, with one that counts every token once, and with MBQ's. benchmarks/results/gguf.json

python -m benchmarks.gguf_perplexity        needs the extra mbq[gguf] and llama-cpp-python; on the CPU; prints the
                                            tables of docs/export.md
                                            --families NAME measures one and keeps what the file holds of the others

K-quants need rows of 256 channels and the reference models have 128 and 384, so channels of zeros are added that leave
the function as it was (``widened``). Only the blocks are quantized. What goes into the first block, pictures included,
comes from transformers; keys and values are kept in float32.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import torch
from torch import nn

import mbq
from benchmarks.results import CALIBRATIONS, FAMILIES, ROOT, STORED
from benchmarks.results_page import FAMILY_NAMES, markdown
from mbq.architecture import Binding, bind
from mbq.blocks import capture, hooked
from mbq.calibration import calibration_batches, encode, language_mask
from mbq.checkpoint.gguf_file import LanguageModel, language_model, write_importance, write_model
from mbq.importance import Importance, importance
from mbq.methods import METHODS, SearchOptions
from mbq.output import write_json
from mbq.pipeline import measure_sensitivity
from mbq.recipe import package_versions
from mbq.rows import Row, read_rows
from mbq.world import write

SUPER_BLOCK = 256
SAMPLES = 128
TYPES = {"Q3_K": ("W3A16", llama_cpp.LLAMA_FTYPE_MOSTLY_Q3_K_S), "Q4_K": ("W4A16", llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_S)}
GROUP_SIZE = 32  # of the search: the nearest to k-quants' 16 (Q3_K) and 32 (Q4_K) channels a scale
RESAMPLES = 2000


@dataclass(frozen=True)
class Question:
    """What llama.cpp is asked: hidden states [token, channel], positions [axis, token], and where answers belong."""

    hidden: np.ndarray
    positions: np.ndarray
    asked: list[int]
    answers: list[int]
    picture: str


def questions(binding: Binding, processor: Any, rows: list[Row]) -> list[Question]:
    ids, found, seen = set(binding.vision_tokens), [], []
    rotary = binding.model.get_submodule(f"{_language(binding)}.rotary_emb")

    def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["position_ids"] if "position_ids" in kwargs else args[1])

    batches = [encode(row, processor, ids, max_length=1024) for row in rows]
    with hooked() as hooks:
        hooks.append(rotary.register_forward_pre_hook(read, with_kwargs=True))
        hidden, _ = capture(binding, batches)
    for row, batch, states, positions in zip(rows, batches, hidden, seen, strict=True):
        asked = language_mask(batch)[0].nonzero().flatten()
        answers = batch.labels[0, asked + 1].tolist()
        places = positions.reshape(-1, states.shape[1]).numpy()
        found.append(Question(states[0].float().numpy(), places, asked.tolist(), answers, str(row.images[0])))
    return found


def _language(binding: Binding) -> str:
    """Where the language model is."""
    return binding.architecture.blocks.rpartition(".")[0]


def widened(model: LanguageModel) -> LanguageModel:
    """The same function with widths that are multiples of 256: channels, heads and inner channels of zeros are added.

    A norm's mean square is over more channels, so its weight and epsilon shrink by what the mean does.
    """
    old, new = model.config, copy.deepcopy(model.config)
    head_dim = old.hidden_size // old.num_attention_heads
    new.hidden_size, new.intermediate_size = _up(old.hidden_size), _up(old.intermediate_size)
    new.num_attention_heads = new.hidden_size // head_dim
    new.num_key_value_heads = old.num_key_value_heads * new.num_attention_heads // old.num_attention_heads
    new.rms_norm_eps = old.rms_norm_eps * old.hidden_size / new.hidden_size
    widths = {
        old.hidden_size: new.hidden_size,
        old.intermediate_size: new.intermediate_size,
        old.num_key_value_heads * head_dim: new.num_key_value_heads * head_dim,
    }
    tensors = {}
    for name, tensor in model.tensors.items():
        values = tensor.float()
        if name.endswith("norm.weight"):
            values = values * math.sqrt(old.hidden_size / new.hidden_size)
        for axis, size in enumerate(tensor.shape):
            values = _padded(values, axis, widths.get(size, size))
        tensors[name] = values
    return replace(model, config=new, tensors=tensors)


def _up(size: int) -> int:
    return -(-size // SUPER_BLOCK) * SUPER_BLOCK


def _padded(values: torch.Tensor, axis: int, size: int, fill: float = 0.0) -> torch.Tensor:
    shape = list(values.shape)
    shape[axis] = size - shape[axis]
    return torch.cat([values, values.new_full(shape, fill)], dim=axis)


def widened_importance(measured: Importance) -> Importance:
    """Channels of zeros matter as much as the others do on average; their weights are zero in any case."""
    means = {name: _padded(mean, 0, _up(len(mean)), float(mean.mean())) for name, mean in measured.means.items()}
    return replace(measured, means=means)


def quantized(path: Path, kind: str, matrix: Path | None) -> Path:
    """``path`` quantized by llama.cpp, all matrices of blocks alike; ``matrix`` is read as llama-quantize reads it."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.pure, params.nthread = TYPES[kind][1], True, 1
    params.output_tensor_type = params.token_embedding_type = llama_cpp.GGML_TYPE_F32
    means = {} if matrix is None else read_matrix(matrix)
    entries = (llama_cpp.llama_cpp.llama_model_imatrix_data * (len(means) + 1))()
    for entry, (name, mean) in zip(entries, means.items(), strict=False):
        entry.name, entry.size = name.encode(), len(mean)
        entry.data = _pointer(mean, ctypes.c_float)
    if means:
        params.imatrix = entries
    output = path.with_name(f"{path.stem}-{kind}{'-' + matrix.stem if matrix else ''}.gguf")
    status = llama_cpp.llama_model_quantize(str(path).encode(), str(output).encode(), ctypes.byref(params))
    kinds = {
        str(tensor.tensor_type.name) for tensor in gguf.GGUFReader(output).tensors if tensor.name.startswith("blk.")
    }
    if status or kinds != {"F32", kind}:
        raise RuntimeError(f"llama.cpp made {kinds} of {path}, with status {status}")
    return output


def read_matrix(path: Path) -> dict[str, np.ndarray]:
    tensors = {tensor.name: np.array(tensor.data, dtype=np.float32).ravel() for tensor in gguf.GGUFReader(path).tensors}
    names = [name.removesuffix(".in_sum2") for name in tensors if name.endswith(".in_sum2")]
    return {name: tensors[f"{name}.in_sum2"] / tensors[f"{name}.counts"] for name in names}


class Engine:
    """llama.cpp on one thread of the CPU."""

    def __init__(self, path: Path) -> None:
        loading = llama_cpp.llama_model_default_params()
        loading.use_extra_bufts = False  # weights stay as they are written: repacked ones end this process on some CPUs
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), loading)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = 1024
        params.n_threads = params.n_threads_batch = 1
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        params.flash_attn_type = 0
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.width = llama_cpp.llama_model_n_embd(self.model)

    def logits(self, question: Question) -> np.ndarray:
        """[asked position, token]"""
        count = len(question.hidden)
        hidden = np.zeros((count, self.width), dtype=np.float32)
        hidden[:, : question.hidden.shape[1]] = question.hidden
        positions = question.positions.astype(np.int32)
        if len(positions) == 3:  # llama.cpp has a fourth axis
            positions = np.concatenate([positions, np.zeros((1, count), dtype=np.int32)])
        own, sequences, sequence = np.ascontiguousarray(positions), np.ones(count, np.int32), np.zeros(1, np.int32)
        wanted = np.zeros(count, np.int8)
        wanted[question.asked] = 1
        each = (ctypes.POINTER(ctypes.c_int32) * count)(*[_pointer(sequence, ctypes.c_int32)] * count)
        batch = llama_cpp.llama_batch(
            n_tokens=count,
            embd=_pointer(hidden, ctypes.c_float),
            pos=_pointer(own, ctypes.c_int32),
            n_seq_id=_pointer(sequences, ctypes.c_int32),
            seq_id=ctypes.cast(each, ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
            logits=_pointer(wanted, ctypes.c_int8),
        )
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        status = llama_cpp.llama_decode(self.context, batch)
        if status:
            raise RuntimeError(f"llama_decode gave {status}")
        rows = [llama_cpp.llama_get_logits_ith(self.context, i) for i in question.asked]
        return np.stack([np.ctypeslib.as_array(row, (self.words,)).copy() for row in rows])

    def close(self) -> None:
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)


def _pointer(array: np.ndarray, kind: Any) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(kind))


def losses(path: Path, asked: list[Question]) -> np.ndarray:
    """Sum over the answer's tokens of -log p, a question."""
    engine = Engine(path)
    found = []
    for question in asked:
        scores = engine.logits(question).astype(np.float64)
        highest = scores.max(1, keepdims=True)
        total = highest[:, 0] + np.log(np.exp(scores - highest).sum(1))
        found.append(float((total - scores[np.arange(len(scores)), question.answers]).sum()))
    engine.close()
    return np.array(found)


def less(one: np.ndarray, other: np.ndarray, asked: list[Question]) -> dict[str, float]:
    """log of the ratio of perplexities, ``one`` by ``other``, and its 95 % interval; pictures are resampled."""
    pictures = {name: index for index, name in enumerate(dict.fromkeys(q.picture for q in asked))}
    sums, tokens = np.zeros(len(pictures)), np.zeros(len(pictures))
    for question, difference in zip(asked, one - other, strict=True):
        sums[pictures[question.picture]] += difference
        tokens[pictures[question.picture]] += len(question.answers)
    draws = np.random.default_rng(0).integers(0, len(sums), (RESAMPLES, len(sums)))
    ratios = sums[draws].sum(1) / tokens[draws].sum(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return {"log_ratio": float(sums.sum() / tokens.sum()), "low": float(low), "high": float(high)}


def agreement(binding: Binding, processor: Any, path: Path, asked: list[Question]) -> dict[str, Any]:
    """How far llama.cpp's float model is from transformers': logits after the same states, and tokens of texts."""
    if binding.model.config.model_type == "qwen2_vl":  # llama.cpp of today reads no epsilon for it and takes 0
        for module in binding.model.modules():
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon = 0.0
    engine, worst, largest = Engine(path), 0.0, 0.0
    language: Any = binding.model.get_submodule(_language(binding))
    head = binding.model.get_submodule(next(name for name in binding.kept if name.endswith("lm_head")))
    for question in asked[:20]:
        places = torch.from_numpy(question.positions)[:, None]
        with torch.inference_mode():
            states = language(
                inputs_embeds=torch.from_numpy(question.hidden)[None],
                position_ids=places if len(places) == 3 else places[0],
            ).last_hidden_state
            expected = head(states)[0, question.asked].numpy()
        worst = max(worst, float(np.abs(engine.logits(question) - expected).max()))
        largest = max(largest, float(np.abs(expected).max()))
    texts = ["What is 12 + 7?\n\nIt's naïve,   isn't it? 3.14 日本", "<|im_start|>user\nWho?<|im_end|>\n"]
    vocab = llama_cpp.llama_model_get_vocab(engine.model)
    same = all(_tokens(vocab, text) == processor.tokenizer(text)["input_ids"] for text in texts)
    engine.close()
    return {"largest_difference": worst, "largest_logit": largest, "same_tokens": same}


def _tokens(vocab: Any, text: str) -> list[int]:
    data, room = text.encode(), (llama_cpp.llama_token * 256)()
    count = llama_cpp.llama_tokenize(vocab, data, len(data), room, len(room), False, True)
    return list(room[:count])


def measure(family: str, folder: Path, rows: list[Row], tests: list[Row]) -> dict[str, Any]:
    source = ROOT / "models" / family
    processor = mbq.load_processor(source)
    options: dict[str, Any] = {"data": rows, "num_calibration_samples": SAMPLES, "batch_size": 16, "device": "cpu"}
    models = {"original": mbq.load(source, dtype="float32")}
    binding = bind(models["original"])
    batches = calibration_batches(rows, processor, set(binding.vision_tokens), num_samples=SAMPLES, batch_size=16)
    asked = questions(binding, processor, tests)
    sensitivity = measure_sensitivity(models["original"], processor, **options)
    for kind, (scheme, _) in TYPES.items():
        made = mbq.export(
            source,
            format="equalized",
            scheme=scheme,
            group_size=GROUP_SIZE,
            output=folder / f"{family}-{kind}",
            dtype="float32",
            **options,
        )
        models[kind] = made.model
    found: dict[str, Any] = {"questions": len(asked), "answer_tokens": sum(len(q.answers) for q in asked)}
    nats: dict[str, np.ndarray] = {}
    for name, model in models.items():
        bound = bind(model)
        path = folder / f"{family}-{name}.gguf"
        language = widened(language_model(bound))
        write_model(path, language, processor, family)
        matrices: dict[str, Path | None] = {"none": None}
        for matrix, method in (("uniform", "awq"), ("mbq", "mbq")):
            measured = importance(bound, batches, METHODS[method], SearchOptions(), sensitivity)
            matrices[matrix] = path.with_name(f"{matrix}-{path.name}")
            write_importance(matrices[matrix], language, widened_importance(measured), "questions")
        if name == "original":
            nats["float"] = losses(path, asked)
            found["llama.cpp and transformers"] = agreement(bound, processor, path, asked)
        for kind in TYPES if name == "original" else [name]:
            for matrix, file in matrices.items():
                label = f"{kind}, {'original' if name == 'original' else 'equalized'}, {matrix}"
                nats[label] = losses(quantized(path, kind, file), asked)
                print(family, label, math.exp(nats[label].sum() / found["answer_tokens"]), flush=True)
    found["perplexity"] = {label: math.exp(each.sum() / found["answer_tokens"]) for label, each in nats.items()}
    found["compared"] = {f"{a} / {b}": less(nats[a], nats[b], asked) for a, b in _pairs(nats)}
    return found


def _pairs(nats: Mapping[str, np.ndarray]) -> list[tuple[str, str]]:
    """MBQ's matrix against none and against the uniform one, of either model; equalized against original."""
    pairs = []
    for kind in TYPES:
        for model in ("original", "equalized"):
            pairs += [(f"{kind}, {model}, mbq", f"{kind}, {model}, {other}") for other in ("none", "uniform")]
        pairs += [(f"{kind}, equalized, {matrix}", f"{kind}, original, {matrix}") for matrix in ("none", "mbq")]
    return [(a, b) for a, b in pairs if a in nats and b in nats]


def tables(content: Mapping[str, Any]) -> str:
    """Perplexities, and how they compare, as Markdown."""
    kinds = [f"{model}, {matrix}" for model in ("original", "equalized") for matrix in ("none", "uniform", "mbq")]
    rows, compared = [], []
    for family, found in content["models"].items():
        for kind in TYPES:
            each = [f"{found['perplexity'][f'{kind}, {name}']:.4f}" for name in kinds]
            rows.append([FAMILY_NAMES[family], kind, f"{found['perplexity']['float']:.4f}", *each])
        for pair, less in found["compared"].items():
            percent = [f"{100 * math.expm1(less[key]):+.2f}" for key in ("log_ratio", "low", "high")]
            sure = less["low"] > 0 or less["high"] < 0
            compared.append(
                [FAMILY_NAMES[family], pair, f"{percent[0]} ({percent[1]} to {percent[2]})", "yes" if sure else ""]
            )
    first = markdown(["model", "type", "float", *kinds], rows)
    return f"{first}\n\n{markdown(['model', 'perplexity of / of', 'difference, %', 'sure'], compared)}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure k-quants of the reference models in llama.cpp.")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--per-task", type=int, default=40, help="test questions a task")
    parser.add_argument("--output", type=Path, default=STORED / "gguf.json")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, None)
    tasks = list(CALIBRATIONS["questions"])
    content: dict[str, Any] = {
        "calibration": {"tasks": "questions", "samples": SAMPLES, "group_size": GROUP_SIZE},
        "versions": package_versions() | {"llama-cpp-python": llama_cpp.__version__},
    }
    stored = json.loads(args.output.read_text()) if args.output.is_file() else {}
    same = {key: stored.get(key) for key in content} == content
    content["models"] = stored["models"] if same else {}
    with tempfile.TemporaryDirectory(prefix="mbq-gguf-") as folder:
        rows = read_rows(write(Path(folder) / "calibration", "calibration", tasks=tasks, per_task=SAMPLES))
        tests = read_rows(write(Path(folder) / "test", "test", tasks=tasks, per_task=args.per_task))
        for family in args.families:
            content["models"][family] = measure(family, Path(folder), rows, tests)
            write_json(args.output, content)
    print(tables(content))


if __name__ == "__main__":
    main()
