"""GGUF files: llama.cpp's names and order of rows, a tokenizer, the importance matrix, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import mbq
from mbq.architecture import bind
from mbq.checkpoint import gguf_file
from mbq.checkpoint.gguf_file import check_tokenizer, language_model, write_importance, write_model
from mbq.errors import MBQError
from mbq.importance import Importance
from tests import tiny, tiny_families

gguf = pytest.importorskip("gguf")

LINEARS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NAMES = {
    **LINEARS,
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}  # Qwen3's


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Keys and tensors of a file; bfloat16 by its bits."""
    reader = gguf.GGUFReader(path)
    tensors = {}
    for tensor in reader.tensors:
        values = torch.from_numpy(np.array(tensor.data))
        tensors[tensor.name] = values.view(torch.bfloat16) if tensor.tensor_type.name == "BF16" else values
    return {key: field.contents() for key, field in reader.fields.items()}, tensors


def made(family: str, text: str | None, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A model of tests/tiny.py, or, without a name of its ``text``, of tests/tiny_families.py."""
    return tiny.tiny(family, text=text, dtype=dtype) if text else tiny_families.tiny(family, dtype)


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Channels i and i + d/2 of each head side by side, counted out."""
    width = len(weight) // heads
    order = [h * width + half * width // 2 + i for h in range(heads) for i in range(width // 2) for half in range(2)]
    return weight[order]


@pytest.mark.parametrize(
    ("family", "text", "architecture", "dtype"),
    [
        ("qwen2_5_vl", None, "qwen2vl", torch.bfloat16),
        ("qwen3_vl", None, "qwen3vl", torch.float32),
        ("llava_onevision", "qwen2", "qwen2", torch.float32),
        ("internvl", "qwen2", "qwen2", torch.bfloat16),
        ("internvl", "llama", "llama", torch.float16),
        ("qwen2_vl", "qwen2", "qwen2vl", torch.float32),
        ("internvl2_internlm2", "llama", "llama", torch.float32),
    ],
)
def test_every_tensor_has_its_place(
    family: str, text: str | None, architecture: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, processor = made(family, text, dtype)
    binding = bind(model)
    write_model(tmp_path / "model.gguf", language_model(binding), processor, "tiny")
    keys, tensors = read(tmp_path / "model.gguf")
    root = binding.architecture.blocks.rpartition(".")[0]
    language = {
        name: value
        for name, value in model.named_parameters()
        if name.startswith(f"{root}.") or name.endswith("lm_head.weight")
    }
    assert len(tensors) == len(language)
    for name, tensor in tensors.items():
        steps = name.split(".")
        if steps[0] == "blk":
            own = f"{binding.name(int(steps[1]), (NAMES | HEAD_NORMS)[steps[2]])}.{steps[3]}"
        else:
            places = {"token_embd": f"{root}.embed_tokens", "output_norm": f"{root}.norm"}
            head = next(name for name in language if name.endswith("lm_head.weight")).removesuffix(".weight")
            own = f"{places.get(steps[0], head)}.weight"
        expected = language[own]
        if architecture == "llama" and own.split(".")[-2] in ("q_proj", "k_proj"):
            expected = interleaved(expected, 4 if "q_proj" in own else 2)
        assert tensor.dtype == (torch.float32 if expected.ndim == 1 else dtype), name
        assert torch.equal(tensor, expected.to(tensor.dtype)), name
    assert keys["general.architecture"] == architecture
    width = 128 if text else tiny_families.HIDDEN
    sizes = [keys[f"{architecture}.{key}"] for key in ("block_count", "embedding_length", "feed_forward_length")]
    assert sizes == [2, width, 2 * width]
    heads = [keys[f"{architecture}.attention.{key}"] for key in ("head_count", "head_count_kv", "key_length")]
    assert heads == [width // 32, width // 64, 32]
    if "vl" in architecture:
        sections = [6, 5, 5, 0] if architecture == "qwen3vl" else [4, 6, 6, 0]
        assert keys[f"{architecture}.rope.dimension_sections"] == sections
    assert keys.get(f"{architecture}.n_deepstack_layers") == (2 if architecture == "qwen3vl" else None)


def test_the_order_of_llamas_rows_is_that_of_its_rotation() -> None:
    """llama.cpp turns channels 2i and 2i + 1 by position times theta_i: the same attention scores."""
    heads, width, count = 4, 32, 5
    query, key, x = torch.randn(128, 16), torch.randn(128, 16), torch.randn(count, 16)
    angles = torch.arange(count)[:, None] / 10000 ** (torch.arange(0, width, 2) / width)
    cos, sin = (torch.cat([turn(angles)] * 2, dim=-1)[None] for turn in (torch.cos, torch.sin))
    q, k = ((x @ weight.T).view(1, count, heads, width).transpose(1, 2) for weight in (query, key))
    q, k = apply_rotary_pos_emb(q, k, cos, sin)

    def turned(weight: torch.Tensor) -> torch.Tensor:
        config = type("Config", (), {"num_attention_heads": heads, "num_key_value_heads": heads})
        rows = gguf_file._rotated(weight, "model.layers.0.self_attn.q_proj", config, "LLAMA")
        pairs = torch.view_as_complex((x @ rows.T).view(count, heads, width // 2, 2))
        return torch.view_as_real(pairs * torch.polar(torch.ones(()), angles)[:, None]).flatten(-2).transpose(0, 1)

    torch.testing.assert_close(turned(query) @ turned(key).mT, (q @ k.mT)[0], atol=1e-4, rtol=1e-4)


def test_the_tokenizer_is_the_models_and_every_row_has_a_token(tmp_path: Path) -> None:
    model, processor = tiny.tiny("llava_onevision")
    tokens, rows = processor.tokenizer, len(processor.tokenizer) + 5
    model.resize_token_embeddings(rows, mean_resizing=False)
    write_model(tmp_path / "model.gguf", language_model(bind(model)), processor, "tiny")
    keys, tensors = read(tmp_path / "model.gguf")
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]) == ("gpt2", "qwen2")
    written = keys["tokenizer.ggml.tokens"]
    assert len(written) == rows == len(tensors["token_embd.weight"])
    assert written[: len(tokens)] == tokens.convert_ids_to_tokens(list(range(len(tokens))))
    assert len(set(written)) == rows
    types = keys["tokenizer.ggml.token_type"]
    assert types[len(tokens) :] == [gguf.TokenType.UNUSED] * 5
    assert types[tokens.convert_tokens_to_ids("<image>")] == gguf.TokenType.CONTROL
    assert types[tokens.convert_tokens_to_ids("t")] == gguf.TokenType.NORMAL
    assert keys["tokenizer.ggml.eos_token_id"] == tokens.eos_token_id
    assert keys["tokenizer.ggml.add_bos_token"] is False
    assert keys["tokenizer.chat_template"] == tiny.LLAVA_ONEVISION_TEMPLATE
    merges = json.loads(tokens.backend_tokenizer.to_str())["model"]["merges"]
    assert keys["tokenizer.ggml.merges"] == [" ".join(merge) for merge in merges]


def test_tied_embeddings_are_written_once(tmp_path: Path) -> None:
    model, processor = tiny.tiny("qwen2_vl", tied=True)
    write_model(tmp_path / "model.gguf", language_model(bind(model)), processor, "tiny")
    _, tensors = read(tmp_path / "model.gguf")
    assert "output.weight" not in tensors
    assert torch.equal(tensors["token_embd.weight"], model.get_input_embeddings().weight)


def test_the_matrix_is_what_llama_quantize_divides(tmp_path: Path) -> None:
    model, _ = tiny.tiny("internvl", text="llama")
    binding = bind(model)
    means = {name: torch.rand(binding.model.get_submodule(name).in_features) + 0.1 for name in binding.names}
    path = tmp_path / "imatrix.gguf"
    write_importance(path, language_model(binding), Importance(means, samples=4, tokens=300), "calib.jsonl")
    keys, tensors = read(path)
    assert keys["general.type"] == "imatrix"
    assert keys["imatrix.datasets"] == ["calib.jsonl"]
    assert (keys["imatrix.chunk_count"], keys["imatrix.chunk_size"]) == (4, 75)
    assert len(tensors) == 2 * len(means)
    for name, mean in means.items():
        index, _, path_in_block = name.removeprefix(f"{binding.architecture.blocks}.").partition(".")
        own = next(key for key, value in LINEARS.items() if value == path_in_block)
        sums, counts = (tensors[f"blk.{index}.{own}.weight.{kind}"] for kind in ("in_sum2", "counts"))
        assert counts.flatten().tolist() == [300.0]
        torch.testing.assert_close(sums.flatten() / counts.flatten(), mean)


def test_the_folder(float_folder: Callable[[str], Path], options: dict[str, Any], tmp_path: Path) -> None:
    made = mbq.export(float_folder("qwen2_vl"), output=tmp_path / "out", format="gguf", **options)
    assert sorted(path.name for path in made.folder.iterdir()) == [
        "README.md",
        "imatrix.gguf",
        "model.gguf",
        "recipe.yaml",
        "search.json",
        "sensitivity.json",
    ]
    _, tensors = read(made.folder / "model.gguf")
    equalized = mbq.export(float_folder("qwen2_vl"), output=tmp_path / "equalized", **options)
    weights = mbq.load(equalized.folder)
    for name, module in NAMES.items():
        own = weights.get_parameter(f"model.language_model.layers.1.{module}.weight")
        assert torch.equal(tensors[f"blk.1.{name}.weight"], own)
    _, matrix = read(made.folder / "imatrix.gguf")
    assert {name.removesuffix(".in_sum2") for name in matrix if name.endswith(".in_sum2")} == {
        f"blk.{index}.{name}.weight" for index in range(2) for name in LINEARS
    }
    assert all(bool((tensor > 0).all()) for tensor in matrix.values())
    assert "llama-quantize --imatrix imatrix.gguf" in (made.folder / "README.md").read_text()


def test_without_the_package_a_sentence(
    float_folder: Callable[[str], Path],
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MBQError, match=r"--format gguf needs the gguf package; install it with pip install 'mbq\[gg"):
        mbq.export(float_folder("internvl"), output=tmp_path / "out", format="gguf", **options)
    assert list(tmp_path.iterdir()) == []


def test_what_llama_cpp_would_compute_otherwise_is_refused(
    float_folder: Callable[[str], Path], options: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(
        MBQError, match=r"of the types qwen2, qwen2_vl_text, .*, llama, not internlm2; export --format equalized"
    ):
        mbq.export(
            float_folder("internvl2_internlm2"),
            output=tmp_path / "out",
            format="gguf",
            trust_remote_code=True,
            **options,
        )
    assert list(tmp_path.iterdir()) == []
    model, processor = tiny.tiny("internvl", text="llama")
    config = model.config.text_config
    config.rope_parameters = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}
    with pytest.raises(MBQError, match=r"does not write rotary scaling \(llama3\)"):
        language_model(bind(model))
    config.rope_parameters, config.hidden_act = {"rope_type": "default", "rope_theta": 1e4}, "gelu"
    with pytest.raises(MBQError, match="an activation or a sliding window"):
        language_model(bind(model))
    config.hidden_act = "silu"
    assert language_model(bind(model)).architecture == "LLAMA"
    assert check_tokenizer(processor.tokenizer) == "qwen2"
    content = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{N}{1,3}"
    other = type(
        "Tokenizer", (), {"backend_tokenizer": type("Backend", (), {"to_str": lambda _: json.dumps(content)})()}
    )
    with pytest.raises(MBQError, match="splits text in another way than Qwen2's"):
        check_tokenizer(other())
    with pytest.raises(MBQError, match="splits text in another way than Qwen2's"):
        check_tokenizer(object())


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("llava_onevision", "qwen2"),
        ("internvl", "llama"),
        ("qwen2_vl", "qwen2"),
        ("qwen2_5_vl", None),
        ("qwen3_vl", None),
    ],
)
def test_llama_cpp_computes_the_same(family: str, text: str | None, tmp_path: Path) -> None:
    """Where llama-cpp-python is installed: its tokens and logits of a text are transformers'."""
    llama_cpp = pytest.importorskip("llama_cpp")
    model, processor = made(family, text)
    for module in model.modules() if family in ("qwen2_vl", "qwen2_5_vl") else ():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.0  # what llama.cpp takes for Qwen2-VL: it does not read the file's
    write_model(tmp_path / "model.gguf", language_model(bind(model)), processor, "tiny")
    engine = llama_cpp.Llama(
        str(tmp_path / "model.gguf"), n_ctx=128, logits_all=True, verbose=False, type_k=0, type_v=0
    )
    asked = "<|im_start|>user\nWhat is left of the blue square, 12 or naïve?<|im_end|>\n"
    ids = processor.tokenizer(asked)["input_ids"]
    assert engine.tokenize(asked.encode(), add_bos=False, special=True) == ids
    engine.eval(ids)
    found = torch.from_numpy(np.array(engine.scores[: len(ids)]))
    engine.close()
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([ids])).logits[0]
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


def test_the_page_shows_what_was_measured() -> None:
    pytest.importorskip("llama_cpp")
    from benchmarks.gguf_perplexity import STORED, tables

    page = Path(__file__).parents[1] / "docs" / "export.md"
    assert tables(json.loads((STORED / "gguf.json").read_text())) in page.read_text()
