"""How much the loss feels an error at a vision token, and at a language token (MBQ, section 3.2 and its figure 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from mbq import ranks
from mbq.architecture import Binding, BlockKind
from mbq.blocks import (
    Call,
    Inputs,
    capture,
    device_of,
    evaluating,
    forward,
    hooked,
    passing,
    placed,
    run,
)
from mbq.calibration import CalibrationBatch, language_mask, released_language_mask
from mbq.errors import MBQError
from mbq.storage import Keep, kept
from mbq.trace import check_finite, trace

PARTS = ("attn", "mlp")
# float16 has no number below 6e-8, and the gradients of the paper's figure are 1.7e-8.
_HALF_PRECISION_SCALE = 1024.0


@dataclass(frozen=True)
class Sensitivity:
    """Mean |dL/dY| of the outputs of attention ("attn", o_proj) and MLP ("mlp", down_proj), a number a block.

    vision    over the vision tokens, averaged over the samples that have some; None where the model has no such tokens
    language  over the positions whose output predicts an answer token, averaged over all samples
    released  the language positions are the answer tokens themselves, as in the released code
    """

    vision: dict[str, tuple[float, ...]] | None
    language: dict[str, tuple[float, ...]]
    released: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Sensitivity:
        vision, language = (
            None if content[side] is None else {part: tuple(content[side][part]) for part in PARTS}
            for side in ("vision", "language")
        )
        assert language is not None
        return cls(vision, language, content["released"])


def measure(
    binding: Binding,
    batches: Sequence[CalibrationBatch],
    *,
    parity: bool = False,
    storage: Keep | None = None,
    inputs: Inputs | None = None,
    progress: Callable[[int], None] | None = None,
) -> Sensitivity:
    """Run the float model forward and backward on every batch. The model is left as it was.

    A sample's loss is the mean cross entropy of its answer tokens, so the batch size changes nothing. ``progress`` is
    called with the number of blocks that the gradient has passed. ``parity`` takes the released language mask.
    ``storage`` keeps the blocks' inputs, by default where they are made; ``inputs`` is what ``capture`` gave for the
    process's own part of the batches, if it ran before. Of several ranks each runs its part.

    Raises MBQError where no sample has an image, of a model whose images are tokens; where a sample has no answer; and
    where a loss or gradient is not finite.
    """
    if binding.vision_tokens and not any(bool(batch.vision.any()) for batch in batches):
        raise MBQError(
            "No calibration sample has an image, so vision cannot be weighed; add images, or quantize by --method awq."
        )
    own = batches[ranks.part(len(batches))]
    gradients = token_gradients(binding, own, storage, progress, inputs)
    vision, language = (side.nansum(0) for side in sample_means(own, gradients, parity=parity))
    pictured = sum(int(batch.vision.any(dim=1).sum()) for batch in batches)
    samples = sum(len(batch.labels) for batch in batches)
    vision, language = ranks.total(vision) / pictured, ranks.total(language) / samples
    return Sensitivity(_by_part(vision) if binding.vision_tokens else None, _by_part(language), parity)


def sample_means(
    batches: Sequence[CalibrationBatch], gradients: Sequence[torch.Tensor], *, parity: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``measure`` averages: means over a sample's vision tokens and over its language positions.

    ``gradients`` are those of ``token_gradients``. Two float64 tensors [sample, block, part]; the first is NaN for
    samples without an image.
    """
    mask = released_language_mask if parity else language_mask
    vision, language = [], []
    for batch, gradient in zip(batches, gradients, strict=True):
        seen = batch.vision.any(dim=1).cpu()
        means = _masked_means(gradient.double(), batch.vision.cpu())
        vision.append(torch.where(seen, means, torch.nan).permute(2, 0, 1))
        language.append(_masked_means(gradient.double(), mask(batch).cpu()).permute(2, 0, 1))
    return torch.cat(vision), torch.cat(language)


def ratios(sensitivity: Sensitivity, floor: float | None = None) -> dict[str, tuple[float, ...]]:
    """r = vision / language a part and block, raised to at least ``floor`` (None: the median over the part's blocks).

    The last block's vision tokens have no gradient, as nothing attends to them any more: its r is 0 before the floor.
    Of a model without vision tokens every r is 0.

    Raises MBQError where a language gradient is zero.
    """
    if sensitivity.vision is None:
        return {part: (0.0,) * len(sensitivity.language[part]) for part in PARTS}
    found = {}
    for part in PARTS:
        for block, value in enumerate(sensitivity.language[part]):
            if value == 0:
                raise MBQError(_no_language_gradient(block, part, sensitivity.released))
        pairs = zip(sensitivity.vision[part], sensitivity.language[part], strict=True)
        raw = [vision / language for vision, language in pairs]
        least = median(raw) if floor is None else floor
        found[part] = tuple(max(ratio, least) for ratio in raw)
    return found


