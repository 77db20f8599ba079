"""How to run a quantized model, as its model card says it."""

from __future__ import annotations

from collections.abc import Sequence

from markdown_it import MarkdownIt
from markupsafe import Markup

from mbq.report.subjects import Subject

SECTION = "Load it"  # of the card (``model_card``)


def serving(subjects: Sequence[Subject]) -> dict[str, Markup]:
    """The section on loading and serving of every quantized model's card, by the model's label."""
    found = {subject.label: loading_section(subject.records.card) for subject in subjects if subject.quantized}
    return {label: section for label, section in found.items() if section}


def loading_section(card: str) -> Markup:
    """The card's section as HTML; nothing where it has none.

    A card may be anybody's: HTML in it is shown and not taken for HTML, and neither links nor pictures are made.
    """
    parser = MarkdownIt("commonmark", {"html": False}).disable(["link", "image", "autolink"])
    tokens, inside, depth = [], False, "h2"
    parsed = parser.parse(card)
    for place, token in enumerate(parsed):
        if token.type == "heading_open" and token.tag == depth:
            inside = parsed[place + 1].content == SECTION
        if inside:
            tokens.append(token)
    return Markup(parser.renderer.render(tokens[3:], parser.options, {}))  # without its own heading
