"""Modality-balanced quantization of vision-language models.

import mbq
result = mbq.quantize("folder-or-hub-id", scheme="W3A16", data="calib.jsonl", images="images", output="out")
model, processor = mbq.load("out"), mbq.load_processor("out")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mbq.errors import MBQError
    from mbq.exporting import ExportResult, export
    from mbq.loading import load_processor
    from mbq.pipeline import QuantizationResult, quantize
    from mbq.publishing import Pushed, push
    from mbq.quantized import load
    from mbq.recipe import Recipe
    from mbq.scheme import SCHEMES, Scheme

__version__ = "0.1.0"
__all__ = [
    "SCHEMES",
    "ExportResult",
    "MBQError",
    "Pushed",
    "QuantizationResult",
    "Recipe",
    "Scheme",
    "export",
    "load",
    "load_processor",
    "push",
    "quantize",
]

_HOME = {
    "ExportResult": "exporting",
    "MBQError": "errors",
    "Pushed": "publishing",
    "QuantizationResult": "pipeline",
    "Recipe": "recipe",
    "SCHEMES": "scheme",
    "Scheme": "scheme",
    "export": "exporting",
    "load": "quantized",
    "load_processor": "loading",
    "push": "publishing",
    "quantize": "pipeline",
}


def __getattr__(name: str) -> Any:
    """Imported when first used: torch and transformers take seconds, and ``mbq --help`` needs neither."""
    if name not in _HOME:
        raise AttributeError(f"module 'mbq' has no attribute {name!r}")
    return getattr(import_module(f"mbq.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
