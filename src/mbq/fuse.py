"""Linears that read the same input, run as one: q, k and v; gate and up.

transformers' code calls ``q_proj(x)``, ``k_proj(x)``, ``v_proj(x)``, and keeps doing so: each of the three becomes a
``LinearSlice`` of one ``FusedLinear``. The first that is called with an x computes all outputs, the others take their
columns of them, and the last lets go of them. Which linears read the same input is what families.py says; where they
are given different inputs after all, every call computes, and is right.

What lies between the linears, norms and the gates of MLPs, runs as one kernel each: such a module gets another
``forward``, where a trial finds that it computes the same. torch.compile fuses more, and sees transformers' own.
"""

from __future__ import annotations

import importlib.util
import inspect
import types
from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers.activations import SiLUActivation

from mbq.errors import MBQError
from mbq.experts import Expert
from mbq.families import FAMILIES, VISION_GROUPS
from mbq.kernels import choose, humming, int8
from mbq.kernels.attention import runs
from mbq.kernels.elementwise import MOST_INPUTS, gated, rms_norm
from mbq.kernels.operator import current_device
from mbq.kernels.packed import PackedWeight
from mbq.packing import pack, unpack
from mbq.qlinear import QuantLinear

# Paths inside a block of linears that read the same input: ("mlp.gate_proj", "mlp.up_proj"), ...
GROUPS = tuple(
    group
    for groups in (
        *(kind.groups for variants in FAMILIES.values() for variant in variants for kind in variant.kinds),
        *VISION_GROUPS,
    )
    for group in groups
    if len(group.linears) > 1
)
SHARED_INPUT = tuple(dict.fromkeys(group.linears for group in GROUPS))
BEFORE = tuple(dict.fromkeys((group.prev, group.linears[0]) for group in GROUPS))  # where their input comes from

EXPERT = (("gate_proj", "up_proj"),)  # of one expert of a mixture

QUANTIZING = {"triton": int8, "humming": humming}  # that quantize a gate as it is computed


class Kept:
    """The output of the last fused layer that ran, until all its slices are taken; one of these serves a whole model.

    entry      the layer, its input, the input's version, its output, and the numbers of the slices that nobody took yet
    quantized  what the last norm gave to a fused layer, its version, and its codes, until the layer runs
    """

    def __init__(self) -> None:
        self.entry: tuple[FusedLinear, torch.Tensor, int, torch.Tensor, tuple[int, ...]] | None = None
        self.quantized: tuple[torch.Tensor, int, int8.Codes] | None = None

    def codes_of(self, x: torch.Tensor) -> int8.Codes | None:
        """Those that a norm made of x, once; None if there are none."""
        entry, self.quantized = self.quantized, None
        return entry[2] if entry is not None and entry[0] is x and entry[1] == _version(x) else None


