"""How much the loss feels an error at a vision token, and at a language token (MBQ, section 3.2 and its figure 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from mbq.architecture import Binding
from mbq.blocks import evaluating, forward, hooked
from mbq.calibration import CalibrationBatch, language_mask, released_language_mask
from mbq.errors import MBQError

PARTS = ("attn", "mlp")
# float16 has no number below 6e-8, and the gradients of the paper's figure are 1.7e-8.
_HALF_PRECISION_SCALE = 1024.0


@dataclass(frozen=True)
class Sensitivity:
    """Mean |dL/dY| of the outputs of attention ("attn", o_proj) and MLP ("mlp", down_proj), a number a block.

    vision    over the vision tokens, averaged over the samples that have some
    language  over the positions whose output predicts an answer token, averaged over all samples
    released  the language positions are the answer tokens themselves, as in the released code
    """

    vision: dict[str, tuple[float, ...]]
    language: dict[str, tuple[float, ...]]
    released: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    binding: Binding,
    batches: Sequence[CalibrationBatch],
    *,
    parity: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Sensitivity:
    """Run the float model forward and backward on every batch. The model is left as it was.

    A sample's loss is the mean cross entropy of its answer tokens, so the batch size changes nothing. ``progress`` is
    called with the number of batches done. ``parity`` takes the released language mask.

    Raises MBQError where no sample has an image, a sample has no answer, or a loss or gradient is not finite.
    """
    if not any(bool(batch.vision.any()) for batch in batches):
        raise MBQError(
            "No calibration sample has an image, so vision cannot be weighed; add images, or quantize by --method awq."
        )
    mask = released_language_mask if parity else language_mask
    vision = torch.zeros(len(binding.blocks), len(PARTS), dtype=torch.float64)
    language = torch.zeros_like(vision)
    pictured = samples = 0
    for done, batch in enumerate(batches, start=1):
        gradient = token_gradients(binding, batch).double().cpu()
        seen = batch.vision.any(dim=1).cpu()
        vision += _masked_means(gradient, batch.vision.cpu())[..., seen].sum(-1)
        language += _masked_means(gradient, mask(batch).cpu()).sum(-1)
        pictured, samples = pictured + int(seen.sum()), samples + len(seen)
        if progress is not None:
            progress(done)
    return Sensitivity(_by_part(vision / pictured), _by_part(language / samples), parity)


def ratios(sensitivity: Sensitivity, floor: float | None = None) -> dict[str, tuple[float, ...]]:
    """r = vision / language a part and block, raised to at least ``floor`` (None: the median over the part's blocks).

    The last block's vision tokens have no gradient, as nothing attends to them any more: its r is 0 before the floor.

    Raises MBQError where a language gradient is zero.
    """
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


def token_gradients(binding: Binding, batch: CalibrationBatch) -> torch.Tensor:
    """Mean over channels of |dL/dY|, [block, part, batch, token] in float32, parts in the order of ``PARTS``.

    Parameters get no gradients; only activations from the first block on are kept for the backward pass.
    """
    model, architecture = binding.model, binding.architecture
    found: dict[tuple[int, int], torch.Tensor] = {}
    leaves: list[torch.Tensor] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        hidden = args[0] if args else kwargs["hidden_states"]
        leaves.append(hidden.detach().requires_grad_(True))
        return (leaves[0], *args[1:]), {name: value for name, value in kwargs.items() if name != "hidden_states"}

    def watch(key: tuple[int, int]) -> Callable[..., None]:
        def keep(gradient: torch.Tensor) -> None:
            found[key] = gradient.float().abs().mean(-1)

        def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            output.register_hook(keep)

        return hook

    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with hooked() as hooks, evaluating(model), torch.enable_grad():
        hooks.append(binding.blocks[0].register_forward_pre_hook(enter, with_kwargs=True))
        for index, block in enumerate(binding.blocks):
            for part, name in enumerate((architecture.attn_output, architecture.mlp_output)):
                hooks.append(block.get_submodule(name).register_forward_hook(watch((index, part))))
        try:
            for parameter in frozen:
                parameter.requires_grad_(False)
            logits = forward(model, batch).logits
            scale = _HALF_PRECISION_SCALE if logits.dtype == torch.float16 else 1.0
            torch.autograd.grad(answer_loss(logits, batch.labels) * scale, leaves)
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
    return _finite(_stacked(found, len(binding.blocks)) / scale)


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


def _stacked(found: dict[tuple[int, int], torch.Tensor], blocks: int) -> torch.Tensor:
    parts = range(len(PARTS))
    # Blocks may lie on several devices.
    return torch.stack([torch.stack([found[block, part].cpu() for part in parts]) for block in range(blocks)])


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
