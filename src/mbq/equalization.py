"""Channel-wise equalization: candidates, the loss, weights of tokens, the choice and the fold. Pure tensor code.

A group of linears reads X [token, channel]. A vector E, one positive number a channel, is multiplied into the columns
of their weights and divided out of what comes before, so the float model is unchanged:
``W X = (W diag(E)) (diag(E)^-1 X)``. (AWQ, arXiv 2306.00978; MBQ, arXiv 2412.19509.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import nn

from mbq import ranks
from mbq.errors import MBQError

ALPHAS = tuple(step / 20 for step in range(20))
POWERS = {"mae": 1, "mse": 2}
QUARTER = 4  # the part of the candidates that is compared again, on as many times more tokens
T = TypeVar("T")
_LEAST_CANDIDATE = 1e-4
_LEAST_MAXIMUM = 1e-5


@dataclass(frozen=True)
class Choice:
    """A group's vector [channel] in float32, the alpha that made it, and the loss at every alpha of ``ALPHAS``."""

    equalization: torch.Tensor
    alpha: float
    losses: tuple[float, ...] = ()


@dataclass(frozen=True)
class TokenRoles:
    """What each token of the whole calibration set is; bool [token], batches one after the other.

    vision    vision tokens
    language  positions that count as language
    counted   tokens that statistics and uniform weights see: all but padding, in the parity mode padding too
    own       those that went through this process's model
    lengths   tokens of each batch; ``own_lengths`` of this process's
    """

    vision: torch.Tensor
    language: torch.Tensor
    counted: torch.Tensor
    own: slice = field(default_factory=lambda: slice(None))
    lengths: tuple[int, ...] = ()
    own_lengths: tuple[int, ...] = ()

    def to(self, device: torch.device) -> TokenRoles:
        """The same there: a CPU would need longer to weigh tokens than a GPU to compare candidates on them."""
        vision, language, counted = (each.to(device) for each in (self.vision, self.language, self.counted))
        return replace(self, vision=vision, language=language, counted=counted)


def candidates(mean_abs: torch.Tensor) -> torch.Tensor:
    """E at every alpha of ``ALPHAS``, [alpha, channel], from the mean over tokens of |X|, [channel].

    E = clamp(mean^alpha, min 1e-4) / sqrt(max * min): the geometric middle of a candidate's range is 1.
    """
    powers = torch.stack([mean_abs.float().pow(alpha) for alpha in ALPHAS]).clamp(min=_LEAST_CANDIDATE)
    low, high = torch.aminmax(powers, dim=1, keepdim=True)
    return powers / (high * low).sqrt()


def token_loss(target: torch.Tensor, output: torch.Tensor, weights: torch.Tensor, power: int) -> torch.Tensor:
    """sum over tokens of w_t * mean over channels of |target - output|^power (MBQ, eq. 17), in float64.

    target [token, channel]; output [..., token, channel]; weights [token]. Power 1 is MAE, 2 is MSE.
    """
    difference = (target.float() - output.float()).abs_()
    if power != 1:
        difference = difference.pow_(power)
    return difference.mean(-1).double() @ weights.double()


def uniform_weights(roles: TokenRoles) -> torch.Tensor:
    """AWQ: 1/N for each of the N counted tokens."""
    return roles.counted.double() / roles.counted.sum()


def fixed_weights(roles: TokenRoles, vision_weight: float) -> torch.Tensor:
    """1 for a language token, a constant for a vision token (MBQ's first experiment, with 0.1)."""
    return roles.language.double() + vision_weight * roles.vision.double()


def mae_weights(roles: TokenRoles, ratio: float) -> torch.Tensor:
    """MBQ's MAE as released: 1 for a language token, ``ratio`` for a vision token, over the number of both."""
    return fixed_weights(roles, ratio) / (roles.language.sum() + roles.vision.sum())