def token_gradients(
    binding: Binding,
    batches: Sequence[CalibrationBatch],
    storage: Keep | None = None,
    progress: Callable[[int], None] | None = None,
    captured: Inputs | None = None,
) -> list[torch.Tensor]:
    """Mean over channels of |dL/dY|, [block, part, batch, token] in float32 a batch, parts in the order of ``PARTS``.

    One block works at a time: forward, its inputs are kept; backward, it runs again from them, and the gradient is
    passed back. Parameters get no gradients.
    """
    shape = (len(binding.blocks), len(PARTS))
    device = device_of(binding.model)  # where results stay too: bringing each one to the CPU would wait for it
    found = [torch.zeros(*shape, *batch.labels.shape, device=device) for batch in batches]
    with _frozen(binding.model), evaluating(binding.model):
        hidden, calls = captured or capture(binding, batches, storage)
        inputs = [hidden]
        for index in range(len(binding.blocks)):
            with placed(binding, index) as block:
                hidden, finite = trace(block, (), hidden, calls[index], storage)
            check_finite(binding, index, finite)
            inputs.append(hidden)
        scale = _HALF_PRECISION_SCALE if hidden[0].dtype == torch.float16 else 1.0
        passed = _head_gradients(binding, batches, inputs.pop(), scale, storage)
        for index in reversed(range(len(binding.blocks))):
            with placed(binding, index) as block:
                for number, (states, call) in enumerate(zip(inputs.pop(), calls[index], strict=True)):
                    before, parts = _block_gradients(binding.kinds[index], block, states, call, passed[number])
                    means = [part.float().abs().mean(-1).view(states.shape[:-1]) for part in parts]
                    found[number][index] = torch.stack(means) / scale
                    passed[number] = kept(before, storage)
            if progress is not None:
                progress(len(binding.blocks) - index)
    return [_finite(each.cpu()) for each in found]


def _head_gradients(
    binding: Binding,
    batches: Sequence[CalibrationBatch],
    states: Sequence[torch.Tensor],
    scale: float,
    storage: Keep | None,
) -> list[torch.Tensor]:
    """dL/d(output of the last block), times ``scale``: the model runs with nothing in its blocks but their outputs."""
    device, gradients = device_of(binding.model), []
    for batch, hidden in zip(batches, states, strict=True):
        leaf = hidden.detach().to(device).requires_grad_(True)
        with torch.enable_grad(), passing(binding, _always(leaf)):
            loss = answer_loss(forward(binding.model, batch).logits, batch.labels) * scale
            gradients.append(kept(torch.autograd.grad(loss, leaf)[0], storage))
    return gradients


def _block_gradients(
    kind: BlockKind, block: nn.Module, hidden: torch.Tensor, call: Call, passed: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The gradient of the block's input, and of the outputs of its parts, from that of its output."""
    if not call.called:
        return passed, [torch.zeros_like(passed) for _ in PARTS]
    outputs: list[torch.Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        outputs.append(output)

    device = device_of(block)
    leaf = hidden.detach().to(device).requires_grad_(True)
    with hooked() as hooks, torch.enable_grad():
        for name in (kind.attn_output, kind.mlp_output):
            hooks.append(block.get_submodule(name).register_forward_hook(keep))
        out = run(block, leaf, call)
        before, *parts = torch.autograd.grad(out, [leaf, *outputs], passed.to(device))
    return before, parts


def _always(states: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda given: states


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient; afterwards those that did do again."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def answer_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum over samples of the mean cross entropy of a sample's answer tokens.

    logits [batch, token, vocabulary]; labels [batch, token], -100 where there is no answer. Position t predicts t + 1.
    """
    labels = labels[:, 1:].to(logits.device)
    answered = labels != -100
    counts = answered.sum(1)
    if not bool(counts.all()):
        raise MBQError("A calibration sample has no answer token; give every row an answer and raise --max-seq-length.")
    loss = nn.functional.cross_entropy(logits[:, :-1][answered].float(), labels[answered], reduction="none")
    if not bool(torch.isfinite(loss).all()):
        raise MBQError("The float model's loss on a calibration sample is not finite; try --dtype float32 or bfloat16.")
    return (loss / counts.repeat_interleave(counts)).sum()


def _masked_means(gradient: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[block, part, batch]: the mean over a sample's masked tokens; 0 for a sample without any."""
    mask = mask.to(gradient.dtype)
    return (gradient * mask).sum(-1) / mask.sum(-1).clamp(min=1)


def _finite(gradient: torch.Tensor) -> torch.Tensor:
    bad = (~torch.isfinite(gradient)).flatten(2).any(-1).nonzero()
    if len(bad):
        block, part = bad[0].tolist()
        raise MBQError(
            f"The gradient at block {block} ({PARTS[part]}) is not finite; try --dtype float32 or check the checkpoint."
        )
    return gradient


def _by_part(values: torch.Tensor) -> dict[str, tuple[float, ...]]:
    return {part: tuple(values[:, index].tolist()) for index, part in enumerate(PARTS)}


def _no_language_gradient(block: int, part: str, released: bool) -> str:
    where = f"The language gradient of block {block} ({part}) is zero"
    if released:
        return (
            f"{where}, because the released mask marks the answer tokens themselves and every answer is one token; "
            "calibrate on longer answers or leave --parity out."
        )
    return f"{where}, so vision cannot be weighed against it; calibrate on other samples or use --method awq."
