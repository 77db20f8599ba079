"""``mbq diagnose``: measure a quantized model beside its float model, and say what went wrong and what to try."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mbq.blocks import device_of
from mbq.calibration import CalibrationBatch, calibration_batches
from mbq.diagnosis import bad_answers, speed
from mbq.diagnosis.bad_answers import Answered, Limits, kind_of, with_answer
from mbq.diagnosis.measurements import Accuracy, Measurements, accuracies
from mbq.diagnosis.outside import compare_outside
from mbq.diagnosis.pair import Loading, Pair, load_pair
from mbq.diagnosis.propagation import propagate
from mbq.diagnosis.rules import Finding, findings
from mbq.diagnosis.speed import Decode, Speed
from mbq.errors import MBQError
from mbq.evaluation import Questions, Results, answers, evaluate, prepare, select
from mbq.evaluation.questions import task_of
from mbq.evaluation.scoring import answer_losses
from mbq.progress import Progress, silent
from mbq.rows import Row, check_images, read_rows, text_of
from mbq.storage import in_memory


@dataclass(frozen=True)
class Options:
    """How much is measured.

    samples         rows for the errors, drawn by ``seed``; fewer where the data has fewer
    limit           questions a task for the accuracy, the first of each
    answers         questions whose answers are written out; 0: none
    max_new_tokens  the longest answer
    max_seq_length  tokens of a sample
    batch_size      samples or questions that go through a model at once
    speed           whether decode steps are timed

    Raises MBQError for a number that makes no sense.
    """

    samples: int = 32
    limit: int = 100
    answers: int = 64
    max_new_tokens: int = 64
    max_seq_length: int = 2048
    batch_size: int = 8
    seed: int = 0
    speed: bool = True

    def __post_init__(self) -> None:
        for name, least in {"samples": 1, "limit": 1, "answers": 0, "max_new_tokens": 1, "batch_size": 1}.items():
            if getattr(self, name) < least:
                option = "--" + name.replace("_", "-")
                raise MBQError(f"{option} is {getattr(self, name)}; give a whole number from {least} up.")


@dataclass(frozen=True)
class Diagnosis:
    """What was measured, and what it means; no findings: nothing is wrong."""

    measurements: Measurements
    findings: list[Finding]


def diagnose(
    model: str | Path | nn.Module,
    baseline: str | Path | nn.Module,
    processor: Any = None,
    *,
    data: str | Path | list[Row],
    images: str | Path | None = None,
    loading: Loading | None = None,
    progress: Progress = silent,
    **options: Any,
) -> Diagnosis:
    """Compare a quantized model with the float model that it was made from.

    model     a folder of ``mbq quantize``, or what ``mbq.load(..., kernel="reference")`` gives
    baseline  the float model: a folder, a hub id, or loaded with its ``processor``
    data      rows in the calibration format with answers, and a "task" each if there are several
    options   those of ``Options``

    Errors are measured with one block of each model on the device where both do not fit. Loaded models stay where
    they are, and are left as they were. Raises MBQError for whatever the caller can mend.
    """
    chosen = Options(**options)
    rows = by_modality(data if isinstance(data, list) else read_rows(data, images))
    asked = select(rows, None, chosen.limit)
    check_images(rows)
    pair = load_pair(model, baseline, processor, loading or Loading())
    batches = _batches(rows, pair, chosen)
    storage = in_memory if pair.blocks else None
    count = len(pair.reference.blocks)
    propagation = propagate(
        pair.reference, pair.quantized, batches, storage, lambda done: progress("errors", done, count, "")
    )
    tower = pair.tower_quantized
    alone = _batches(rows, pair, replace(chosen, samples=1))[0]
    outside = compare_outside(pair.reference, pair.quantized, alone, tower)
    questions = prepare(asked, pair.processor, chosen.batch_size)
    spoken = bad_answers.spread(asked, chosen.answers)
    with pair.running_quantized() as ours:
        first = _heard(ours, pair, questions, spoken, chosen, _named(progress, "quantized"))
        kernels, refused = speed.kernels_of(ours.model)
    del ours  # on a GPU it was a copy in the kernel's order
    with pair.running_reference() as theirs:
        second = _heard(theirs, pair, questions, spoken, chosen, _named(progress, "float"), timed=not pair.blocks)
        answered, limits = _judged(theirs.model, pair, spoken, first.answers, second.answers, chosen)
    found = accuracies(first.results, second.results)
    measured = Measurements(
        model=pair.names[0],
        baseline=pair.names[1],
        scheme=pair.scheme,
        recipe=pair.recipe,
        blocks=pair.reference.architecture.blocks,
        tower_quantized=tower,
        outside=outside,
        propagation=propagation,
        accuracy=found,
        answers=answered,
        limits=limits,
        speed=_speed(first, second, kernels, refused),
        notes=_notes(found, batches, pair, chosen),
    )
    return Diagnosis(measured, findings(measured))


def by_modality(rows: Sequence[Row]) -> list[Row]:
    """Where rows of one task (or of none) have pictures and others have not, the latter become a task of their own."""
    pictured = {task_of(row) for row in rows if row.images}
    return [
        replace(row, task=f"{task_of(row)}, text only") if not row.images and task_of(row) in pictured else row
        for row in rows
    ]


@dataclass(frozen=True)
class _Heard:
    """What one model gave when it was asked: right and wrong, written answers, decode steps, the copy's bandwidth."""

    results: Results
    answers: list[str]
    decode: Decode | None
    device: torch.device
    bandwidth: float = field(default=0.0)