def mse_weights(roles: TokenRoles, ratio: float) -> torch.Tensor:
    """MBQ's MSE as released: the mean over language tokens plus ``ratio`` times the mean over vision tokens."""
    language = roles.language.double() / roles.language.sum()
    if not roles.vision.any():
        return language
    return language + ratio * roles.vision.double() / roles.vision.sum()


def gradient_weights(roles: TokenRoles, language: float, vision: float) -> torch.Tensor:
    """MBQ's eq. 14-17 as written: the mean absolute gradient of the token's own modality."""
    return language * roles.language.double() + vision * roles.vision.double()


def best_candidate(
    mean_abs: torch.Tensor,
    losses: Callable[[torch.Tensor, T], torch.Tensor],
    name: str,
    comparisons: Sequence[tuple[int, T]],
) -> Choice:
    """The candidate with the least loss, the first of equals; one that is not finite never wins.

    Each of the ``comparisons`` says how many of the best are compared, and on what: ``losses(E [candidate, channel],
    what)`` are theirs. A candidate's loss is that of the last comparison that it was in.

    Raises MBQError, with the group's ``name``, where no candidate has a finite loss.
    """
    vectors = candidates(mean_abs)
    found, alive = torch.full((len(vectors),), math.nan, dtype=torch.float64), list(range(len(vectors)))
    for number, on in comparisons:
        alive = sorted(alive[:number])
        found[alive] = ranks.total(losses(vectors[alive], on).double()).cpu()
        alive = sorted((index for index in alive if math.isfinite(found[index])), key=found.tolist().__getitem__)
        if not alive:
            raise MBQError(f"No candidate of {name} has a finite loss; try --dtype float32 or check the checkpoint.")
    return Choice(vectors[alive[0]], ALPHAS[alive[0]], tuple(found.tolist()))


