"""Perplexity and KL divergence against whole softmaxes in float64, one row at a time, with nothing left out."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from mbq.errors import MBQError
from mbq.evaluation import Run, run, statistics
from mbq.evaluation import text as module
from mbq.evaluation.text import TextMeasures, measure_text
from mbq.rows import Row
from tests import tiny

torch.set_num_threads(1)

ANSWERS = ("A red circle.", "Two green triangles and the number 7.", "Yellow.")


def rows(folder: Path) -> list[Row]:
    """Two with a picture, one without, one with two answers."""
    made = []
    for i, answer in enumerate((*ANSWERS, "Yes.")):
        content: list[dict[str, Any]] = [{"type": "text", "text": f"What is {i}?"}]
        if i < 2:
            path = folder / f"{i}.png"
            tiny.picture(i).save(path)
            content.insert(0, {"type": "image", "image": path})
        messages = [{"role": "user", "content": content}, said(answer)]
        if i == 3:
            messages += [{"role": "user", "content": [{"type": "text", "text": "Sure?"}]}, said("Quite.")]
        made.append(Row(messages, f"row {i}"))
    return made


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


@torch.no_grad()
def slowly(model: Any, processor: Any, asked: Row) -> tuple[torch.Tensor, list[int]]:
    """float64 [answer token, vocabulary] log-probabilities from one plain forward, and the answers' tokens."""
    text = processor.apply_chat_template(asked.chat, tokenize=False)
    inputs = processor(text=[text], images=asked.open_images() or None, return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    log_p = model(**inputs).logits[0].double().log_softmax(-1)
    places: list[int] = []
    start = 0
    for message in asked.messages:
        if message["role"] == "assistant":
            answer, decode = message["content"][0]["text"], processor.tokenizer.decode
            end = next(i for i in range(start, len(ids)) if answer in decode(ids[start:i]))
            first = max(i for i in range(start, end) if answer in decode(ids[i:end]))
            places += range(first, end + 1)  # and the end of the turn
            start = end
    return log_p[[place - 1 for place in places]], [ids[place] for place in places]


@pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
def test_every_figure_is_that_of_the_slow_way(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 3)  # so that answers of several chunks are seen
    model, processor = tiny.tiny(family, seed=1)
    reference, _ = tiny.tiny(family, seed=2)
    asked = rows(tmp_path)
    found = measure_text(model, processor, asked, reference)
    alone = measure_text(model, processor, asked)
    for i, row in enumerate(asked):
        log_q, tokens = slowly(model, processor, row)
        log_p, _ = slowly(reference, processor, row)
        index = torch.tensor(tokens)[:, None]
        assert found.tokens[i] == len(tokens)
        assert found.pictured[i] == (i < 2)
        assert found.nll[i] == pytest.approx(-log_q.gather(1, index).sum().item(), rel=1e-5)
        assert found.float_nll[i] == pytest.approx(-log_p.gather(1, index).sum().item(), rel=1e-5)
        assert found.kl[i] == pytest.approx((log_p.exp() * (log_p - log_q)).sum().item(), rel=1e-4)
        assert found.same[i] == (log_p.argmax(-1) == log_q.argmax(-1)).sum().item()
    assert alone.nll == pytest.approx(found.nll)
    assert alone.kl is None


def test_a_model_does_not_differ_from_itself(tmp_path: Path) -> None:
    model, processor = tiny.tiny("internvl")
    found = measure_text(model, processor, rows(tmp_path), model).to_json()
    for measure, value in (("kl", 0.0), ("top1", 1.0), ("perplexity_ratio", 1.0)):
        assert found[measure] == {"estimate": value, "low": value, "high": value}


def test_means_are_over_tokens_and_kinds_of_rows_are_told_apart() -> None:
    tokens, nll = np.array([1, 3, 6]), np.array([1.0, 6.0, 9.0])
    measures = TextMeasures(tokens, nll, np.array([True, True, False]), nll / 2, nll / 10, tokens / 2)
    found = measures.to_json()
    assert (found["rows"], found["tokens"]) == (3, 10)
    assert found["perplexity"]["estimate"] == pytest.approx(np.exp(16 / 10))
    assert found["perplexity_ratio"]["estimate"] == pytest.approx(np.exp(8 / 10))
    assert found["kl"]["estimate"] == pytest.approx(1.6 / 10)
    assert found["top1"]["estimate"] == pytest.approx(0.5)
    assert found["image"]["perplexity"]["estimate"] == pytest.approx(np.exp(7 / 4))
    assert found["text"]["tokens"] == 6
    assert "image" not in TextMeasures(tokens, nll, np.zeros(3, bool)).to_json()


def test_the_interval_resamples_rows_with_all_their_tokens() -> None:
    """Against drawing rows one set at a time."""
    generator = np.random.default_rng(0)
    counts = generator.integers(1, 30, 40)
    sums = counts * generator.gamma(2.0, size=40)
    draws = [generator.integers(0, 40, 40) for _ in range(5000)]
    slow = np.quantile([sums[drawn].sum() / counts[drawn].sum() for drawn in draws], [0.025, 0.975])
    found = statistics.ratio(sums, counts)
    assert found.estimate == pytest.approx(sums.sum() / counts.sum())
    assert [found.low, found.high] == pytest.approx(slow, rel=0.02)


def test_a_model_with_other_words_is_refused(tmp_path: Path) -> None:
    model, processor = tiny.tiny("internvl")
    other, _ = tiny.tiny("internvl")
    other.resize_token_embeddings(other.get_input_embeddings().weight.shape[0] + 8)
    with pytest.raises(MBQError, match="words; give the float model"):
        measure_text(model, processor, rows(tmp_path), other)


def test_the_command_asks_nothing_else_and_stores_what_it_prints(tmp_path: Path) -> None:
    for name, seed in (("float", 1), ("other", 2)):
        model, processor = tiny.tiny("internvl", seed=seed)
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    lines = [{"messages": [{"role": "user", "content": "Say it."}, said(answer)]} for answer in ANSWERS]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = io.StringIO()
    found = run(
        tmp_path / "other",
        baseline=tmp_path / "float",
        perplexity=data,
        limit=2,
        output=tmp_path / "runs",
        console=Console(file=out, width=100),
    )
    assert found == []
    stored = {name: Run.load(tmp_path / "runs" / name) for name in ("float", "other")}
    assert stored["other"].results is None
    assert stored["other"].info["text"]["rows"] == 2
    assert stored["float"].info["text"]["kl"] is None
    for key in ("perplexity", "kl"):
        assert f"{stored['other'].info['text'][key]['estimate']:.4g} (" in out.getvalue()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
def test_figures_on_a_gpu_are_those_of_the_cpu(family: str, tmp_path: Path) -> None:
    model, processor = tiny.tiny(family, seed=1)
    reference, _ = tiny.tiny(family, seed=2)
    asked = rows(tmp_path)
    expected = measure_text(model, processor, asked, reference)
    found = measure_text(model.to("cuda"), processor, asked, reference.to("cuda"))
    for name in ("tokens", "nll", "float_nll", "kl"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-3)
