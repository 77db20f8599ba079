"""Equalize a model block by block: every group of a block is searched on the unfolded block, then all are folded."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mbq import ranks
from mbq.architecture import Binding, LinearGroup
from mbq.blocks import Call, Inputs, capture, device_of, placed, reached, run_with
from mbq.calibration import CalibrationBatch, language_mask, released_language_mask
from mbq.equalization import ALPHAS, POWERS, TokenRoles, check_norm, fold, value_rows
from mbq.errors import MBQError
from mbq.group import Group, Weighing, comparisons, look
from mbq.methods.method import Method, SearchOptions
from mbq.progress import Progress, silent
from mbq.qtensor import fake_quantize, fake_quantize_activations
from mbq.routing import Routing, routing
from mbq.scheme import Scheme
from mbq.sensitivity import PARTS, Sensitivity, ratios
from mbq.storage import Keep, kept
from mbq.trace import GroupTrace, check_finite, trace

if TYPE_CHECKING:
    from mbq.finished import FinishedBlocks


@dataclass(frozen=True)
class GroupSearch:
    """A row of search.json: the alpha chosen and the loss at every alpha, or why the group was left alone.

    tokens  of calibration that count and that a router sent to the group's expert; None where all go everywhere
    """

    block: int
    group: str
    alpha: float | None = None
    losses: tuple[float, ...] = ()
    skipped: str | None = None
    tokens: int | None = None

    @property
    def loss(self) -> float | None:
        """The loss of the choice, None where nothing was compared."""
        return self.losses[ALPHAS.index(self.alpha)] if self.alpha is not None and self.losses else None

    def to_json(self) -> dict[str, Any]:
        """JSON knows no NaN or infinity: such losses become null. Groups without an expert have no ``tokens``."""
        row = asdict(self) | {"losses": [value if math.isfinite(value) else None for value in self.losses]}
        return {name: value for name, value in row.items() if name != "tokens" or value is not None}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> GroupSearch:
        return cls(**{**row, "losses": tuple(math.nan if value is None else value for value in row["losses"])})


@torch.no_grad()
def equalize_model(
    binding: Binding,
    batches: Sequence[CalibrationBatch],
    method: Method,
    scheme: Scheme,
    options: SearchOptions | None = None,
    *,
    sensitivity: Sensitivity | None = None,
    targets: Collection[str] | None = None,
    storage: Keep | None = None,
    inputs: Inputs | None = None,
    finished: FinishedBlocks | None = None,
    progress: Progress = silent,
) -> list[GroupSearch]:
    """Search and fold every block, in place: weights stay float, and the model's function stays what it was.

    ``targets`` are the full names of the linears that will be quantized (None: all of the groups'); the others are
    folded, but stay float in every candidate. ``sensitivity`` is what methods that weigh need. ``storage`` keeps
    activations, by default where they are made; ``inputs`` is what ``capture`` gave for the process's own part of the
    batches, if it ran before. ``finished`` takes each block that is done, and may have had some
    done before (but not with ``distorted_input``, where what a block sees depends on the quantized ones before it).
    Of several ranks each runs its part of ``batches``, and only rank 0's weights are folded.

    Raises MBQError for a norm that nothing can be folded into, a sensitivity that cannot weigh, a group without a
    finite loss, and a mixture of experts with ``distorted_input``.
    """
    check_distorted(binding, options)
    if method.equalize is None:
        return []
    options = options or SearchOptions()
    search = _Search(
        binding,
        method,
        scheme,
        options,
        frozenset(binding.names if targets is None else targets),
        token_roles(batches, options.parity).to(device_of(binding.model)),
        weighings(sensitivity, options) if method.weighs else None,
    )
    _check_norms(binding)
    hidden, calls = inputs or capture(binding, batches[ranks.part(len(batches))], storage)
    seen = hidden if options.distorted_input else []
    rows: list[GroupSearch] = []
    for index in range(len(binding.blocks)):
        with placed(binding, index, changes=ranks.rank() == 0) as block:
            earlier = ranks.from_first(finished.rows(index) if finished is not None else None)
            if earlier is not None:
                hidden, _ = trace(block, (), hidden, calls[index], storage)
                if finished is not None:
                    finished.restore(index)
                rows += earlier
                progress("search", index + 1, len(binding.blocks), f"block {index}, done before")
                continue
            routes = _routes(binding, index, hidden, calls[index], search.roles)
            roles = _reached(binding, search.roles, calls[index])
            work = [search.group(index, group, routes, roles) for group in binding.kinds[index].groups]
            hidden, finite = trace(block, [made.targets for made in work], hidden, calls[index], storage)
            search.check(index, work, finite)
            if options.distorted_input:
                trace(block, [made.seen for made in work if isinstance(made, Group)], seen, calls[index], storage)
            searched = search.block(index, work)
            if options.distorted_input:
                pairs = zip(seen, calls[index], strict=True)
                seen = [kept(search.quantized(index, states, call), storage) for states, call in pairs]
            if finished is not None:
                finished.keep(index, searched)
        rows += searched
        progress("search", index + 1, len(binding.blocks), _note(index, searched))
    return rows


def check_distorted(binding: Binding, options: SearchOptions | None) -> None:
    """Raise MBQError where a distorted input would be routed to other experts than the targets that it is held to."""
    if options is not None and options.distorted_input and any(g.routed for kind in binding.kinds for g in kind.groups):
        raise MBQError("--distorted-input sends tokens to other experts than the float model does; leave it out.")


def _routes(
    binding: Binding, index: int, hidden: Sequence[torch.Tensor], calls: Sequence[Call], roles: TokenRoles
) -> dict[str, Routing]:
    """Where a block's tokens go, by the path of its experts; nothing for a block without a mixture."""
    paths = {group.routed[0] for group in binding.kinds[index].groups if group.routed is not None}
    return {path: routing(binding.blocks[index], path, hidden, calls, roles) for path in sorted(paths)}


def _reached(binding: Binding, roles: TokenRoles, calls: Sequence[Call]) -> TokenRoles:
    """The roles of the tokens that the block is called with; of others it is none."""
    if binding.vision_tokens:
        return roles
    found = torch.zeros(len(roles.counted), device=roles.counted.device)
    found[roles.own] = reached(calls, roles.own_lengths).to(found)
    found = ranks.total(found).bool()
    return replace(roles, vision=roles.vision & found, language=roles.language & found, counted=roles.counted & found)


def unreached(rows: Sequence[GroupSearch]) -> dict[int, list[int]]:
    """The experts that no calibration token reached, by their numbers, a block."""
    found: dict[int, list[int]] = {}
    for row in rows:
        if row.tokens == 0:
            found.setdefault(row.block, []).append(int(row.group.rpartition(".")[2]))
    return found


def token_roles(batches: Sequence[CalibrationBatch], parity: bool = False) -> TokenRoles:
    """The roles of all tokens, batch after batch. ``parity``: the released language mask, and padding is counted."""
    mask = released_language_mask if parity else language_mask
    part, sizes = ranks.part(len(batches)), [batch.labels.numel() for batch in batches]
    real = [batch.inputs.get("attention_mask") for batch in batches]
    counted = [
        torch.ones_like(batch.vision) if parity or each is None else each.to(batch.vision.device).bool()
        for batch, each in zip(batches, real, strict=True)
    ]
    return TokenRoles(
        vision=_flat([batch.vision for batch in batches]),
        language=_flat([mask(batch) for batch in batches]),
        counted=_flat(counted),
        own=slice(sum(sizes[: part.start]), sum(sizes[: part.stop])),
        lengths=tuple(sizes),
        own_lengths=tuple(sizes[part]),
    )


@dataclass(frozen=True)
class _Skipped:
    """A group that is not searched; its trace tells whether it overflows. ``tokens`` as in ``GroupSearch``."""

    reason: str
    targets: GroupTrace
    tokens: int | None = None


@dataclass(frozen=True)
class _Search:
    """What stays the same from block to block."""

    binding: Binding
    method: Method
    scheme: Scheme
    options: SearchOptions
    targets: frozenset[str]
    roles: TokenRoles
    weighings: dict[str, list[Weighing]] | None

    def check(self, index: int, work: Sequence[Group | _Skipped], finite: Sequence[torch.Tensor]) -> None:
        """Raise MBQError, with what it is, where a group's output or the block's is not finite."""
        for made in work:
            check_finite(self.binding, index, made.targets.finite, made.targets.group.name)
        check_finite(self.binding, index, finite)

    def block(self, index: int, work: Sequence[Group | _Skipped]) -> list[GroupSearch]:
        """Choose every group's vector on the unfolded block, then fold them all."""
        assert self.method.equalize is not None
        rows, choices = [], []
        for made in work:
            name = made.targets.group.name
            choice = self.method.equalize(made, self.options) if isinstance(made, Group) else None
            if isinstance(made, _Skipped):
                rows.append(GroupSearch(index, name, skipped=made.reason, tokens=made.tokens))
            elif choice is None:
                reason = f"{self.method.name} leaves this group alone"
                rows.append(GroupSearch(index, name, skipped=reason, tokens=made.tokens))
            else:
                rows.append(GroupSearch(index, name, choice.alpha, choice.losses, tokens=made.tokens))
                choices.append((made, choice))
        # Elsewhere only a distorted input looks at folded weights; the others stay the file's, which all ranks share.
        for made, choice in choices if ranks.rank() == 0 or self.options.distorted_input else ():
            weights = [_weight(self.binding.module(index, path)) for path in made.group.linears]
            before = list(self.binding.module(index, made.group.prev).parameters(recurse=False))
            offset = self.binding.architecture.norm_offset if made.norm_fed else 0.0
            fold(choice.equalization, made.sources, before, weights, offset)
        return rows

    def group(
        self, index: int, group: LinearGroup, routes: Mapping[str, Routing], roles: TokenRoles
    ) -> Group | _Skipped:
        """The group as the method sees it, whose traces are still empty; an expert's sees the tokens sent to it."""
        reached, route, tokens = roles, None, None
        if group.routed is not None:
            path, number = group.routed
            route = routes[path].to(number)
            roles = replace(roles, counted=roles.counted & route)
            tokens = int(roles.counted.sum())
        nothing = replace(roles, counted=torch.zeros_like(roles.counted))
        skipped = partial(_Skipped, targets=GroupTrace(group, look(group, [], nothing, route)), tokens=tokens)
        quantized = self._quantized_weights(index, group.inspect, group.linears)
        if not quantized:
            return skipped("none of its linears is quantized")
        if tokens == 0:
            return skipped("no calibration token reached this expert")
        if not roles.counted.any():
            return skipped("no calibration sample has a picture, without which the block is left out")
        before = self.binding.module(index, group.prev)
        sources = self._sources(index, group, before)
        if isinstance(sources, str):
            return skipped(sources)
        weighing = None if self.weighings is None else self.weighings[group.part][index]
        weights = self.method.token_weights and self.method.token_weights(reached, weighing, self.options)
        if weights is not None and group.routed is not None:  # of an error of the mixture's output
            weights = weights * routes[path].share(number) ** POWERS[self.options.norm]
            if not weights.any():
                return skipped("no calibration token that weighs anything reached this expert")
        compared = comparisons(group, weights, roles, self.options.tokens)
        targets = GroupTrace(group, look(group, compared, roles, route))
        return Group(
            name=f"block {index}, {group.name}",
            group=group,
            norm_fed=not isinstance(before, nn.Linear),
            sources=sources,
            module=self.binding.module(index, group.inspect),
            weights=quantized,
            comparisons=compared,
            seen=GroupTrace(group, targets.look) if self.options.distorted_input else targets,
            targets=targets,
            roles=roles,
            scheme=self.scheme,
            tokens=tokens,
        )

    def quantized(self, index: int, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        """The block's output with its target linears quantized: weights to nearest, activations as the scheme says."""
        weights = self._quantized_weights(index, "", self.binding.kinds[index].linears())
        if not call.called:
            return hidden
        rounded = {path: fake_quantize(weight, self.scheme.weights) for path, weight in weights.items()}
        read = None
        if self.scheme.activations is not None:
            read = partial(fake_quantize_activations, scheme=self.scheme.activations)
        if call.added is not None:
            hidden = hidden + call.added.to(hidden.device)
        return run_with(self.binding.blocks[index], Call((hidden, *call.args), call.kwargs), rounded, read)

    def _quantized_weights(self, index: int, inside: str, paths: Sequence[str]) -> dict[str, torch.Tensor]:
        """Weights of the target linears among ``paths``, by their path in the module ``inside`` the block."""
        return {
            path.removeprefix(inside).removeprefix("."): _weight(self.binding.module(index, path))
            for path in paths
            if self.binding.name(index, path) in self.targets
        }

    def _sources(self, index: int, group: LinearGroup, before: nn.Module) -> torch.Tensor | str:
        if not group.prev:
            return "nothing comes before it that could be divided"
        linear = self.binding.module(index, group.linears[0])
        rows, channels = len(_weight(before)), _weight(linear).shape[1]
        if rows == channels:
            return torch.arange(channels)
        if group.section is not None and rows % channels == 0:
            return group.section * channels + torch.arange(channels)
        if not self.options.gqa_fold:
            return f"{group.prev} has {rows} rows for {channels} channels; only gqa_fold folds them"
        attention = self.binding.module(index, group.linears[0].rpartition(".")[0])
        fused = self.binding.architecture.fused_qkv
        sources = value_rows(rows, channels, int(getattr(attention, "head_dim", 0)), fused)
        if sources is None:
            return f"the heads of {group.prev} ({rows} rows) do not divide {channels} channels"
        return sources


def weighings(sensitivity: Sensitivity | None, options: SearchOptions) -> dict[str, list[Weighing]]:
    """What the tokens of each part weigh by, a block: ``weighings(...)["attn"][index]``."""
    if sensitivity is None:
        raise ValueError("this method weighs modalities: give the sensitivity that mbq.sensitivity.measure returns")
    ratio = ratios(sensitivity, options.floor)
    vision = sensitivity.vision or dict.fromkeys(PARTS, (0.0,) * len(ratio[PARTS[0]]))
    return {
        part: [Weighing(*each) for each in zip(sensitivity.language[part], vision[part], ratio[part], strict=True)]
        for part in PARTS
    }


def _check_norms(binding: Binding) -> None:
    for index in range(len(binding.blocks)):
        for group in binding.kinds[index].groups:
            before = binding.module(index, group.prev)
            if group.prev and not isinstance(before, nn.Linear):
                check_norm(before, binding.name(index, group.prev), binding.architecture.norm_offset)


def _weight(module: nn.Module) -> torch.Tensor:
    return module.get_parameter("weight")


def _flat(masks: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([mask.flatten().cpu() for mask in masks])


def _note(index: int, rows: Sequence[GroupSearch]) -> str:
    losses = [row.loss for row in rows if row.loss is not None]
    return f"block {index}, loss {sum(losses):.3g}" if losses else f"block {index}"
