"""How to run a quantized model, in the words of its model card."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from mbq.checkpoint.compressed_tensors import loading_note, serving_note
from mbq.errors import MBQError
from mbq.report.subjects import Subject
from mbq.scheme import SCHEMES, Scheme, scheme_named


@dataclass(frozen=True)
class Serving:
    """What is true of all models of one scheme.

    folders  of the models; examples take the first
    notes    for transformers and for vLLM, as HTML
    """

    scheme: str
    folders: tuple[str, ...]
    trust: bool
    transformers: Markup
    engine: Markup


def serving(subjects: Sequence[Subject]) -> list[Serving]:
    """One for every scheme among the quantized models; schemes that this version does not know are left out."""
    groups: dict[tuple[Scheme, Scheme | None, bool], list[str]] = {}
    for subject in subjects:
        recipe = subject.records.recipe or {}
        try:
            scheme = scheme_named(recipe["scheme"], recipe.get("group_size"))
            tower = None if recipe.get("vision_tower") is None else SCHEMES[recipe["vision_tower"]]
        except (AttributeError, LookupError, TypeError, MBQError):
            continue
        groups.setdefault((scheme, tower, recipe.get("trust_remote_code") is True), []).append(subject.place)
    found = []
    for (scheme, tower, trust), folders in groups.items():
        others = {} if tower is None else {"": tower}
        notes = (code_marked(loading_note(scheme, others)), code_marked(serving_note(scheme)))
        found.append(Serving(scheme.name, tuple(dict.fromkeys(folders)), trust, *notes))
    return found


def code_marked(markdown: str) -> Markup:
    """A model card's sentence as HTML: escaped, and what stands between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(markdown))))
