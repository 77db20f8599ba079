"""How the models were made, as panels: gradients, the search, what a diagnosis found, where the time went."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from mbq.errors import MBQError
from mbq.report import charts
from mbq.report.panel import Chart, Panel, Table, chooser, key
from mbq.report.subjects import Subject
from mbq.report.wording import NOTHING, PARTS, duration, number

ALPHA_STEPS = 20  # mbq.equalization.ALPHAS, whose module imports torch
MODALITIES = charts.MODALITIES
STEPS = ("read", "load", "calibrate", "sensitivity", "search", "quantize")  # in the order of mbq.pipeline


def sensitivity_panel(subjects: Sequence[Subject]) -> Panel | None:
    """Gradients a block and modality, their ratio and its floor; None where no model has any."""
    having = [subject for subject in subjects if subject.records.sensitivity]
    if not having:
        return None
    gradients = [row for subject in having for row in _read("sensitivity.json", subject, _gradients)]
    ratios = [row for subject in having for row in _read("sensitivity.json", subject, _ratios)]
    labels, parts = [subject.label for subject in having], [part for part in PARTS if _any(gradients, part)]
    blocks = sorted({row["block"] for row in gradients})
    params = {"model": labels[0], "part": parts[0], "block": blocks[0]}
    names = {part: PARTS[part] for part in parts}
    values = {key(r["model"], r["part"], r["block"], r["series"]): r["value"] for r in [*gradients, *ratios]}
    readout, rows = {}, []
    for label, part, block in _places(gradients):
        found = {name: values.get(key(label, part, block, name)) for name in (*MODALITIES, "measured", "floor")}
        at = [label] * (len(labels) > 1) + [part] * (len(parts) > 1) + [block] * (len(blocks) > 1)
        readout[key(*at)] = (
            f"Block {block}, {PARTS[part]}: language {number(found['language'])}, vision {number(found['vision'])}; "
            f"vision / language {number(found['measured'])}, floor {number(found['floor'])}."
        )
        used = values.get(key(label, part, block, "raised to the floor"))
        rows.append([label, PARTS[part], str(block), *(number(value) for value in (*found.values(), used))])
    head = ("model", "part", "block", "language", "vision", "vision / language", "floor", "raised to the floor")
    untold = [subject.label for subject in having if (subject.records.sensitivity or {}).get("vision") is None]
    dark = sorted({row["block"] for row in gradients if row["series"] == "vision" and row["value"] == 0})
    notes = [
        "Mean absolute gradient of the answer's loss at the outputs of attention and MLP, over the positions that "
        "predict answer tokens (language) and over vision tokens.",
        "MBQ's released objective lets a vision token's error weigh the ratio of the two, raised to its floor: the "
        "median over the blocks, unless the recipe names another.",
    ]
    notes += [f"No vision tokens stand in the sequence of {label}: there is nothing to balance." for label in untold]
    if dark:
        notes.append(
            f"No vision gradient in block {', '.join(map(str, dark))}: nothing attends to vision tokens after it, and "
            "a logarithmic axis has no place for 0."
        )
    about = "Sensitivity by block: mean absolute gradient for language and vision tokens, logarithmic."
    ratio = "Ratio of the vision gradient to the language gradient by block, its floor, and the ratio raised to it."
    return Panel(
        "sensitivity",
        charts=[
            Chart(
                "gradients",
                "Mean |gradient| a block",
                charts.modalities_by_block(gradients, params, "mean |gradient|", about),
            ),
            Chart("ratios", "Vision / language, and its floor", charts.ratio_by_block(ratios, params, ratio)),
        ],
        tables=[Table("Sensitivity, block by block", head, rows)],
        controls=[
            *chooser("model", "Model", labels),
            *chooser("part", "Part", parts, names),
            *chooser("block", "Block", blocks),
        ],
        readout=readout,
        notes=notes,
    )


def _gradients(subject: Subject) -> Iterator[dict[str, Any]]:
    content = subject.records.sensitivity or {}
    for part in PARTS:
        for series in (series for series in MODALITIES if content[series] is not None):
            for block, value in enumerate(content[series][part]):
                yield {"model": subject.label, "part": part, "block": block, "series": series, "value": float(value)}


def _ratios(subject: Subject) -> Iterator[dict[str, Any]]:
    """As ``mbq.sensitivity.ratios`` has them; a test holds the two together."""
    content, given = subject.records.sensitivity or {}, (subject.records.recipe or {}).get("floor")
    for part in PARTS if content["vision"] is not None else ():
        pairs = zip(content["vision"][part], content["language"][part], strict=True)
        raw = [float(vision / language) for vision, language in pairs]
        floor = float(median(raw) if given is None else given)
        for block, ratio in enumerate(raw):
            for series, value in (("measured", ratio), ("raised to the floor", max(ratio, floor)), ("floor", floor)):
                yield {"model": subject.label, "part": part, "block": block, "series": series, "value": value}


def search_panel(subjects: Sequence[Subject]) -> Panel | None:
    """The alpha of every group, and the loss at every alpha; None where nothing was equalized."""
    having = [subject for subject in subjects if subject.records.search]
    if not having:
        return None
    rows = [row for subject in having for row in _read("search.json", subject, _searched)]
    labels = [subject.label for subject in having]
    groups, blocks = list(dict.fromkeys(row["group"] for row in rows)), sorted({row["block"] for row in rows})
    first = next((row for row in rows if row["losses"]), rows[0])
    labels.sort(key=lambda label: label != first["model"])
    params = {"model": first["model"], "block": first["block"], "group": first["group"]}
    cells = [{name: row[name] for name in ("model", "block", "group", "alpha", "loss", "skipped")} for row in rows]
    curves = [{name: row[name] for name in ("model", "block", "group", "alpha", "losses")} for row in rows]
    readout = {}
    for row in rows:
        at = (
            [row["model"]] * (len(labels) > 1) + [row["block"]] * (len(blocks) > 1) + [row["group"]] * (len(groups) > 1)
        )
        readout[key(*at)] = f"Block {row['block']}, {row['group']}: {_outcome(row)}."
    about = "The alpha chosen for each group of linears (rows) of each block (columns)."
    curve = "The search's loss at every alpha for the chosen block and group; the choice is marked."
    head = ("model", "block", "group", "alpha", *(f"loss at {step / ALPHA_STEPS:.2f}" for step in range(ALPHA_STEPS)))
    body = [
        [row["model"], str(row["block"]), row["group"], _alpha(row), *_cells(row["losses"], ALPHA_STEPS)]
        for row in rows
    ]
    return Panel(
        "search",
        charts=[
            Chart("alphas", "Chosen alpha, a cell a group", charts.alphas(cells, params, groups, about)),
            Chart("losses", "Loss at every alpha", charts.losses(curves, params, ALPHA_STEPS, curve)),
        ],
        tables=[Table("Alpha and losses, group by group", head, body)],
        controls=[
            *chooser("model", "Model", labels),
            *chooser("block", "Block", blocks, first=first["block"]),
            *chooser("group", "Group", groups, first=first["group"]),
        ],
        readout=readout,
        notes=[
            "Each group's input channels are scaled by the mean magnitude of their activations to the power alpha, and "
            "the linears by its inverse; 0 leaves them alone. The loss is that of the group's output after rounding.",
        ],
    )


def _searched(subject: Subject) -> Iterator[dict[str, Any]]:
    for row in subject.records.search:
        alpha, losses = row["alpha"], [None if loss is None else float(loss) for loss in row["losses"]]
        place = None if alpha is None else round(float(alpha) * ALPHA_STEPS)
        yield {
            "model": subject.label,
            "block": int(row["block"]),
            "group": str(row["group"]),
            "alpha": None if alpha is None else float(alpha),
            "loss": losses[place] if place is not None and place < len(losses) else None,
            "losses": losses,
            "skipped": None if row["skipped"] is None else str(row["skipped"]),
        }


def _outcome(row: dict[str, Any]) -> str:
    if row["alpha"] is None:
        return row["skipped"] or "left alone"
    if not row["losses"]:
        return f"alpha {row['alpha']:.2f}, given and not searched"
    return f"alpha {row['alpha']:.2f}, loss {number(row['loss'])} ({number(row['losses'][0])} at alpha 0)"


def _alpha(row: dict[str, Any]) -> str:
    return row["skipped"] or NOTHING if row["alpha"] is None else f"{row['alpha']:.2f}"


def _cells(values: Sequence[Any], count: int) -> list[str]:
    return [number(value) for value in values] or [NOTHING] * count


# Where diagnosis.json has the errors of a block: in the block's own object, or under a name in it.
ERRORS = {
    "accumulated": "with what earlier blocks did",
    "own": "of the block alone",
    "expected": "as rounding to nearest would have",
}


def diagnosis_panel(subjects: Sequence[Subject]) -> Panel | None:
    """Relative output error a block, part and modality; None where nothing was diagnosed."""
    having = [subject for subject in subjects if (subject.records.diagnosis or {}).get("blocks")]
    errors = [row for subject in having for row in _read("diagnosis.json", subject, _errors)]
    if not errors:
        return None
    labels = list(dict.fromkeys(row["model"] for row in errors))
    kinds = [kind for kind in ERRORS if any(row["error"] == kind for row in errors)]
    parts = [part for part in PARTS if _any(errors, part)]
    blocks = sorted({row["block"] for row in errors})
    params = {"model": labels[0], "error": kinds[0], "part": parts[0], "block": blocks[0]}
    values = {tuple(row[name] for name in (*params, "series")): row["value"] for row in errors}
    readout, rows = {}, []
    for place in dict.fromkeys(tuple(row[name] for name in params) for row in errors):
        label, kind, part, block = place
        found = [number(values.get((*place, series))) for series in MODALITIES]
        several = zip(place, (labels, kinds, parts, blocks), strict=True)
        readout[key(*(value for value, among in several if len(among) > 1))] = (
            f"Block {block}, {PARTS[part]}, error {ERRORS[kind]}: language {found[0]}, vision {found[1]}."
        )
        rows.append([label, ERRORS[kind], PARTS[part], str(block), *found])
    about = "Relative error of the outputs of each block against the float model, for language and vision tokens."
    spec = charts.modalities_by_block(errors, params, "relative error", about, ticks="~g")
    return Panel(
        "diagnosis",
        charts=[Chart("errors", "Relative output error a block", spec)],
        tables=[Table("Relative output error, block by block", ("model", "error", "part", "block", *MODALITIES), rows)],
        controls=[
            *chooser("model", "Model", labels),
            *chooser("error", "Error", kinds, ERRORS),
            *chooser("part", "Part", parts, PARTS),
            *chooser("block", "Block", blocks),
        ],
        readout=readout,
        notes=["The norm of the difference to the float model's output over the norm of that output."],
    )


def _errors(subject: Subject) -> Iterator[dict[str, Any]]:
    for each in (subject.records.diagnosis or {})["blocks"]:
        for kind in ERRORS:
            found = each if kind == "accumulated" else each.get(kind) or {}
            for part in PARTS:
                for series in MODALITIES:
                    value = (found.get(part) or {}).get(series)
                    if value is not None:
                        place = {"model": subject.label, "error": kind, "part": part, "block": int(each["block"])}
                        yield {**place, "series": series, "value": float(value)}


@dataclass(frozen=True)
class Diagnosis:
    """What the rules found for one model, and the kinds of its wrong answers."""

    label: str
    findings: tuple[dict[str, str], ...]
    answers: Table | None


def diagnosis(subject: Subject) -> Diagnosis:
    """The findings of diagnosis.json, as they stand there."""
    content = subject.records.diagnosis or {}
    texts = ("title", "evidence", "advice")
    findings = [
        {name: str(each.get(name, "")) for name in texts}
        for each in content.get("findings") or ()
        if hasattr(each, "get")
    ]
    return Diagnosis(subject.label, tuple(findings), _kinds(subject, content))


def _kinds(subject: Subject, content: dict[str, Any]) -> Table | None:
    """How many answers of each bad kind the model and its float model gave, and what the kinds are."""
    ours, theirs, meaning = (content.get(name) or {} for name in ("answers", "answers_float", "definitions"))
    if not ours or not all(hasattr(each, "get") for each in (ours, theirs, meaning)):
        return None
    rows = [
        [str(kind), str(count), str(theirs.get(kind, NOTHING)), str(meaning.get(kind, NOTHING))]
        for kind, count in ours.items()
    ]
    asked = f", of {content['answered']} that were written" if isinstance(content.get("answered"), int) else ""
    head = ("kind", "answers", "the float model's", "that is")
    return Table(f"Bad answers of {subject.label}{asked}", head, rows)


def time_panel(subjects: Sequence[Subject]) -> Panel | None:
    """Seconds a step of making each model; None where none are recorded."""
    having = [subject for subject in subjects if (subject.records.measurements or {}).get("seconds")]
    if not having:
        return None
    rows = [row for subject in having for row in _read("measurements.json", subject, _seconds)]
    labels, found = [subject.label for subject in having], dict.fromkeys(row["step"] for row in rows)
    names = sorted(found, key=lambda step: STEPS.index(step) if step in STEPS else len(STEPS))
    taken = {(row["model"], row["step"]): row["seconds"] for row in rows}
    table = [
        [
            label,
            *(duration(taken.get((label, name))) for name in names),
            duration(sum(seconds for (model, _), seconds in taken.items() if model == label)),
        ]
        for label in labels
    ]
    about = "Seconds that each step of quantizing took, a bar a model."
    return Panel(
        "time",
        charts=[Chart("steps", "Where the time went", charts.steps(rows, labels, names, about))],
        tables=[Table("Seconds, step by step", ("model", *names, "sum"), table)],
        notes=[
            "Writing the folder is not in it: this page is part of what is written.",
            *(
                f"{subject.label} went on with an unfinished run, whose seconds are not among these."
                for subject in having
                if (subject.records.measurements or {}).get("resumed")
            ),
        ],
    )


def _seconds(subject: Subject) -> Iterator[dict[str, Any]]:
    for step, seconds in (subject.records.measurements or {})["seconds"].items():
        yield {"model": subject.label, "step": str(step), "seconds": float(seconds)}


def _read(file: str, subject: Subject, rows: Any) -> list[dict[str, Any]]:
    try:
        return list(rows(subject))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise MBQError(
            f"{file} of {subject.label} is not what mbq writes ({type(error).__name__}: {error}); copy it anew."
        ) from error


def _places(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str, int]]:
    return list(dict.fromkeys((row["model"], row["part"], row["block"]) for row in rows))


def _any(rows: Sequence[dict[str, Any]], part: str) -> bool:
    return any(row["part"] == part for row in rows)
