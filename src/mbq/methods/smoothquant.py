"""SmoothQuant (arXiv 2211.10438): a closed form at the two norms of each block, no search."""

from __future__ import annotations

from mbq.equalization import Choice, smoothquant_vector
from mbq.group import Group
from mbq.methods.method import Method, SearchOptions
from mbq.qtensor import quantize


def equalize(group: Group, options: SearchOptions) -> Choice | None:
    if not group.norm_fed:
        return None
    alpha = options.smooth_alpha
    return Choice(smoothquant_vector(group.max_abs(), list(group.weights.values()), alpha), alpha)


SMOOTHQUANT = Method("smoothquant", equalize, round=quantize)
