"""Perplexity of a model on answers that are given, and how far its next-token distributions are from the float model's.

Counted are the tokens of the assistant's answers and the token that ends each (``CalibrationBatch.labels``), of rows
with pictures and of rows without alike: system prompts, questions and pictures are read and not predicted. To have a
plain text counted, make it an assistant's turn.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich import box
from rich.table import Table

from mbq.architecture import bind
from mbq.calibration import NO_LABEL, CalibrationBatch, encode
from mbq.errors import MBQError
from mbq.evaluation.packed import on_device
from mbq.evaluation.statistics import Interval, ratio
from mbq.progress import Progress, silent
from mbq.rows import Row

MEASURES = (
    ("perplexity", "perplexity", 1),
    ("perplexity_ratio", "  over the baseline's", 1),
    ("kl", "KL from the baseline, nats", 1),
    ("top1", "same likeliest token, %", 100),
)
CHUNK = 128  # tokens whose distributions over the whole vocabulary are held in float32 at once


@dataclass(frozen=True)
class TextMeasures:
    """Sums over the answer tokens of each row, from which every mean and interval comes.

    tokens    int [row]
    nll       [row] negative log-likelihood of the tokens, in nats
    pictured  bool [row], the rows that show pictures
    float_nll, kl, same  [row] what the float model's was, the KL divergence KL(float || model) in nats, and how many
                         tokens both find likeliest; None without a float model
    """

    tokens: np.ndarray
    nll: np.ndarray
    pictured: np.ndarray
    float_nll: np.ndarray | None = None
    kl: np.ndarray | None = None
    same: np.ndarray | None = None

    def to_json(self) -> dict[str, Any]:
        """What run.json holds: all rows together, and apart those with and without pictures where there are both."""
        found = self._summary(np.ones(len(self.tokens), bool))
        if self.pictured.any() and not self.pictured.all():
            found |= {"image": self._summary(self.pictured), "text": self._summary(~self.pictured)}
        return found

    def _summary(self, rows: np.ndarray) -> dict[str, Any]:
        tokens, nll = self.tokens[rows], self.nll[rows]
        found: dict[str, Any] = {
            "rows": int(rows.sum()),
            "tokens": int(tokens.sum()),
            "perplexity": vars(_exp(ratio(nll, tokens))),
            "perplexity_ratio": None,
            "kl": None,
            "top1": None,
        }
        if self.kl is not None and self.same is not None and self.float_nll is not None:
            found["perplexity_ratio"] = vars(_exp(ratio(nll - self.float_nll[rows], tokens)))
            found["kl"] = vars(ratio(self.kl[rows], tokens))
            found["top1"] = vars(ratio(self.same[rows], tokens))
        return found


def _exp(interval: Interval) -> Interval:
    return Interval(*(float(np.exp(value)) for value in vars(interval).values()))


@torch.inference_mode()
def measure_text(
    model: Any, processor: Any, rows: Sequence[Row], reference: Any = None, progress: Progress = silent
) -> TextMeasures:
    """Read ``rows`` one by one with ``model`` and, side by side, with the float model ``reference``.

    A row's logits are those of its answer tokens alone, are gone before the next row, and are compared CHUNK tokens at
    a time: memory does not grow with the number of rows.

    Raises MBQError for a row without an answer, and where the two models' vocabularies differ.
    """
    if not rows:
        raise MBQError("There are no rows to measure perplexity on; give some with --perplexity.")
    vision = set(bind(model).vision_tokens)
    sums = []
    for done, row in enumerate(rows, start=1):
        batch = encode(row, processor, vision, max_length=2**31)
        places = (batch.labels[0] != NO_LABEL).nonzero()[:, 0]
        labels = batch.labels[0, places]
        logits = _logits(model, batch, places)
        others = None if reference is None else _logits(reference, batch, places).to(logits.device)
        if others is not None and others.shape != logits.shape:
            raise MBQError(
                f"The models have {logits.shape[1]} and {others.shape[1]} words; give the float model that the folder "
                "was made from."
            )
        sums.append([len(places), bool(row.images), *_sums(logits, labels.to(logits.device), others)])
        progress("perplexity", done, len(rows), "")
    columns = [np.array(column) for column in zip(*sums, strict=True)]
    tokens, pictured, nll = columns[0], columns[1], columns[2]
    return TextMeasures(tokens, nll, pictured, *columns[3:])


def _logits(model: Any, batch: CalibrationBatch, places: torch.Tensor) -> torch.Tensor:
    """[answer token, vocabulary]: what predicts the tokens at ``places``, each one position before it."""
    wanted = (places - 1).to(model.device)
    inputs = {
        name: value.to(model.dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in batch.inputs.items()
    }
    if "logits_to_keep" in inspect.signature(model.forward).parameters:  # all of them may be gigabytes
        return model(**on_device(inputs, model), logits_to_keep=wanted, use_cache=False).logits[0]
    return model(**on_device(inputs, model), use_cache=False).logits[0, wanted]


def _sums(logits: torch.Tensor, labels: torch.Tensor, others: torch.Tensor | None) -> list[float]:
    """Over the tokens: negative log-likelihood and, with the float model's logits, its own, KL and equal argmaxes."""
    total = torch.zeros(1 if others is None else 4, dtype=torch.float64)
    for start in range(0, len(labels), CHUNK):
        part = slice(start, start + CHUNK)
        column = labels[part, None]
        log_q = logits[part].float().log_softmax(-1)
        total[0] -= log_q.gather(1, column).double().sum().cpu()
        if others is not None:
            log_p = others[part].float().log_softmax(-1)
            total[1] -= log_p.gather(1, column).double().sum().cpu()
            # A word that both rule out (-inf, a padded vocabulary's) adds nothing.
            kl = torch.where(log_p == log_q, 0.0, log_p.exp() * (log_p - log_q))
            total[2] += kl.sum(-1).double().sum().cpu()
            total[3] += (log_p.argmax(-1) == log_q.argmax(-1)).sum().cpu()
    return total.tolist()


def text_table(names: Sequence[str], found: Sequence[dict[str, Any]]) -> Table:
    """A row a measure, a column a model, of what ``TextMeasures.to_json`` says."""
    title = f"Answers given, {found[0]['tokens']} tokens of {found[0]['rows']} rows (95 % interval)"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right")
    for kind in ("", "image", "text"):
        parts = [each[kind] if kind else each for each in found if not kind or kind in each]
        for key, label, scale in MEASURES if parts else ():
            cells = ["" if part[key] is None else _cell(part[key], scale) for part in parts]
            if any(cells):
                table.add_row(f"{label}, {kind} rows" if kind else label, *cells, end_section=key == "top1")
    return table


def _cell(interval: dict[str, float], scale: float) -> str:
    return "{:.4g} ({:.4g} to {:.4g})".format(*(scale * interval[name] for name in ("estimate", "low", "high")))
