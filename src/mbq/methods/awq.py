"""AWQ (arXiv 2306.00978): every token weighs the same. The released MBQ code calls this plain equalization.

AWQ's own paper compares squares (norm "mse"); the released code, and the default here, takes one norm for all methods.
"""

from __future__ import annotations

import torch

from mbq.equalization import TokenRoles, uniform_weights
from mbq.group import Weighing
from mbq.methods.method import Method, SearchOptions, search
from mbq.qtensor import quantize


def token_weights(roles: TokenRoles, weighing: Weighing | None, options: SearchOptions) -> torch.Tensor:
    return uniform_weights(roles)


AWQ = Method("awq", search, quantize, token_weights)