def _heard(
    binding: Any,
    pair: Pair,
    questions: Questions,
    spoken: Sequence[Row],
    options: Options,
    progress: Progress,
    timed: bool = True,
) -> _Heard:
    model, device = binding.model, device_of(binding.model)
    results = evaluate(model, questions, progress=progress)
    written: list[str] = []
    if spoken:
        written = answers(model, pair.processor, spoken, options.max_new_tokens, options.batch_size, progress)
    if not (options.speed and timed):
        return _Heard(results, written, None, device)
    row = next((row for row in questions.rows if row.images), questions.rows[0])
    decode = speed.decode_steps(binding, pair.processor, row)
    return _Heard(results, written, decode, device, speed.copy_bandwidth(device))


def _named(progress: Progress, model: str) -> Progress:
    """Steps that both models go through, told apart."""

    def update(step: str, done: int, total: int, note: str = "") -> None:
        progress(f"{step} {model}", done, total, note)

    return update


def _judged(
    model: Any, pair: Pair, rows: Sequence[Row], ours: Sequence[str], theirs: Sequence[str], options: Options
) -> tuple[list[Answered], Limits | None]:
    """Each answer's kind, by the losses of the float ``model``."""
    if not rows:
        return [], None

    def tokens(texts: Sequence[str]) -> list[list[int]]:
        return pair.processor.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []

    references = [text_of(row.messages[-1]) for row in rows]
    blind = bad_answers.blind_answers(pair.processor, [len(each) for each in tokens(ours)], options.seed)
    put = [with_answer(row, text) for texts in (ours, theirs, blind) for row, text in zip(rows, texts, strict=True)]
    losses = answer_losses(model, prepare(put, pair.processor, options.batch_size)).view(3, len(rows)).numpy()
    limits = bad_answers.limits_for(tokens([*theirs, *references]), losses[2])
    kinds = [
        [
            kind_of(text, reference, row.condition, ids, loss, limits)
            for text, reference, row, ids, loss in zip(texts, references, rows, tokens(texts), own, strict=True)
        ]
        for texts, own in ((ours, losses[0]), (theirs, losses[1]))
    ]
    return bad_answers.compared(rows, ours, theirs, *kinds), limits


def _batches(rows: Sequence[Row], pair: Pair, options: Options) -> list[CalibrationBatch]:
    return calibration_batches(
        rows,
        pair.processor,
        set(pair.reference.vision_tokens),
        num_samples=min(options.samples, len(rows)),
        max_length=options.max_seq_length,
        batch_size=options.batch_size,
        seed=options.seed,
    )


def _speed(ours: _Heard, theirs: _Heard, kernels: dict[str, int], refused: dict[str, str]) -> Speed | None:
    if ours.decode is None:
        return None
    return Speed(speed.device_name(ours.device), kernels, refused, ours.decode, theirs.decode, ours.bandwidth)


def _notes(
    accuracy: dict[str, Accuracy], batches: Sequence[CalibrationBatch], pair: Pair, options: Options
) -> list[str]:
    """What could not be looked at, and what would make it possible."""
    notes = []
    if not any(bool(batch.vision.any()) for batch in batches):
        notes.append("No sample has a picture, so nothing is known about vision tokens; give rows with pictures.")
    for kind, name in (("image", "questions about pictures"), ("text", "language-only questions")):
        if kind not in accuracy:
            notes.append(f"The data has no {name}, so image tasks and text cannot be told apart; add some.")
        elif accuracy[kind].reference.estimate == 0:
            notes.append(
                f"The float model answers none of the {name} to the letter, so accuracy cannot fall; give questions "
                "with short answers."
            )
    if options.answers == 0:
        notes.append("No answers were written out (--answers 0), so their kinds are not known.")
    if options.speed and pair.blocks:
        notes.append("The float model does not fit on the device as a whole, so its decode step was not timed.")
    return notes
