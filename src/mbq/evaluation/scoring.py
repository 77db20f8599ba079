"""Whether a model's greedy answer to a question is the reference answer, from one forward pass a question.

Greedy decoding writes the reference answer and then ends its turn exactly if the argmax is right at every position of
the reference: up to the first wrong token both have read the same. So accuracy needs no generation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mbq.evaluation.questions import Batch, Questions, encode, prompt_of
from mbq.progress import Progress, silent
from mbq.rows import Row

KEPT_BYTES = 4e9  # embedded questions that are kept for the next model; more are computed anew for each


@torch.inference_mode()
def score(model: Any, questions: Questions, progress: Progress = silent) -> torch.Tensor:
    """Bool [row]: is the greedy answer, end of turn included, the reference answer?

    What the decoder's blocks read (embeddings of text and pictures, positions) is kept in ``questions`` and used again
    for every model whose embeddings, vision tower and projector are bit for bit the same: methods that quantize the
    language model's linears leave them alone.
    """
    right = torch.zeros(len(questions), dtype=torch.bool)
    ends = torch.tensor(_end_tokens(model), dtype=torch.long, device=model.device)
    decoder = _decoder(model)
    embedded = None if decoder is None else _embedded(model, decoder, questions)
    head = model.get_output_embeddings()
    for done, batch in enumerate(questions.batches):
        if decoder is None:
            logits = model(**_moved(batch.inputs, model)).logits.flatten(0, 1)[batch.positions.to(model.device)]
        else:
            kwargs = _decoder_inputs(model, decoder, batch) if embedded is None else embedded[done]
            hidden = decoder(**kwargs).last_hidden_state
            logits = head(hidden.flatten(0, 1)[batch.positions.to(hidden.device)])
        right[batch.rows] = _all_right(logits, batch, ends).cpu()
        progress("evaluate", done + 1, len(questions.batches), "")
    return right


def _all_right(logits: torch.Tensor, batch: Batch, ends: torch.Tensor) -> torch.Tensor:
    """Bool [question]: the argmax is right wherever a token of the answer or its end is predicted."""
    best = logits.argmax(-1)
    hit = best == batch.labels.to(best.device)
    hit |= batch.ends.to(best.device) & torch.isin(best, ends)
    wrong = torch.zeros(len(batch.rows), dtype=torch.long, device=best.device)
    return wrong.index_add_(0, batch.question.to(best.device), (~hit).long()) == 0


def _end_tokens(model: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _decoder(model: Any) -> nn.Module | None:
    """The module that runs the blocks on embeddings; None where it cannot be told, and the whole model has to run."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    whole = decoder is None or decoder is model or model.get_output_embeddings() is None
    return None if whole or not isinstance(getattr(decoder, "layers", None), nn.ModuleList) else decoder


class _Reached(Exception):
    """The decoder was called; what it was called with is all that is wanted."""


def _decoder_inputs(model: Any, decoder: nn.Module, batch: Batch) -> dict[str, Any]:
    """What the model calls its decoder with on this batch: embeddings, attention mask, positions."""
    caught: dict[str, Any] = {}

    def catch(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        caught.update(kwargs)
        raise _Reached

    hook = decoder.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        model(**_moved(batch.inputs, model), use_cache=False)
    except _Reached:
        pass
    finally:
        hook.remove()
    wanted = ("inputs_embeds", "attention_mask", "position_ids")
    return {name: caught[name] for name in wanted if caught.get(name) is not None} | {"use_cache": False}


def _embedded(model: Any, decoder: nn.Module, questions: Questions) -> list[dict[str, Any]] | None:
    """The decoder's inputs for every batch, or None if they are too many to keep."""
    tokens = sum(batch.inputs["input_ids"].numel() for batch in questions.batches)
    embeddings = model.get_input_embeddings().weight
    if tokens * embeddings.shape[1] * embeddings.element_size() > KEPT_BYTES:
        return None
    key = _fingerprint(model, decoder)
    if key not in questions.embedded:
        questions.embedded.clear()
        questions.embedded[key] = [_decoder_inputs(model, decoder, batch) for batch in questions.batches]
    return questions.embedded[key]


def _fingerprint(model: nn.Module, decoder: Any) -> str:
    """Of every tensor outside the decoder's blocks, and of where they are."""
    blocks = {id(tensor) for tensor in (*decoder.layers.parameters(), *decoder.layers.buffers())}
    digest = hashlib.sha256()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in blocks:
            raw = tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy()
            digest.update(f"{name} {tensor.dtype} {tensor.device}".encode() + raw.tobytes())
    return digest.hexdigest()


def _moved(inputs: dict[str, Any], model: Any) -> dict[str, Any]:
    return {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in inputs.items()}


@torch.inference_mode()
def answers(
    model: Any, processor: Any, rows: Sequence[Row], max_new_tokens: int = 64, batch_size: int = 32
) -> list[str]:
    """What the model writes by greedy decoding, one text a row; the rows' own answers are not shown to it."""
    texts: list[str] = []
    for start in range(0, len(rows), batch_size):
        chunk = rows[start : start + batch_size]
        for part in (chunk,) if len({bool(row.images) for row in chunk}) == 1 else ([row] for row in chunk):
            texts += _generate(model, processor, part, max_new_tokens)
    return texts


def _generate(model: Any, processor: Any, rows: Sequence[Row], max_new_tokens: int) -> list[str]:
    prompts = [prompt_of(row, processor) for row in rows]
    inputs = encode(prompts, rows, processor, padding_side="left")
    written = model.generate(**_moved(inputs, model), do_sample=False, max_new_tokens=max_new_tokens)
    return processor.tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
