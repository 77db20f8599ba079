"""What a row asks of the form of its answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mbq.conditions import Condition
from mbq.errors import MBQError
from mbq.rows import row_from


def condition(given: Any) -> Condition | None:
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A"}]
    return row_from({"messages": messages, "condition": given}, "rows.jsonl, line 3", Path()).condition


@pytest.mark.parametrize(
    ("given", "good", "bad"),
    [
        ({"max_words": 2}, ["one", " one  two \n", ""], ["one two three"]),
        ({"choices": ["Yes", "no"]}, ["yes", " NO "], ["", "yes.", "maybe"]),
        ({"regex": "[A-D]"}, ["A", " D\n"], ["E", "AB", ""]),
        ({"regex": r"\d+", "max_words": 1}, ["12"], ["twelve", "1 2"]),
    ],
)
def test_all_that_is_asked_for_must_hold(given: dict, good: list[str], bad: list[str]) -> None:
    asked = condition(given)
    assert [asked.met(answer) for answer in good] == [True] * len(good)
    assert [asked.met(answer) for answer in bad] == [False] * len(bad)


def test_a_row_may_ask_for_nothing() -> None:
    assert condition(None) is None


@pytest.mark.parametrize(
    "given",
    [
        *({}, [], "short", {"words": 3}),
        *({"max_words": each} for each in (0, True, "3")),
        *({"choices": each} for each in ([], "yes", [1])),
        *({"regex": each} for each in ("(", 3)),
    ],
)
def test_what_says_nothing_is_refused_with_its_place(given: Any) -> None:
    with pytest.raises(MBQError, match=r"^rows.jsonl, line 3: .* (condition|regex)"):
        condition(given)
