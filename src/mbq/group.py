"""One group of one block as a method sees it: what its linears read, what is compared, and what each token weighs."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from mbq import ranks
from mbq.architecture import LinearGroup
from mbq.blocks import Call, device_of, run_with
from mbq.equalization import POWERS, Choice, TokenRoles, best_candidate, drawn, rounds, shared_mean, token_loss
from mbq.kernels.candidates import candidates
from mbq.qtensor import fake_quantize_activations
from mbq.scheme import Scheme
from mbq.trace import GroupTrace, Look

log = logging.getLogger(__name__)

# Tokens that go through an MLP or linear at once: bounds the memory of its intermediate activations.
_TOKENS_AT_ONCE = 8192
# Bytes of inputs of an attention, times candidates and calls, that are one call: small ones cost their launches.
_AT_ONCE = 2**26


# How many candidates are compared, and the weights [token] under which.
Comparisons = Sequence[tuple[int, torch.Tensor]]


@dataclass(frozen=True)
class Weighing:
    """What mbq weighs tokens by: gradients of one block and part, and their ratio (vision / language, floored)."""

    language: float
    vision: float
    ratio: float


@dataclass(frozen=True)
class Group:
    """Everything that a method may look at to choose a group's vector.

    name         block and group, for messages
    norm_fed     what comes before is a norm, not a linear
    sources      [channel]: the row of what comes before that makes each channel
    module       the inspected module
    weights      the group's linears that are quantized: paths in the inspected module, and weights [out, channel]
    comparisons  how many candidates are compared under which weights [token] of the whole calibration set's tokens
    seen         what goes in
    targets      the inspected module's output in the float model
    roles        of the tokens; an expert counts those that are sent to it alone
    tokens       how many these are, None where all tokens go everywhere
    """

    name: str
    group: LinearGroup
    norm_fed: bool
    sources: torch.Tensor
    module: nn.Module
    weights: dict[str, torch.Tensor]
    comparisons: Comparisons
    seen: GroupTrace
    targets: GroupTrace
    roles: TokenRoles
    scheme: Scheme
    tokens: int | None = None

    def mean_abs(self) -> torch.Tensor:
        """Mean of |X| over the counted tokens, [channel]; the same for channels that come from one row."""
        total = ranks.total(self._seen(self.seen.sums).double().sum(0))
        return shared_mean(total / int(self.roles.counted.sum()), self.sources).float()

    def max_abs(self) -> torch.Tensor:
        """Maximum of |X| over the counted tokens, [channel]."""
        return ranks.largest(self._seen(self.seen.maxima).amax(0))

    def _seen(self, batches: Sequence[torch.Tensor]) -> torch.Tensor:
        """[batch, channel]; zeros where no batch of this process has a token of the group's expert."""
        return torch.stack(list(batches) or [torch.zeros(len(self.sources), device=device_of(self.module))])

    def search(self, norm: str) -> Choice:
        """The candidate that wins the ``comparisons``, errors taken by ``norm``."""

        def losses(vectors: torch.Tensor, token_weights: torch.Tensor) -> torch.Tensor:
            pieces = self._pieces(token_weights[self.roles.own])
            largest = max((piece.x.nbytes for piece in pieces), default=1)
            several = 1 if token_wise(self.group) else max(1, _AT_ONCE // largest)
            return torch.cat([self._losses(some, pieces, POWERS[norm]) for some in vectors.split(several)])

        return best_candidate(self.mean_abs(), losses, self.name, self.comparisons)

    def _losses(self, vectors: torch.Tensor, pieces: Sequence[_Piece], power: int) -> torch.Tensor:
        """Weighted error of the inspected module's output, the group quantized under E: Q_w(W E) Q_a(E^-1 X).

        vectors [candidate, channel]; [candidate].
        """
        divided = self.scheme.activations is None  # else X is
        weights = {
            name: candidates(weight, vectors, self.scheme.weights, divided) for name, weight in self.weights.items()
        }
        total = torch.zeros(len(vectors), dtype=torch.float64, device=vectors.device)
        for some in _alike(pieces, len(vectors)):
            calls = [piece.call.to(vectors.device) for piece in some]
            if self.group.mixture:
                outputs = self._mixture_output(calls[0], weights, vectors)
            else:
                read = [self._equalized(piece.x.to(vectors.device), vectors) for piece in some]
                outputs = _outputs(self.module, calls, weights, read)
            for piece, output in zip(some, outputs.unbind(1), strict=True):
                output = output.flatten(1, -2)
                kept = output if piece.tokens is None else output[:, piece.tokens]
                total += token_loss(piece.target.to(vectors.device), kept, piece.weights, power)
        return total

    def _equalized(self, x: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor | None:
        """Q_a(E^-1 X) of every candidate, [candidate, ..., channel]; None where activations stay in 16 bits."""
        if self.scheme.activations is None:
            return None
        return torch.stack([self._read(x, vector) for vector in vectors])

    def _read(self, x: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        """Q_a(E^-1 X)."""
        assert self.scheme.activations is not None
        return fake_quantize_activations((x.float() / vector).to(x.dtype), self.scheme.activations)

    def _mixture_output(self, call: Call, weights: Mapping[str, torch.Tensor], vectors: torch.Tensor) -> torch.Tensor:
        """[1, 1, ...]: of one candidate, whose linears each read the tokens that the router sends to their expert."""
        read = None if self.scheme.activations is None else partial(self._read, vector=vectors[0])
        call = Call(tuple(each[None] for each in call.args), {})  # transformers' mixtures want samples and tokens
        return run_with(self.module, call, {name: weight[0] for name, weight in weights.items()}, read)[None]

    def _pieces(self, token_weights: torch.Tensor) -> list[_Piece]:
        """The work of one comparison. A token that weighs nothing is left out where no other token can see it."""
        device, look = device_of(self.module), self.seen.look
        assert look is not None
        if not self.seen.batches:
            return []
        if look.alone:
            weights = token_weights[look.compared.to(token_weights.device)]
            keep = weights.nonzero().flatten()
            x, target = (_rows(each, keep).split(_TOKENS_AT_ONCE) for each in (self.seen.inputs, self.targets.outputs))
            each = weights[keep].to(device).split(_TOKENS_AT_ONCE)
            return [_Piece(Call((x,), {}), x, y, w) for x, y, w in zip(x, target, each, strict=True)]
        pieces = []
        batches = token_weights.split(self.roles.own_lengths)
        for batch, x, call, y in zip(
            self.seen.batches, self.seen.inputs, self.seen.calls, self.targets.outputs, strict=True
        ):
            keep = batches[batch].nonzero().flatten()
            if len(keep):
                pieces.append(_Piece(call, x, _rows([y], keep), batches[batch][keep].to(device), keep.to(device)))
        return pieces


def token_wise(group: LinearGroup) -> bool:
    """Whether the inspected module treats each token alone: one linear, or the MLP."""
    return group.inspect in group.linears or (group.inspect != "" and group.part == "mlp")


def comparisons(
    group: LinearGroup, token_weights: torch.Tensor | None, roles: TokenRoles, tokens: int | None
) -> Comparisons:
    """Those of a race whose first looks at ``tokens`` (None: one comparison, of everything); none without weights."""
    if token_weights is None:
        return []
    weighted = int((token_weights > 0).sum())
    return [(number, _drawn(group, token_weights, roles, count)) for number, count in rounds(tokens, weighted)]


def look(group: LinearGroup, compared: Comparisons, roles: TokenRoles, routed: torch.Tensor | None = None) -> Look:
    """What a trace must keep for these; ``routed``, bool [token], are the tokens that the group's expert gets."""
    needed = torch.zeros_like(roles.counted)
    for _, weights in compared:
        needed |= weights > 0
    own = None if routed is None else routed[roles.own].cpu()
    return Look(roles.counted[roles.own].cpu(), needed[roles.own].cpu(), token_wise(group), own)


def _drawn(group: LinearGroup, token_weights: torch.Tensor, roles: TokenRoles, count: int) -> torch.Tensor:
    """Other weights, of ``count`` tokens; of whole batches of them where tokens are not treated alone."""
    weighted = int((token_weights > 0).sum())
    if token_wise(group) or count >= weighted:
        return drawn(token_weights, count)
    batches = token_weights.split(roles.lengths)
    whole = torch.stack([weights.double().sum() for weights in batches])
    kept = drawn(whole, math.ceil(count / weighted * len(batches)))
    return torch.cat([w * (new / old if old else 0) for w, new, old in zip(batches, kept, whole, strict=True)])


@dataclass(frozen=True)
class _Piece:
    """One call of the inspected module: x as the linears read it; target and weights of its ``tokens`` (None: all)."""

    call: Call
    x: torch.Tensor
    target: torch.Tensor
    weights: torch.Tensor
    tokens: torch.Tensor | None = None


def _rows(batches: Sequence[torch.Tensor], keep: torch.Tensor) -> torch.Tensor:
    """[token, channel]: the tokens ``keep`` of all batches, in order and counted through from the first."""
    flat = [batch.flatten(0, -2) for batch in batches]
    ends = torch.tensor([len(each) for each in flat]).cumsum(0)
    places = torch.searchsorted(keep, ends.to(keep.device)).tolist()
    rows, start, done = [], 0, 0
    for each, end, place in zip(flat, ends.tolist(), places, strict=True):
        own = keep[done:place] - start
        rows.append(each if len(own) == len(each) else each[own.to(each.device)])
        start, done = end, place
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _alike(pieces: Sequence[_Piece], candidates: int) -> Iterator[list[_Piece]]:
    """Pieces whose calls differ in numbers alone, as many at once as ``_AT_ONCE`` allows."""
    forms: dict[str, list[_Piece]] = {}
    for index, piece in enumerate(pieces):
        form = str(index) if piece.tokens is None else f"{tuple(piece.x.shape)} {piece.call.form()}"
        forms.setdefault(form, []).append(piece)
    for found in forms.values():
        several = max(1, _AT_ONCE // (candidates * found[0].x.nbytes)) if found[0].x.nbytes else len(found)
        for start in range(0, len(found), several):
            yield found[start : start + several]


def _outputs(
    module: nn.Module,
    calls: Sequence[Call],
    weights: Mapping[str, torch.Tensor],
    read: Sequence[torch.Tensor | None],
) -> torch.Tensor:
    """The module's outputs, [candidate, call, ...], with each candidate's ``weights`` [candidate, out, in].

    ``read`` is what the linears then read in each call, [candidate, ...]. Several are one call of the module.
    """

    def one(weights: Mapping[str, torch.Tensor], read: torch.Tensor | None, tensors: Any) -> torch.Tensor:
        return run_with(module, calls[0].with_tensors(tensors), weights, None if read is None else lambda _: read)

    several, tensors = len(next(iter(weights.values()))), [call.tensors() for call in calls]
    if several == len(calls) == 1:
        first = {name: weight[0] for name, weight in weights.items()}
        return one(first, None if read[0] is None else read[0][0], tensors[0])[None, None]
    together = [torch.stack(each) for each in zip(*tensors, strict=True)]
    quantized = None if read[0] is None else torch.stack([each for each in read if each is not None], dim=1)
    own = None if quantized is None else 0
    with warnings.catch_warnings():  # an attention kernel that takes one after the other is no news
        warnings.filterwarnings("ignore", message="There is a performance drop")
        every_call = torch.vmap(one, in_dims=(None, own, 0))
        try:
            return torch.vmap(every_call, in_dims=(0, own, None))(weights, quantized, together)
        except RuntimeError as error:  # a model whose code looks at the numbers in its tensors
            log.info("%s runs one call at a time: %s", type(module).__name__, str(error).partition("\n")[0])
    rows = []
    for index in range(several):
        candidate = {name: weight[index : index + 1] for name, weight in weights.items()}
        pairs = [
            (call, None if each is None else each[index : index + 1]) for call, each in zip(calls, read, strict=True)
        ]
        rows.append(torch.cat([_outputs(module, [call], candidate, [each]) for call, each in pairs], dim=1))
    return torch.cat(rows)
