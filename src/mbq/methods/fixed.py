"""A constant weight for vision tokens: the first experiment of MBQ (arXiv 2412.19509), with 0.1."""

from __future__ import annotations

import torch

from mbq.equalization import TokenRoles, fixed_weights
from mbq.group import Weighing
from mbq.methods.method import Method, SearchOptions, search
from mbq.qtensor import quantize


def token_weights(roles: TokenRoles, weighing: Weighing | None, options: SearchOptions) -> torch.Tensor:
    return fixed_weights(roles, options.vision_weight)


FIXED = Method("fixed", search, quantize, token_weights)
