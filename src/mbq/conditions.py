"""Conditions that a question puts to the form of its answer, so that answers that ignore them can be counted.

A row says {"condition": {"max_words": 3}}, {"condition": {"choices": ["yes", "no"]}} or
{"condition": {"regex": "[A-D]"}}; of several keys all must hold.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from mbq.errors import MBQError

KEYS = ("max_words", "choices", "regex")


@dataclass(frozen=True)
class Condition:
    """What an answer must look like; None where nothing is asked.

    max_words  words between blanks, at most
    choices    the answer is one of them, whatever its case
    regex      matches the whole answer
    """

    max_words: int | None = None
    choices: tuple[str, ...] | None = None
    regex: str | None = None

    def met(self, answer: str) -> bool:
        """Whether ``answer``, without the blanks around it, is what was asked for."""
        answer = answer.strip()
        if self.max_words is not None and len(answer.split()) > self.max_words:
            return False
        if self.choices is not None and answer.casefold() not in {choice.casefold() for choice in self.choices}:
            return False
        return self.regex is None or re.fullmatch(self.regex, answer) is not None


def condition_from(given: Any, where: str) -> Condition | None:
    """A row's "condition". Raises MBQError, naming ``where``, for one that says nothing that is known."""
    if given is None:
        return None
    if not isinstance(given, dict) or not given or not set(given) <= set(KEYS):
        raise MBQError(
            f"{where}: a condition must be an object with {', '.join(KEYS[:-1])} or {KEYS[-1]}; mend the row."
        )
    words, choices, regex = (given.get(key) for key in KEYS)
    if words is not None and (not isinstance(words, int) or isinstance(words, bool) or words < 1):
        raise MBQError(f"{where}: max_words of the condition is {words!r}; give a whole number from 1 up.")
    if choices is not None and not (choices and isinstance(choices, list) and all(isinstance(c, str) for c in choices)):
        raise MBQError(f"{where}: choices of the condition must be a list of texts; mend the row.")
    try:
        re.compile(regex or "")
    except (re.error, TypeError) as error:
        raise MBQError(f"{where}: regex of the condition is none ({error}); mend the row.") from error
    return Condition(words, None if choices is None else tuple(choice.strip() for choice in choices), regex)
