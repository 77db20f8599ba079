"""Run a model's decoder on packed sequences: several questions behind one picture, blind to each other.

A question's tokens attend to the common beginning and to themselves, and stand at the positions that they have in a
prompt of their own, so the hidden states are those of separate sequences.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from mbq.evaluation.questions import PADDING, Batch, Questions, encode
from mbq.families import FAMILIES

KEPT_BYTES = 2e9  # of embeddings that are kept for the next model; what is more is computed anew for each


class PackedDecoder:
    """The decoder of ``model``, called on embeddings that all models with the same tower and embeddings share."""

    def __init__(self, model: Any, questions: Questions) -> None:
        self.model, self.questions = model, questions
        self.decoder = model.get_decoder()
        weight = model.get_input_embeddings().weight
        tokens = sum(batch.ids.numel() for batch in questions.batches)
        self.kept: dict[int, tuple[Batch, dict[str, torch.Tensor]]] = {}
        if tokens * weight.shape[1] * weight.element_size() <= KEPT_BYTES:
            key = self._fingerprint()
            if key not in questions.kept:
                questions.kept.clear()
            self.kept = questions.kept.setdefault(key, self.kept)
            self.keeps = True
        else:
            self.keeps = False

    @staticmethod
    def supports(model: Any) -> bool:
        """Whether the decoder can be called apart, on its own masks: known families in transformers' own classes.

        Other models may treat embeddings or pictures in ways that nobody has checked; they read questions one by one.
        """
        known = FAMILIES.get(type(model).__name__, ())
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
        masks = getattr(model.config, "_attn_implementation", None) in ("sdpa", "eager")
        windows = getattr(getattr(decoder, "config", None), "sliding_window", None) is not None
        layers = isinstance(getattr(decoder, "layers", None), nn.ModuleList)
        return any(variant.packs for variant in known) and masks and not windows and layers

    def logits(self, number: int) -> torch.Tensor:
        """[answer token, vocabulary] of one batch of the questions."""
        batch, inputs = self.kept.get(number) or self._embedded(self.questions.batches[number].to(self.model.device))
        if self.keeps:
            self.kept[number] = batch, inputs
        hidden = self.decoder(
            **inputs, attention_mask=_mask(batch.segment, inputs["inputs_embeds"].dtype), use_cache=False
        ).last_hidden_state
        return self.model.get_output_embeddings()(hidden.flatten(0, 1)[batch.positions])

    def _embedded(self, batch: Batch) -> tuple[Batch, dict[str, torch.Tensor]]:
        """The decoder's embeddings and positions: of the common beginnings as the model itself computes them."""
        questions = self.questions
        rows = [questions.rows[i] for i in batch.leaders]
        caught = self._caught(encode([questions.prompts[i] for i in batch.leaders], rows, questions.processor))
        embeddings = self.model.get_input_embeddings()(batch.ids)
        width = min(caught["inputs_embeds"].shape[1], embeddings.shape[1])
        common = (batch.segment[:, :width] == 0)[..., None]
        embeddings[:, :width] = torch.where(common, caught["inputs_embeds"][:, :width], embeddings[:, :width])
        positions = caught.get("position_ids")
        if positions is None:
            return batch, {"inputs_embeds": embeddings, "position_ids": batch.step}
        # Behind the pictures positions go up by one a token: what they run ahead of the index is a number a sequence.
        last = caught["attention_mask"].sum(1) - 1
        ahead = positions.gather(-1, last.expand(positions.shape[:-1])[..., None]) - last[:, None]
        moved = batch.step + ahead
        moved[..., :width] = torch.where(common[..., 0], positions[..., :width], moved[..., :width])
        return batch, {"inputs_embeds": embeddings, "position_ids": moved}

    def _caught(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """What the model calls its decoder with."""
        caught: dict[str, Any] = {}

        def catch(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            caught.update(kwargs)
            raise _Reached

        hook = self.decoder.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            self.model(**on_device(inputs, self.model), use_cache=False)
        except _Reached:
            pass
        finally:
            hook.remove()
        return {name: value for name, value in caught.items() if isinstance(value, torch.Tensor)}

    def _fingerprint(self) -> str:
        """Of every tensor outside the decoder's blocks."""
        blocks = {id(tensor) for tensor in (*self.decoder.layers.parameters(), *self.decoder.layers.buffers())}
        digest = hashlib.sha256()
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            if id(tensor) not in blocks:
                raw = tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy()
                digest.update(f"{name} {tensor.dtype} {tensor.device}".encode() + raw.tobytes())
        return digest.hexdigest()


class _Reached(Exception):
    """The decoder was called; what it was called with is all that is wanted."""


def _mask(segment: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[sequence, 1, token, token] to add to attention scores: 0 where a token may look, else the least number.

    A token sees the tokens before it of the common beginning and of its own question; padding sees itself only.
    """
    width = segment.shape[1]
    earlier = torch.ones(width, width, dtype=torch.bool, device=segment.device).tril()
    query, key = segment[:, :, None], segment[:, None, :]
    seen = earlier & ((key == 0) | (key == query)) & (query != PADDING)
    seen |= torch.eye(width, dtype=torch.bool, device=segment.device)
    return torch.zeros(seen.shape, dtype=dtype, device=segment.device).masked_fill_(~seen, torch.finfo(dtype).min)[
        :, None
    ]


def on_device(inputs: dict[str, Any], model: Any) -> dict[str, Any]:
    return {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in inputs.items()}
