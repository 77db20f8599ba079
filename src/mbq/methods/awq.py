"""AWQ (arXiv 2306.00978): every token weighs the same. The released MBQ code calls this plain equalization.

AWQ's own paper compares squares (norm "mse"); the released code, and the default here, takes one norm for all methods.
"""

from __future__ import annotations

from mbq.equalization import Choice, uniform_weights
from mbq.group import Group
from mbq.methods.method import Method, SearchOptions
from mbq.qtensor import quantize


def equalize(group: Group, options: SearchOptions) -> Choice | None:
    return group.search(uniform_weights(group.roles), options.norm, options.tokens)


AWQ = Method("awq", equalize, round=quantize)
