"""Rows (messages and images) to calibration batches with a role for every token."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mbq.answers import answer_spans, answer_tokens
from mbq.chat import render
from mbq.errors import MBQError
from mbq.rows import Row

FORMATTINGS = ("plain", "few-shot", "interleaved")
INTERLEAVED_TOKENS = 512  # of plain text between two pairs, in the paper's interleaved format
NO_LABEL = -100


CROSS_ATTENTION_MASK = "cross_attention_mask"  # [sample, token, picture, tile], where pictures are no tokens


@dataclass(frozen=True)
class CalibrationBatch:
    """One right-padded batch. All tensors are [batch, token] unless the model's processor says otherwise.

    inputs   what the model's forward takes (input_ids, attention_mask, pixel_values, ...), no labels
    labels   the answer tokens' ids, -100 elsewhere; an answer ends with the end-of-turn token that the model must say
             (but not in the parity mode)
    vision   bool, the vision tokens
    """

    inputs: dict[str, Any]
    labels: torch.Tensor
    vision: torch.Tensor


def language_mask(batch: CalibrationBatch) -> torch.Tensor:
    """bool [batch, token]: the positions whose output predicts an answer token, each one before its token."""
    mask = torch.zeros_like(batch.vision)
    mask[:, :-1] = batch.labels[:, 1:] != NO_LABEL
    return mask & ~batch.vision


def released_language_mask(batch: CalibrationBatch) -> torch.Tensor:
    """bool [batch, token]: the answer tokens themselves, the mask of the authors' released search.

    The last of them predicts nothing that counts. An answer of one token, labelled without its end of turn, therefore
    has no gradient in any block.
    """
    return batch.labels != NO_LABEL


def sample_rows(rows: Sequence[Row], num_samples: int = 128, seed: int = 0, formatting: str = "plain") -> list[Row]:
    """The rows that ``num_samples`` samples are made of (two each unless plain), drawn without replacement.

    The same rows, number and seed give the same draw. Raises MBQError if there are too few.
    """
    if formatting not in FORMATTINGS:
        raise MBQError(f"Unknown formatting {formatting!r}; choose one of {', '.join(FORMATTINGS)}.")
    each = 1 if formatting == "plain" else 2
    if num_samples < 1:
        raise MBQError(f"--num-calibration-samples is {num_samples}; give a number from 1 up.")
    if len(rows) < each * num_samples:
        raise MBQError(
            f"The calibration data hold {len(rows)} rows, but {num_samples} {formatting} samples need "
            f"{each * num_samples}; give more rows, or --num-calibration-samples {len(rows) // each}."
        )
    return random.Random(seed).sample(list(rows), each * num_samples)


def calibration_batches(
    rows: Sequence[Row],
    processor: Any,
    vision_token_ids: set[int],
    *,
    num_samples: int = 128,
    max_length: int = 2048,
    batch_size: int = 1,
    seed: int = 0,
    formatting: str = "plain",
    text: str | Path | None = None,
    end_of_turn: bool = True,
    progress: Callable[[int], None] | None = None,
) -> list[CalibrationBatch]:
    """Draw ``num_samples`` samples and pass them through the model's own chat template and processor.

    vision_token_ids  the model's image and video token ids
    max_length        tokens of a sample: the end of a longer one is cut off, images never
    formatting        "plain": a row is a sample; "few-shot": two rows, one conversation; "interleaved": two rows with
                      512 tokens of plain text, which have no role, between them (MBQ, section on calibration data)
    text              the UTF-8 file that "interleaved" takes its text from
    end_of_turn       label the token that ends an answer, too; the released search does not
    progress          called with the number of samples done

    Raises MBQError, naming the row, for missing or corrupt images, images and image tokens that do not match, and
    answers that cannot be found or lie wholly behind ``max_length``; and for too few rows.
    """
    drawn = sample_rows(rows, num_samples, seed, formatting)
    if formatting != "plain":
        passages = [""] * num_samples
        if formatting == "interleaved":
            passages = _passages(text, processor.tokenizer, num_samples, seed)
        drawn = [_joined(*pair) for pair in zip(drawn[0::2], drawn[1::2], passages, strict=True)]
    samples = []
    for done, row in enumerate(drawn, start=1):
        samples.append(encode(row, processor, vision_token_ids, max_length, end_of_turn))
        if progress is not None:
            progress(done)
    pad = processor.tokenizer.pad_token_id
    return [collate([samples[i] for i in each], 0 if pad is None else pad) for each in _alike(samples, batch_size)]


def encode(
    row: Row, processor: Any, vision_token_ids: set[int], max_length: int, end_of_turn: bool = True
) -> CalibrationBatch:
    """One row as a batch of one, not padded. Raises MBQError as ``calibration_batches`` does."""
    pictures = row.open_images()
    try:
        text = render(processor, row.chat, row.where)
        spans = answer_spans(row.chat, lambda chat: render(processor, chat, row.where), row.where)
        _check_placeholders(text, processor, len(pictures), row.where)
        inputs = _process(processor, text, pictures)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise MBQError(f"{row.where}: the model's processor refuses the row ({reason}); mend it or drop it.") from error
    ids = inputs["input_ids"]
    vision = torch.isin(ids, torch.tensor(sorted(vision_token_ids), dtype=ids.dtype))
    # Where pictures are no tokens, one stands for each all the same, and parts the text.
    images = vision if vision_token_ids else ids == processor.image_token_id
    if not spans:
        raise MBQError(f"{row.where}: the row has no answer; give it an assistant message with text, or drop it.")
    answers = answer_tokens(text, spans, ids[0].tolist(), images[0].tolist(), processor, row.where, end_of_turn)
    _check_length(answers, images[0], max_length, row.where)
    cut = {
        key: value[:, :max_length] if value.shape == ids.shape or key == CROSS_ATTENTION_MASK else value
        for key, value in inputs.items()
    }
    return CalibrationBatch(cut, torch.where(answers, ids, NO_LABEL)[:, :max_length], vision[:, :max_length])


def _alike(samples: Sequence[CalibrationBatch], batch_size: int) -> list[list[int]]:
    """Which samples make a batch: those of about the same length, so that little is padded, in the order they came.

    Where cross-attention reads pictures, samples with another number of them stay apart: a token before the first
    picture sees all that is there, and would see what fills up the others' places.
    """
    parts: dict[int, list[int]] = {}
    for index in sorted(range(len(samples)), key=lambda i: samples[i].labels.shape[1] if batch_size > 1 else 0):
        mask = samples[index].inputs.get(CROSS_ATTENTION_MASK)
        parts.setdefault(0 if mask is None else mask.shape[2], []).append(index)
    return [sorted(part[i : i + batch_size]) for part in parts.values() for i in range(0, len(part), batch_size)]


def _process(processor: Any, text: str, pictures: list[Any]) -> dict[str, torch.Tensor]:
    # One list of pictures a text: LLaVA-OneVision cuts a picture into tiles only where it is alone in its text.
    bos = processor.tokenizer.bos_token
    once = {"add_special_tokens": False} if bos and text.startswith(bos) else {}
    inputs = processor(text=[text], images=[pictures] if pictures else None, return_tensors="pt", **once)
    return {key: value for key, value in inputs.items() if isinstance(value, torch.Tensor)}


def _check_placeholders(text: str, processor: Any, pictures: int, where: str) -> None:
    written = text.count(processor.image_token)
    if written != pictures:
        raise MBQError(
            f"{where}: the row has {pictures} image(s), but the chat has {processor.image_token} {written} time(s); "
            "take the image token out of the texts, or use a chat template that writes images."
        )


def _check_length(answers: torch.Tensor, vision: torch.Tensor, max_length: int, where: str) -> None:
    first_answer = int(answers.nonzero()[0])
    after_images = int(vision.nonzero()[-1]) + 1 if vision.any() else 0
    least = max(first_answer + 1, after_images)
    if least > max_length:
        lost = "its images" if after_images > max_length else "the whole answer"
        raise MBQError(
            f"{where}: the limit of {max_length} tokens cuts off {lost}; raise --max-seq-length to at least {least} "
            f"({len(answers)} keep the row whole)."
        )


def collate(samples: Sequence[CalibrationBatch], pad_token_id: int) -> CalibrationBatch:
    """Batches of one as one batch: tokens padded on the right, without a role; pictures one after the other."""
    longest = max(sample.labels.shape[1] for sample in samples)
    inputs: dict[str, Any] = {}
    for key in dict.fromkeys(key for sample in samples for key in sample.inputs):
        values = [sample.inputs[key] for sample in samples if key in sample.inputs]
        of_tokens = (sample.inputs[key].shape == sample.labels.shape for sample in samples if key in sample.inputs)
        if key == CROSS_ATTENTION_MASK:
            values = [_padded(value, longest, 0) for value in values]
        elif all(of_tokens):
            fill = pad_token_id if key == "input_ids" else 0
            # A text-only row may lack mm_token_type_ids, where 0 is text.
            rows = [sample.inputs.get(key, torch.zeros_like(sample.labels)) for sample in samples]
            values = [_padded(value, longest, fill) for value in rows]
        else:  # pictures of fewer tiles (LLaVA-OneVision) or pixels (Pixtral) than the largest are filled up with zeros
            largest = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
            values = [_filled(value, largest) for value in values]
        inputs[key] = torch.cat(values)
    return CalibrationBatch(
        inputs,
        torch.cat([_padded(sample.labels, longest, NO_LABEL) for sample in samples]),
        torch.cat([_padded(sample.vision, longest, 0) for sample in samples]),
    )


def _padded(value: torch.Tensor, length: int, fill: int) -> torch.Tensor:
    wider = value.new_full((value.shape[0], length, *value.shape[2:]), fill)
    wider[:, : value.shape[1]] = value
    return wider


def _filled(value: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """``value`` [picture, ...] at the start of zeros [picture, *shape]."""
    wider = value.new_zeros(len(value), *shape)
    place = (slice(None), *(slice(size) for size in value.shape[1:]))
    wider[place] = value
    return wider


def _joined(first: Row, second: Row, passage: str) -> Row:
    """Two rows as one conversation, with plain text as a user's turn of its own between them where there is some."""
    between = [{"role": "user", "content": [{"type": "text", "text": passage}]}] if passage else []
    later = [message for message in second.messages if message["role"] != "system"]
    return replace(first, messages=[*first.messages, *between, *later], where=f"{first.where} and {second.where}")


def _passages(path: str | Path | None, tokenizer: Any, count: int, seed: int) -> list[str]:
    """``count`` passages of 512 tokens from a text file, each from the start of a word, drawn by ``seed``."""
    if path is None:
        raise MBQError("Interleaved samples need plain text; give a UTF-8 text file with --text.")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MBQError(f"The text file {path} cannot be read as UTF-8; check --text.") from error
    words = [match.span() for match in re.finditer(r"\S+", text)]
    if len(words) < INTERLEAVED_TOKENS:
        raise MBQError(f"The text file {path} has {len(words)} words; give one with at least {INTERLEAVED_TOKENS}.")
    draw = random.Random(seed)
    passages = []
    for _ in range(count):
        first = draw.randrange(len(words) - INTERLEAVED_TOKENS + 1)
        window = text[words[first][0] : words[first + INTERLEAVED_TOKENS - 1][1]]  # a word is a token at least
        tokens = tokenizer(window, add_special_tokens=False)["input_ids"][:INTERLEAVED_TOKENS]
        passages.append(tokenizer.decode(tokens).rstrip("\ufffd"))  # the last token may be a part of a character
    return passages
