"""Which tokens of a chat are the assistant's answers: exact, whatever the chat template and the tokenizer do."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mbq.errors import MBQError

Chat = list[dict[str, Any]]
Span = tuple[int, int]
_LONGEST_TRAIL = 3  # tokens that a processor may put between a text and the next image (InternVL: one, <img>)


def answer_spans(chat: Chat, render: Callable[[Chat], str], where: str) -> list[Span]:
    """Character spans of the assistant's answers in ``render(chat)``, which is the chat template.

    Each answer is replaced by a mark in turn: what the template writes before and after the mark is what it writes
    before and after the answer. So neither the generation prompt (LLaVA-OneVision's differs from what stands before an
    answer) nor the answer's own text, which may occur elsewhere, plays a part.

    Raises MBQError naming ``where`` if the template changes its frame with the answer.
    """
    text = render(chat)
    spans = []
    for index, message in enumerate(chat):
        if message["role"] != "assistant":
            continue
        mark = f"mbq-answer-{index}"
        marked = render([*chat[:index], {**message, "content": [{"type": "text", "text": mark}]}, *chat[index + 1 :]])
        before, found, after = marked.partition(mark)
        exact = found and mark not in after and text.startswith(before) and text.endswith(after)
        if not exact or len(before) + len(after) >= len(text):
            raise MBQError(
                f"{where}: the answer of message {index + 1} cannot be told apart in the chat template's output; "
                "use a template that writes every message, or leave the row out."
            )
        spans.append((len(before), len(text) - len(after)))
    return spans


def answer_tokens(
    text: str,
    spans: Sequence[Span],
    ids: list[int],
    vision: list[bool],
    processor: Any,
    where: str,
    end_of_turn: bool = True,
) -> torch.Tensor:
    """bool [token]: the tokens of the answers at ``spans`` of ``text``, and the end-of-turn token right after each.

    text         the rendered chat, each image one ``processor.image_token``
    ids          the model's tokens of it, images expanded
    vision       which of ``ids`` are vision tokens
    end_of_turn  False leaves the token after the answer out

    A token that holds an answer's first character together with the space before it belongs to the answer. The texts
    between images are tokenized alone, with character offsets, and found again between the images of ``ids``, whose
    tokens must be equal: nothing is guessed. Raises MBQError naming ``where`` if they are not.
    """
    tokenizer = processor.tokenizer
    ends = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    mask = torch.zeros(len(ids), dtype=torch.bool)
    after = 0  # tokens that texts with answers have taken
    for (start, stop), gaps in _matched(text, vision, getattr(processor, "image_token", None), where):
        inside = [(first - start, last - start) for first, last in spans if start <= first and last <= stop]
        if not inside:
            continue
        piece, ranges = _token_ranges(tokenizer, text[start:stop], inside, where)
        left = [(low, high) for low, high in gaps if low >= after]
        shifts = ((low, high, _shift(piece, ids[low:high], (ranges[0][0], ranges[-1][1] + 1))) for low, high in left)
        low, after, shift = next((each for each in shifts if each[2] is not None), (0, 0, None))
        if shift is None:
            raise MBQError(
                f"{where}: the tokenizer and the model's processor cut the answer into different tokens; "
                "leave the row out, and report the model."
            )
        for first, last in ranges:
            if end_of_turn and last < len(piece) and piece[last] in ends:
                last += 1
            mask[low + shift + first : low + shift + last] = True
    return mask


def _matched(text: str, vision: list[bool], image_token: str | None, where: str) -> list[tuple[Span, list[Span]]]:
    """The texts between images: their characters in ``text``, and where in ``ids`` their tokens may be.

    That is one place, but where a processor writes other tokens into an image (between its rows or tiles): then a text
    between two images has several, the one before the first image or behind the last still one.
    """
    tokens = _gaps([match.span() for match in re.finditer("1+", "".join("01"[is_vision] for is_vision in vision))])
    tokens = [(low, len(vision) if high is None else high) for low, high in tokens]
    for pattern in (r"(?:{})+", r"(?:{})"):  # images side by side: one run of vision tokens, or several
        images = re.finditer(pattern.format(re.escape(image_token)), text) if image_token else iter(())
        characters = [(start, len(text) if stop is None else stop) for start, stop in _gaps([m.span() for m in images])]
        if len(characters) == len(tokens):
            return [(each, [place]) for each, place in zip(characters, tokens, strict=True)]
    if 1 < len(characters) < len(tokens):
        first, *between, last = characters
        return [(first, tokens[:1]), *((each, tokens[1:-1]) for each in between), (last, tokens[-1:])]
    raise MBQError(
        f"{where}: the chat template wrote {len(characters) - 1} images but the model sees {len(tokens) - 1}; "
        "check the row's image markers and that the template and the processor belong to the model."
    )


def _gaps(runs: list[Span]) -> list[Any]:
    starts = [0, *(stop for _, stop in runs)]
    stops = [*(start for start, _ in runs), None]
    return list(zip(starts, stops, strict=True))


def _token_ranges(tokenizer: Any, piece: str, spans: list[Span], where: str) -> tuple[list[int], list[Span]]:
    """The tokens of ``piece``, and for each span of characters the range of tokens that overlap it."""
    if tokenizer.is_fast:
        encoded = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)
        offsets = encoded["offset_mapping"]
        ranges = []
        for start, stop in spans:
            touched = [i for i, (first, last) in enumerate(offsets) if first < stop and last > start]
            if not touched:
                raise MBQError(f"{where}: the tokenizer drops the whole answer; give the row an answer with text.")
            ranges.append((touched[0], touched[-1] + 1))
        return encoded["input_ids"], ranges
    ids = tokenizer(piece, add_special_tokens=False)["input_ids"]
    ranges = []
    for start, stop in spans:  # a tokenizer without offsets: the text before a boundary must give the first tokens
        heads = [tokenizer(piece[:end], add_special_tokens=False)["input_ids"] for end in (start, stop)]
        if any(ids[: len(head)] != head for head in heads):
            raise MBQError(
                f"{where}: the tokenizer has no character offsets and joins the answer with the text beside it; "
                "use a fast tokenizer for the model."
            )
        ranges.append((len(heads[0]), len(heads[1])))
    return ids, ranges


def _shift(piece: list[int], segment: list[int], answers: Span) -> int | None:
    """Where ``piece`` stands in ``segment``, which may start otherwise and end in what begins an image (<img>).

    From its first answer on it must be the same to its end; or, where a processor writes text before an image that
    merges with what stands there (Gemma 3's line breaks), its ``answers`` and all between them must occur once.
    """
    first, stop = answers
    for trail in range(_LONGEST_TRAIL):
        shift = len(segment) - trail - len(piece)
        end = shift + len(piece)
        if shift + first >= 0 and segment[shift + first : end] == piece[first:]:
            return shift
    wanted = piece[first:stop]
    found = [at for at in range(len(segment) - len(wanted) + 1) if segment[at : at + len(wanted)] == wanted]
    return found[0] - first if len(found) == 1 else None
