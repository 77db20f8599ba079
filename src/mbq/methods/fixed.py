"""A constant weight for vision tokens: the first experiment of MBQ (arXiv 2412.19509), with 0.1."""

from __future__ import annotations

from mbq.equalization import Choice, fixed_weights
from mbq.group import Group
from mbq.methods.method import Method, SearchOptions
from mbq.qtensor import quantize


def equalize(group: Group, options: SearchOptions) -> Choice | None:
    return group.search(fixed_weights(group.roles, options.vision_weight), options.norm, options.tokens)


FIXED = Method("fixed", equalize, round=quantize)
