"""What lmms-eval's tasks ask of an answer, as options of transformers' ``generate``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mbq.evaluation.greedy import GREEDY

MAX_NEW_TOKENS = 1024  # where a task sets no limit, as most of lmms-eval's own models have it


def generation(asked: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """transformers' options for what a task's generation_kwargs ask, and the texts that end an answer.

    Greedy unless the task asks for a temperature above 0 (or sampling by name). Two line breaks, which lmms-eval adds
    for models that go on with the next question, end no chat's answer; lmms-eval's own chat models leave them out, too.
    """
    options = {**GREEDY, "max_new_tokens": int(asked.get("max_new_tokens") or MAX_NEW_TOKENS)}
    temperature = asked.get("temperature")
    if float(temperature or 0) > 0 or (asked.get("do_sample") and temperature is None):
        options["do_sample"] = True
        names = ("temperature", "top_p", "top_k")
        options |= {name: asked[name] for name in names if asked.get(name) is not None}
    if asked.get("num_beams"):
        options["num_beams"] = int(asked["num_beams"])
    stops = asked.get("until") or []
    stops = [stops] if isinstance(stops, str) else stops
    return options, [stop for stop in stops if stop and stop != "\n\n"]


def stopped(text: str, stops: Sequence[str]) -> str:
    """``text`` up to the first of ``stops``."""
    return text[: min((at for at in map(text.find, stops) if at >= 0), default=len(text))]