def rounds(tokens: int | None, weighted: int) -> list[tuple[int, int]]:
    """How many candidates are compared on how many of the ``weighted`` tokens, round after round.

    Successive halving (Jamieson and Talwalkar, arXiv 1502.07943): all are compared on ``tokens``, a quarter of them
    again on four times as many, and so on. ``tokens`` None: one round, on everything.
    """
    number, count = len(ALPHAS), weighted if tokens is None else min(tokens, weighted)
    found = [(number, count)]
    while count < weighted and number > 2:
        number, count = -(-number // QUARTER), min(QUARTER * count, weighted)
        found.append((number, count))
    return found


def drawn(weights: torch.Tensor, count: int) -> torch.Tensor:
    """``weights`` [unit] with all but about ``count`` set to 0, so that weighted sums stay what they are on average.

    A unit is drawn with a probability in proportion to its weight (at most 1) and weighs the inverse of that more.
    Systematic sampling (Madow 1949): evenly over the units' order, and always the same units.
    """
    weights = weights.double()
    if count >= int((weights > 0).sum()):
        return weights
    certain = torch.zeros_like(weights, dtype=torch.bool)
    while True:
        rest = weights.masked_fill(certain, 0)
        chance = (count - int(certain.sum())) * rest / rest.sum()
        if not bool((chance >= 1).any()):
            break
        certain |= chance >= 1
    steps = chance.cumsum(0)
    hit = (steps + 0.5).floor() > (steps - chance + 0.5).floor()
    return torch.where(hit, weights / chance, 0.0).where(~certain, weights)


def smoothquant_vector(max_abs: torch.Tensor, weights: Sequence[torch.Tensor], alpha: float) -> torch.Tensor:
    """E_j = max|X_j|^alpha / max|W_j|^(1 - alpha), [channel] (SmoothQuant, arXiv 2211.10438, eq. 4).

    max_abs [channel]; weights [out, channel], all that read X. Both maxima are at least 1e-5.
    """
    largest = torch.stack([weight.float().abs().amax(0) for weight in weights]).amax(0)
    return max_abs.float().clamp(min=_LEAST_MAXIMUM) ** alpha / largest.clamp(min=_LEAST_MAXIMUM) ** (1 - alpha)


def value_rows(rows: int, channels: int, head_dim: int, fused: bool) -> torch.Tensor | None:
    """[channel]: which of the ``rows`` outputs of the value projection makes each input channel of o_proj.

    Under grouped-query attention channel (kv head, query head, d) comes from row (kv head, d) of v_proj. In InternLM2's
    ``fused`` wqkv, whose rows are (kv head, queries + key + value, d), it comes from the last head_dim rows of its kv
    head. None where the numbers are not those of such heads.
    """
    if head_dim < 1:
        return None
    kv_heads = (rows - channels) // (2 * head_dim) if fused else rows // head_dim
    if kv_heads < 1 or channels % (kv_heads * head_dim):
        return None
    sharing = channels // (kv_heads * head_dim)
    each, value = (sharing + 2, sharing + 1) if fused else (1, 0)
    if rows != kv_heads * each * head_dim:
        return None
    first = (torch.arange(kv_heads) * each + value) * head_dim
    return (first[:, None, None] + torch.arange(head_dim)).expand(kv_heads, sharing, head_dim).flatten()


def shared_mean(values: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
    """``values`` [channel], each replaced by the mean over the channels with the same source row."""
    sources = sources.to(values.device)
    total = torch.zeros(int(sources.max()) + 1, dtype=values.dtype, device=values.device)
    count = torch.zeros_like(total).index_add_(0, sources, torch.ones_like(values))
    return (total.index_add_(0, sources, values) / count.clamp(min=1))[sources]


@torch.no_grad()
def fold(
    vector: torch.Tensor,
    sources: torch.Tensor,
    before: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    offset: float = 0.0,
) -> None:
    """Divide what makes the channels by E and multiply the columns that read them by it, in place.

    vector   [channel]
    sources  [channel]: the row behind each channel; rows that make no channel stay
    before   weight [row] of a norm, or [row, in] of a linear, and the bias [row] if there is one
    weights  [out, channel] of the linears that read the channels
    offset   what the norm adds to its weight before it multiplies (Gemma's: 1)
    """
    divisor = torch.ones(len(before[0]), device=vector.device)
    divisor[sources.to(vector.device)] = vector
    if offset:
        divisor = _divide_sum(before[0], divisor.to(before[0].device), offset).to(vector.device)
        before, vector = before[1:], divisor[sources.to(vector.device)]
    for parameter in before:
        rows = divisor.to(parameter.device).view(-1, *[1] * (parameter.ndim - 1))
        parameter.copy_(parameter.float() / rows)
    for weight in weights:
        weight.copy_(weight.float() * vector.to(weight.device))


def _divide_sum(weight: torch.Tensor, divisor: torch.Tensor, offset: float) -> torch.Tensor:
    """Divide ``offset`` + ``weight``, in place; returns [row] what it was divided by, in the weight's dtype.

    Near -``offset`` a weight of 16 bits is coarser than its sum: -0.97 + 1 may be wrong by 7 %. Rows whose sum is 0, or
    would become it, stay.
    """
    total = weight.double() + offset
    rounded = (total / divisor - offset).to(weight.dtype)
    left = rounded.double() + offset
    divides = (total != 0) & (left != 0)
    weight.copy_(torch.where(divides, rounded, weight))
    return torch.where(divides, total / left, 1.0).float()


@torch.no_grad()
def check_norm(norm: nn.Module, name: str, offset: float = 0.0) -> None:
    """Raise MBQError unless the norm's output is proportional to ``offset`` + its weight (Gemma's offset is 1)."""
    weight = getattr(norm, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.ndim == 1:
        nothing = {path: torch.zeros_like(parameter) for path, parameter in norm.named_parameters()}
        nothing["weight"] -= offset
        probe = torch.linspace(-1, 1, len(weight), dtype=weight.dtype, device=weight.device)[None]
        if not bool(torch.func.functional_call(norm, nothing, (probe,)).any()):
            return
    what = f"{offset:g} plus its weight" if offset else "its weight"
    raise MBQError(
        f"{name} ({type(norm).__name__}) does not multiply by {what}, so nothing can be folded into it; "
        "use --method rtn for this model."
    )
