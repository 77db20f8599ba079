"""The methods by name. To add one: a file with its Method, a line here."""

from mbq.methods.awq import AWQ
from mbq.methods.fixed import FIXED
from mbq.methods.mbq import MBQ
from mbq.methods.method import Method, SearchOptions
from mbq.methods.rtn import RTN
from mbq.methods.smoothquant import SMOOTHQUANT

METHODS: dict[str, Method] = {method.name: method for method in (RTN, SMOOTHQUANT, AWQ, FIXED, MBQ)}

__all__ = ["METHODS", "Method", "SearchOptions"]
