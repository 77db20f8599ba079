"""What is quantized to how many bits: schemes are data, one line each."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mbq.errors import MBQError


@dataclass(frozen=True)
class WeightScheme:
    """Integer weights. ``group_size`` input channels of one output row share a scale; ``None`` is the whole row."""

    bits: int
    symmetric: bool
    group_size: int | None


@dataclass(frozen=True)
class ActivationScheme:
    """Symmetric integer activations, dynamic, one scale a token."""

    bits: int


@dataclass(frozen=True)
class Scheme:
    """A named pair of weight and activation quantizers (arXiv 2412.19509); no activations means 16-bit float."""

    name: str
    weights: WeightScheme
    activations: ActivationScheme | None = None


def _weight_only(bits: int, symmetric: bool = False) -> Scheme:
    name = f"W{bits}A16" + ("_SYM" if symmetric else "")
    return Scheme(name, WeightScheme(bits, symmetric, group_size=128))


def _weight_activation(weight_bits: int, activation_bits: int) -> Scheme:
    weights = WeightScheme(weight_bits, symmetric=True, group_size=None)
    return Scheme(f"W{weight_bits}A{activation_bits}", weights, ActivationScheme(activation_bits))


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        _weight_only(2),
        _weight_only(3),
        _weight_only(4),
        _weight_only(4, symmetric=True),  # for engines that read no zero points
        _weight_activation(8, 8),
        _weight_activation(4, 8),
        _weight_activation(3, 8),
        _weight_activation(4, 4),
    )
}


def scheme_named(name: str, group_size: int | None = None) -> Scheme:
    """The scheme ``name``; ``group_size`` replaces the 128 of a weight-only scheme.

    Raises MBQError for an unknown name, a group size below 1, or a group size with a scheme that has a scale a row.
    """
    scheme = SCHEMES.get(name.upper())
    if scheme is None:
        raise MBQError(f"Unknown scheme {name!r}; choose one of {', '.join(SCHEMES)}.")
    if group_size is None:
        return scheme
    if scheme.weights.group_size is None:
        raise MBQError(
            f"{scheme.name} has one scale an output row; leave --group-size out, or use W2A16, W3A16 or W4A16."
        )
    if group_size < 1:
        raise MBQError(f"--group-size is {group_size}; give a positive number of input channels, such as 128.")
    return replace(scheme, weights=replace(scheme.weights, group_size=group_size))
