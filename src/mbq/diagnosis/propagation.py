"""Where a quantized model leaves the float one: output errors and outliers of every block, a block at a time.

Both models read the same batches. A block of each is on the device at once; the rest waits where ``placement`` put it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from mbq.architecture import Binding, BlockKind
from mbq.blocks import Call, capture, evaluating, hooked, placed, run, run_with
from mbq.calibration import CalibrationBatch, language_mask
from mbq.diagnosis.outliers import MODALITIES, Inputs, Outlier, Residual, Spike
from mbq.qlinear import QuantLinear
from mbq.qtensor import fake_quantize, fake_quantize_activations
from mbq.scheme import ActivationScheme
from mbq.sensitivity import PARTS
from mbq.storage import Keep, kept
from mbq.trace import check_finite

TOKENS = (*MODALITIES, "first")
Errors = dict[str, dict[str, float | None]]


@dataclass(frozen=True)
class BlockErrors:
    """||quantized - float|| / ||float|| of the outputs of a block's attention and MLP, [part][kind of tokens].

    Tokens are "vision"; "language", whose output predicts an answer token; and "first", which open a sample, where
    massive activations sit. None where there are no such tokens; infinite where the quantized model gives a NaN.

    accumulated  each model reads what its own earlier blocks gave
    own          the quantized block reads what the float block reads
    expected     as own, of the float block with its weights rounded to nearest in the folder's own scheme
    """

    accumulated: Errors
    own: Errors
    expected: Errors


@dataclass(frozen=True)
class Propagation:
    """What one pass through both models showed.

    samples   how many were read
    entry     relative error of what goes into the first block, by kind of tokens: of vision tower and embeddings
    blocks    errors of each block's parts
    outliers  of each group of linears that read one input, and modality: of what the quantized linears read
    massive   of each block: the largest number in the hidden states that the float block gives
    """

    samples: int
    entry: dict[str, float | None]
    blocks: list[BlockErrors]
    outliers: list[Outlier]
    massive: list[Spike]


@torch.no_grad()
def propagate(
    reference: Binding,
    quantized: Binding,
    batches: Sequence[CalibrationBatch],
    storage: Keep | None = None,
    progress: Callable[[int], None] | None = None,
) -> Propagation:
    """Run ``batches`` through both models. ``progress`` is called with the number of blocks that are done.

    Raises MBQError where the float model's output is not finite.
    """
    masks = [_masks(batch) for batch in batches]
    with evaluating(reference.model), evaluating(quantized.model):
        hidden, calls = capture(reference, batches, storage)
        states, own_calls = capture(quantized, batches, storage)
        entry = _Sums()
        for mask, ours, theirs in zip(masks, states, hidden, strict=True):
            entry.add(mask, ours, theirs.to(ours.device))
        errors: list[BlockErrors] = []
        outliers: list[Outlier] = []
        massive: list[Spike] = []
        for index in range(len(reference.blocks)):
            pair = _Pair(reference, quantized, index)
            with placed(reference, index) as original, placed(quantized, index) as block:
                pair.prepare(original, block)
                for number, mask in enumerate(masks):
                    hidden[number], states[number] = (
                        kept(each, storage)
                        for each in pair.read(
                            original,
                            block,
                            mask,
                            hidden[number],
                            states[number],
                            calls[index][number],
                            own_calls[index][number],
                        )
                    )
            check_finite(reference, index, pair.finite)
            errors.append(pair.errors())
            outliers += [row for inputs in pair.inputs for row in inputs.outliers(index)]
            massive.append(pair.residual.spike(index))
            if progress is not None:
                progress(index + 1)
    return Propagation(sum(len(batch.labels) for batch in batches), entry.errors(), errors, outliers, massive)


def _masks(batch: CalibrationBatch) -> dict[str, torch.Tensor]:
    """bool [batch, token] of each kind of tokens; padding is on the right, and of no kind."""
    first = torch.zeros_like(batch.vision)
    first[:, 0] = True
    return {"language": language_mask(batch), "vision": batch.vision, "first": first}


@dataclass
class _Sums:
    """Sums of squares over tokens of each kind: of the difference, and of what it is relative to."""

    squares: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, masks: Mapping[str, torch.Tensor], found: torch.Tensor, wanted: torch.Tensor) -> None:
        """``found`` and ``wanted`` are [batch, token, channel]; some blocks flatten the tokens of all samples."""
        wanted = wanted.float()
        pair = torch.stack([(found.float() - wanted).square().sum(-1), wanted.square().sum(-1)]).double()
        for kind, mask in masks.items():
            total = pair.view(2, *mask.shape)[:, mask.to(pair.device)].sum(-1)
            self.squares[kind] = self.squares.get(kind, torch.zeros_like(total)) + total

    def errors(self) -> dict[str, float | None]:
        ratios = {kind: (error / size).sqrt().item() for kind, (error, size) in self.squares.items() if size > 0}
        found = {kind: ratio if math.isfinite(ratio) else math.inf for kind, ratio in ratios.items()}
        return {kind: found.get(kind) for kind in TOKENS}


class _Pair:
    """The float and the quantized block of one number, and what is found about them batch after batch."""

    def __init__(self, reference: Binding, quantized: Binding, index: int) -> None:
        self.index, self.kind = index, reference.kinds[index]
        self.accumulated, self.own, self.expected = ({part: _Sums() for part in PARTS} for _ in range(3))
        self.inputs: list[Inputs] = []
        self.residual = Residual()
        self.finite: list[torch.Tensor] = []
        self.rounded: dict[str, torch.Tensor] = {}
        self.activations: ActivationScheme | None = None

    def prepare(self, original: nn.Module, block: nn.Module) -> None:
        """Keep the float block's weights as nothing but rounding to the folder's bits would make them."""
        for path in self.kind.linears():
            layer = block.get_submodule(path)
            if isinstance(layer, QuantLinear):
                weight = original.get_submodule(path).get_parameter("weight")
                self.rounded[path] = fake_quantize(weight, layer.scheme.weights)
                self.activations = layer.scheme.activations
        # An expert reads a few tokens of its own choice; what all experts read is another group's.
        groups = [group for group in self.kind.groups if group.routed is None and group.tokens]
        self.inputs = [Inputs(group, self.activations) for group in groups]

    def read(
        self,
        original: nn.Module,
        block: nn.Module,
        masks: Mapping[str, torch.Tensor],
        hidden: torch.Tensor,
        states: torch.Tensor,
        call: Call,
        own_call: Call,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The outputs of both blocks for one batch, each for its own model's states."""
        if not call.called:
            return hidden, states
        with _parts(original, self.kind) as wanted:
            after = run(original, hidden, call)
        self.finite.append(torch.isfinite(after).all())
        self.residual.add(after, masks)
        with _parts(block, self.kind) as found, hooked() as hooks:
            for inputs in self.inputs:
                linear = block.get_submodule(inputs.group.linears[0])
                hooks.append(linear.register_forward_pre_hook(inputs.hook(masks)))
            run(block, hidden, call)
        self._add(self.own, masks, found, wanted)
        with _parts(block, self.kind) as found:
            own_after = run(block, states, own_call)
        self._add(self.accumulated, masks, found, wanted)
        with _parts(original, self.kind) as found:
            self._run_rounded(original, hidden, call)
        self._add(self.expected, masks, found, wanted)
        return after, own_after

    def _run_rounded(self, original: nn.Module, hidden: torch.Tensor, call: Call) -> None:
        if call.added is not None:
            hidden = hidden + call.added
        scheme = self.activations
        read = None if scheme is None else partial(fake_quantize_activations, scheme=scheme)
        run_with(original, Call((hidden, *call.args), call.kwargs), self.rounded, read)

    @staticmethod
    def _add(
        sums: Mapping[str, _Sums],
        masks: Mapping[str, torch.Tensor],
        found: Mapping[str, torch.Tensor],
        wanted: Mapping[str, torch.Tensor],
    ) -> None:
        for part, each in sums.items():
            each.add(masks, found[part], wanted[part])

    def errors(self) -> BlockErrors:
        each = (self.accumulated, self.own, self.expected)
        return BlockErrors(*({part: sums.errors() for part, sums in kind.items()} for kind in each))


@contextmanager
def _parts(block: nn.Module, kind: BlockKind) -> Iterator[dict[str, torch.Tensor]]:
    """What a block's parts give while it runs inside, by part."""
    outputs: dict[str, torch.Tensor] = {}

    def keep(part: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            outputs[part] = output

        return hook

    with hooked() as hooks:
        for part, name in zip(PARTS, (kind.attn_output, kind.mlp_output), strict=True):
            hooks.append(block.get_submodule(name).register_forward_hook(keep(part)))
        yield outputs
