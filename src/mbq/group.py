"""One group of one block as a method sees it: what its linears read, what is compared, and what each token weighs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mbq import ranks
from mbq.architecture import LinearGroup
from mbq.blocks import Call, GroupTrace, device_of, run_with
from mbq.equalization import POWERS, Choice, TokenRoles, best_candidate, shared_mean, token_loss
from mbq.qtensor import fake_quantize, fake_quantize_activations
from mbq.scheme import Scheme

# Tokens that go through an MLP or linear at once: bounds the memory of its intermediate activations.
_TOKENS_AT_ONCE = 8192


@dataclass(frozen=True)
class Weighing:
    """What mbq weighs tokens by: gradients of one block and part, and their ratio (vision / language, floored)."""

    language: float
    vision: float
    ratio: float


@dataclass(frozen=True)
class Group:
    """Everything that a method may look at to choose a group's vector.

    name      block and group, for messages
    norm_fed  what comes before is a norm, not a linear
    sources   [channel]: the row of what comes before that makes each channel
    module    the inspected module
    weights   the group's linears that are quantized: paths in the inspected module, and weights [out, channel]
    seen      what goes in: ``inputs`` [batch, token, channel] and the inspected module's calls, a batch each
    targets   [batch, token, channel] a batch: the inspected module's output in the float model
    weighing  None for methods that need no sensitivity
    """

    name: str
    group: LinearGroup
    norm_fed: bool
    sources: torch.Tensor
    module: nn.Module
    weights: dict[str, torch.Tensor]
    seen: GroupTrace
    targets: list[torch.Tensor]
    roles: TokenRoles
    weighing: Weighing | None
    scheme: Scheme

    def mean_abs(self) -> torch.Tensor:
        """Mean of |X| over the counted tokens, [channel]; the same for channels that come from one row."""
        total = ranks.total(torch.stack([x.float().abs().sum(0) for x in self._counted()]).double().sum(0))
        return shared_mean(total / int(self.roles.counted.sum()), self.sources).float()

    def max_abs(self) -> torch.Tensor:
        """Maximum of |X| over the counted tokens, [channel]."""
        return ranks.largest(torch.stack([x.float().abs().amax(0) for x in self._counted()]).amax(0))

    def search(self, token_weights: torch.Tensor, norm: str) -> Choice:
        """The candidate with the least loss, under the weights [token] of the whole calibration set's tokens."""
        pieces = self._pieces(token_weights[self.roles.own])
        mean_abs = self.mean_abs().to(device_of(self.module))
        return best_candidate(mean_abs, lambda vector: self._loss(vector, pieces, POWERS[norm]), self.name)

    def _loss(self, vector: torch.Tensor, pieces: Sequence[_Piece], power: int) -> torch.Tensor:
        """Weighted error of the inspected module's output, the group quantized under E: Q_w(W E) Q_a(E^-1 X)."""
        weights = {name: self._candidate(weight, vector) for name, weight in self.weights.items()}
        total = torch.zeros((), dtype=torch.float64, device=vector.device)
        for piece in pieces:
            read = None
            if self.scheme.activations is not None:
                equalized = (piece.x.to(vector.device).float() / vector).to(piece.x.dtype)
                quantized = fake_quantize_activations(equalized, self.scheme.activations)
                read = lambda _, quantized=quantized: quantized  # noqa: E731
            output = run_with(self.module, piece.call, weights, read).flatten(0, -2)
            if piece.tokens is not None:
                output = output[piece.tokens]
            total += token_loss(piece.target.to(vector.device), output, piece.weights, power)
        return total

    def _candidate(self, weight: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        """What a linear multiplies with: Q(W E), over E again where X is not divided by it (16-bit activations)."""
        quantized = fake_quantize((weight.float() * vector).to(weight.dtype), self.scheme.weights)
        if self.scheme.activations is not None:
            return quantized
        return (quantized.float() / vector).to(weight.dtype)

    def _pieces(self, token_weights: torch.Tensor) -> list[_Piece]:
        """The work of one evaluation. A token that weighs nothing is left out where no other token can see it."""
        device = device_of(self.module)
        if self._token_wise():
            keep = token_weights.nonzero().flatten()
            x, target = (_rows(each, keep).split(_TOKENS_AT_ONCE) for each in (self.seen.inputs, self.targets))
            weights = token_weights[keep].to(device).split(_TOKENS_AT_ONCE)
            return [_Piece(Call((x,), {}), x, y, w) for x, y, w in zip(x, target, weights, strict=True)]
        pieces = []
        for x, call, y, w in zip(
            self.seen.inputs, self.seen.calls, self.targets, self._split(token_weights), strict=True
        ):
            keep = w.nonzero().flatten()
            pieces.append(_Piece(call, x, _rows([y], keep), w[keep].to(device), keep.to(device)))
        return pieces

    def _token_wise(self) -> bool:
        """Whether the inspected module treats each token alone: one linear, or the MLP."""
        return self.group.inspect in self.group.linears or (self.group.inspect != "" and self.group.part == "mlp")

    def _counted(self) -> list[torch.Tensor]:
        pairs = zip(self.seen.inputs, self._split(self.roles.counted[self.roles.own]), strict=True)
        return [_rows([x], counted.nonzero().flatten()) for x, counted in pairs]

    def _split(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return values.split([x.shape[:-1].numel() for x in self.seen.inputs])


@dataclass(frozen=True)
class _Piece:
    """One call of the inspected module: x as the linears read it; target and weights of its ``tokens`` (None: all)."""

    call: Call
    x: torch.Tensor
    target: torch.Tensor
    weights: torch.Tensor
    tokens: torch.Tensor | None = None


def _rows(batches: Sequence[torch.Tensor], keep: torch.Tensor) -> torch.Tensor:
    """[token, channel]: the tokens ``keep`` of all batches, counted through from the first."""
    flat = torch.cat([batch.flatten(0, -2) for batch in batches])
    return flat[keep.to(flat.device)]
