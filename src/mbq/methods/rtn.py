"""Round to nearest: E = 1."""

from __future__ import annotations

from mbq.methods.method import Method
from mbq.qtensor import quantize

RTN = Method("rtn", equalize=None, round=quantize)
