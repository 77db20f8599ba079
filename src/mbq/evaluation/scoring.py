"""Whether a model's greedy answer to a question is the reference answer, from one forward pass.

Greedy decoding writes the reference answer and then ends its turn exactly if the argmax is right at every position of
the reference: up to the first wrong token both have read the same. So accuracy needs no generation.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch

from mbq.calibration import CROSS_ATTENTION_MASK
from mbq.evaluation.packed import PackedDecoder, on_device
from mbq.evaluation.questions import Batch, Questions, encode
from mbq.progress import Progress, silent


@torch.inference_mode()
def score(model: Any, questions: Questions, progress: Progress = silent) -> torch.Tensor:
    """Bool [row]: is the greedy answer, end of turn included, the reference answer?

    What the decoder's blocks read (embeddings of text and pictures, positions) is kept in ``questions`` and used again
    for every model whose embeddings, vision tower and projector are bit for bit the same: methods that quantize the
    language model's linears leave them alone. A model whose decoder cannot be called apart (the original InternVL2)
    reads each question on its own.
    """
    ends = torch.tensor(_end_tokens(model), dtype=torch.long, device=model.device)
    found = []
    for batch, logits in answer_logits(model, questions):
        found.append(_all_right(logits, batch, ends))
        progress("evaluate", len(found), len(questions.batches), "")
    right = torch.zeros(len(questions), dtype=torch.bool)
    right[torch.cat([batch.rows for batch in questions.batches])] = torch.cat(found).cpu()
    return right


def answer_logits(model: Any, questions: Questions) -> Iterator[tuple[Batch, torch.Tensor]]:
    """Each batch on the model's device, and its logits [answer token, vocabulary]."""
    packed = PackedDecoder(model, questions) if PackedDecoder.supports(model) else None
    for number, batch in enumerate(questions.batches):
        logits = packed.logits(number) if packed else _plain_logits(model, questions, batch)
        yield batch.to(model.device), logits


@torch.inference_mode()
def answer_losses(model: Any, questions: Questions) -> torch.Tensor:
    """float32 [row]: mean -log p of the answer's own tokens, without the end of turn; NaN where it has none."""
    found = torch.full((len(questions),), float("nan"))
    for batch, logits in answer_logits(model, questions):
        losses = torch.nn.functional.cross_entropy(logits.float(), batch.labels, reduction="none")
        own = (~batch.ends).float()
        sums, counts = (losses.new_zeros(len(batch.rows)).index_add_(0, batch.question, x) for x in (losses * own, own))
        found[batch.rows.cpu()] = (sums / counts).cpu()
    return found


def _all_right(logits: torch.Tensor, batch: Batch, ends: torch.Tensor) -> torch.Tensor:
    """Bool [question]: the argmax is right wherever a token of the answer or its end is predicted."""
    best = logits.max(-1).indices  # the first of equals, as argmax, which is four times slower on CPUs in bf16
    hit = (best == batch.labels) | (batch.ends & torch.isin(best, ends))
    wrong = torch.zeros(len(batch.rows), dtype=torch.long, device=best.device)
    return wrong.index_add_(0, batch.question, (~hit).long()) == 0


def _end_tokens(model: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _plain_logits(model: Any, questions: Questions, batch: Batch) -> torch.Tensor:
    """[answer token, vocabulary], every question a sequence of its own through the model's forward."""
    chosen = batch.rows.tolist()
    inputs = encode([questions.prompts[i] for i in chosen], [questions.rows[i] for i in chosen], questions.processor)
    counts = torch.bincount(batch.question)
    step = torch.arange(len(batch.question)) - (counts.cumsum(0) - counts)[batch.question]
    place = inputs["attention_mask"].sum(1)[batch.question] + step  # where the token stands, behind its prompt
    shape, width = inputs["input_ids"].shape, int(place.max()) + 1
    inputs |= {
        name: torch.nn.functional.pad(value, (0, width - shape[1]))
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor) and value.shape == shape
    }
    if CROSS_ATTENTION_MASK in inputs:  # [question, token, ...]: what follows sees what the last token sees
        columns = torch.arange(width).clamp(max=shape[1] - 1)
        inputs[CROSS_ATTENTION_MASK] = inputs[CROSS_ATTENTION_MASK][:, columns]
    inputs["input_ids"][batch.question, place] = batch.labels
    inputs["attention_mask"][batch.question, place] = 1
    wanted, column = (place - 1).unique(return_inverse=True)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:  # all of them may be gigabytes
        inputs["logits_to_keep"] = wanted
    else:
        column = place - 1
    return model(**on_device(inputs, model)).logits[batch.question, column]