class FusedLinear(nn.Module):
    """Layers of one input as one ``QuantLinear``: their outputs stand side by side, in the order of ``widths``."""

    def __init__(self, layer: QuantLinear, widths: Sequence[int], kept: Kept) -> None:
        super().__init__()
        self.layer, self.kept = layer, kept
        ends = [sum(widths[: i + 1]) for i in range(len(widths))]
        self.spans = tuple((end - width, end) for width, end in zip(widths, ends, strict=True))

    def part(self, x: torch.Tensor, number: int) -> torch.Tensor:
        """Outputs [..., width] of part ``number`` for x [..., in]: a view of all parts' outputs."""
        entry, version = self.kept.entry, _version(x)
        # A slice that was taken is not there any more: asked for again, it may be for new numbers in the same x.
        if entry is not None and entry[0] is self and entry[1] is x and entry[2] == version and number in entry[4]:
            y, waiting = entry[3], entry[4]
        else:
            y, waiting = self.product(x), tuple(range(len(self.spans)))
        waiting = tuple(each for each in waiting if each != number)
        self.kept.entry = (self, x, version, y, waiting) if waiting else None
        start, end = self.spans[number]
        return y[..., start:end]

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Outputs of all parts. Compiled code has no norm that quantizes."""
        codes = None if torch.compiler.is_compiling() else self.kept.codes_of(x)
        if codes is None:
            return self.layer(x)
        with current_device(x.device):
            return int8.linear(x, self.layer.packed, self.layer.bias, quantized=codes)

    def _save_to_state_dict(self, *args: object, **kwargs: object) -> None:
        raise MBQError(
            "This model's layers are fused for speed and no longer those of its folder; to save it, load it anew with "
            "kernel='reference'."
        )


class LinearSlice(nn.Module):
    """Part ``number`` of a ``FusedLinear``, in the place of the linear that it was: [..., in] to [..., out]."""

    def __init__(self, fused: FusedLinear, number: int) -> None:
        super().__init__()
        self.fused, self.number = fused, number
        start, end = fused.spans[number]
        self.in_features, self.out_features = fused.layer.in_features, end - start

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fused.part(x, self.number)

    def extra_repr(self) -> str:
        start, end = self.fused.spans[self.number]
        return f"outputs {start} to {end}"


def use_kernel(model: nn.Module, kernel: str) -> bool:
    """Let every ``QuantLinear`` of ``model`` use ``kernel`` ("auto" or a name), fused where that saves calls; once.

    Layers that the plain torch kernel runs stay as they are: nothing is saved there, and the model can be saved.
    Returns whether there are others; then norms and gates run as one kernel each, where Triton runs.

    Raises MBQError where the named kernel does not support a layer.
    """
    fuse(model, kernel)
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            layer.use(kernel)
    fast = any(isinstance(layer, QuantLinear) and layer.kernel != "reference" for layer in model.modules())
    if fast:
        one_kernel_each(model)
    return fast


def fuse(model: nn.Module, kernel: str) -> None:
    """Replace linears of one input by slices of one layer where scheme, dtype and device agree, and a kernel runs them.

    The layers must be as loaded (``QuantLinear.use`` comes after).
    """
    kept = Kept()
    for block in list(model.modules()):
        for paths in EXPERT if isinstance(block, Expert) else SHARED_INPUT:
            layers = [layer for path in paths if isinstance(layer := _find(block, path), QuantLinear)]
            if len(layers) == len(paths) and _fit(layers) and not _plain(layers, kernel):
                fused = FusedLinear(concatenate(layers), [layer.out_features for layer in layers], kept)
                for number, path in enumerate(paths):
                    block.set_submodule(path, LinearSlice(fused, number))


def concatenate(layers: Sequence[QuantLinear]) -> QuantLinear:
    """One layer with the outputs of ``layers`` side by side; scheme, inputs, dtype and device are the same."""
    parts = [layer.packed for layer in layers]
    first, outputs = parts[0], sum(part.shape[0] for part in parts)
    words, scale = torch.cat([part.words for part in parts]), torch.cat([part.scale for part in parts])
    weight = PackedWeight(words, scale, _zero_points(parts), (outputs, first.shape[1]), first.scheme)
    bias = None
    if any(layer.bias is not None for layer in layers):
        bias = torch.cat(
            [layer.weight_scale.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers]
        )
    return QuantLinear.from_packed(weight, bias)


def _zero_points(parts: Sequence[PackedWeight]) -> torch.Tensor | None:
    """They are packed along the outputs, where a part may end within a word: unpacked and packed again."""
    bits = parts[0].scheme.weights.bits
    rows = [unpack(part.zero_point.T, bits, part.shape[0]) for part in parts if part.zero_point is not None]
    return pack(torch.cat(rows, dim=1), bits).T.contiguous() if rows else None


def _fit(layers: Sequence[QuantLinear]) -> bool:
    agree = {(layer.scheme, layer.in_features, layer.weight_scale.dtype, layer.weight_scale.device) for layer in layers}
    biases = {layer.bias.dtype for layer in layers if layer.bias is not None}
    return len(agree) == 1 and biases <= {layers[0].weight_scale.dtype}


def _plain(layers: Sequence[QuantLinear], kernel: str) -> bool:
    """Whether all of ``layers`` run in the reference kernel."""
    weights = [layer.packed for layer in layers]
    names = {choose(kernel, each.scheme, each.shape, each.words.device, each.scale.dtype) for each in weights}
    return names == {"reference"}


def _find(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _version(x: torch.Tensor) -> int:
    """Grows when x is written to. Tensors of inference mode and compiled code have none: there, nothing may write to x
    between the calls of one group.
    """
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version


# ---- norms and MLPs --------------------------------------------------------------------------------------------------


def one_kernel_each(model: nn.Module) -> None:
    """Norms, and gates of MLPs whose gate and up are one layer."""
    if importlib.util.find_spec("triton") is None:
        return
    tried: dict[tuple[type, str, str], bool] = {}
    readers = _readers_of_codes(model)
    for module in list(model.modules()):
        if _is_norm(module):
            forward = _quantizing_norm(readers[module]) if module in readers else _norm_forward
        elif _is_gated_mlp(module):
            forward = _mlp_forward
        else:
            continue
        key = (type(module), str(getattr(module, "act_fn", "")), forward.__qualname__)
        if key not in tried:
            tried[key] = _agrees(module, forward)
        if tried[key]:
            module.forward = types.MethodType(forward, module)


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return (
        isinstance(weight, torch.Tensor)
        and weight.dim() == 1
        and runs(weight.device)
        and weight.numel() <= MOST_INPUTS
        and hasattr(module, "variance_epsilon")
        and [name for name, _ in module.named_parameters()] == ["weight"]
        and len(inspect.signature(module.forward).parameters) == 1  # Qwen3.5 has one that takes a gate, too
    )


def _norm_forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if not _eager(x) or x.dtype != self.weight.dtype:
        return type(self).forward(self, x)
    return rms_norm(x, self.weight, self.variance_epsilon)  # type: ignore[arg-type]


def _readers_of_codes(model: nn.Module) -> dict[nn.Module, FusedLinear]:
    """By the norm before it, each fused layer that Triton multiplies with quantized activations."""
    found = {}
    for block in list(model.modules()):
        for prev, first in BEFORE:
            norm, reader = _find(block, prev), _find(block, first)
            if norm is not None and isinstance(reader, LinearSlice):
                layer = reader.fused.layer
                if layer.kernel == "triton" and layer.scheme.activations is not None:
                    found[norm] = reader.fused
    return found


def _quantizing_norm(reader: FusedLinear) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
    """The forward of the norm before ``reader``, which leaves its output there in 8 bits, too."""
    activations = reader.layer.scheme.activations
    assert activations is not None

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if not _eager(x) or x.dtype != self.weight.dtype or not x.numel():
            return _norm_forward(self, x)
        with current_device(x.device):
            y, codes = int8.rms_norm(x, self.weight, self.variance_epsilon, activations.bits)  # type: ignore[arg-type]
        reader.kept.quantized = (y, _version(y), codes)
        return y

    return forward


def _is_gated_mlp(module: nn.Module) -> bool:
    """Two slices of one layer, an activation, and the linear that takes their product, nothing else."""
    children = list(module.children())
    slices = [child for child in children if isinstance(child, LinearSlice)]
    return (
        len(children) == 4
        and len(slices) == 2
        and slices[0].fused is slices[1].fused
        and slices[0].out_features == slices[1].out_features
        and any(isinstance(child, nn.SiLU | SiLUActivation) for child in children)
        and any(isinstance(child, QuantLinear) for child in children)
        and runs(slices[0].fused.layer.weight_scale.device)
    )


def _mlp_forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if not _eager(x):
        return type(self).forward(self, x)
    fused = next(child for child in self.children() if isinstance(child, LinearSlice)).fused
    down = next(child for child in self.children() if isinstance(child, QuantLinear))
    both = fused.product(x)
    if down.scheme.activations is not None and down.kernel in QUANTIZING:
        with current_device(x.device):
            return QUANTIZING[down.kernel].linear(both, down.packed, down.bias, gated=True)
    return down(gated(both))


def _eager(x: torch.Tensor) -> bool:
    """Whether nobody compiles, and no gradient is asked for."""
    return not torch.compiler.is_compiling() and not (torch.is_grad_enabled() and x.requires_grad)


@torch.no_grad()
def _agrees(module: nn.Module, forward: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> bool:
    """Whether ``forward`` gives what the module's own does, to a few roundings, on a few random rows."""
    tensors = [*module.parameters(), *module.buffers()]
    dtype, device = next(each.dtype for each in tensors if each.is_floating_point()), tensors[0].device
    slices = [child for child in module.children() if isinstance(child, LinearSlice)]
    inputs = slices[0].in_features if slices else tensors[0].numel()
    x = torch.randn(4, inputs, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype)
    wanted, found = module(x).double(), forward(module, x).double()
    return bool((found - wanted).norm() <= 8 * torch.finfo(dtype).eps * wanted.norm())
