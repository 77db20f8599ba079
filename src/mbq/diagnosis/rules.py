"""What measurements mean: a rule is a function of them that answers with a finding or None. ``RULES`` lists all.

Causes come first: a rule about an effect (accuracy that falls) is silent where a cause has been found.
docs/diagnosis.md says where each threshold comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mbq.diagnosis import advice
from mbq.diagnosis.bad_answers import CONDITION, NO_OUTPUT, RANDOM, REPETITION
from mbq.diagnosis.measurements import Measurements, gap, more_often
from mbq.diagnosis.outliers import Outlier
from mbq.diagnosis.speed import Decode
from mbq.figures import PART_NAMES

ONE_BIT, TWO_BITS = 2.0, 4.0  # times the error: with a bit fewer the steps are twice as wide
HALF = 0.5


@dataclass(frozen=True)
class Finding:
    """rule: its name; title: what is wrong; evidence: the figures that say so; advice: what to try, with a command."""

    rule: str
    title: str
    evidence: str
    advice: str


Rule = Callable[[Measurements], Finding | None]


def outside_differs(m: Measurements) -> Finding | None:
    """What no scheme touches is not the baseline's: another model, another revision, or damage."""
    found = m.outside
    if not found.differs:
        return None
    evidence = (
        f"With the decoder blocks left out, the logits differ from the float model's by {found.logits:.2g} of their "
        f"norm, where the dtype rounds to {found.rounding:.1g}."
    )
    if found.tensors:
        name, size = max(found.tensors.items(), key=lambda item: item[1])
        evidence += f" Tensors outside the blocks that differ: {len(found.tensors)}; most of all {name}, by {size:.2g}."
    return Finding(
        "outside_differs",
        "What was not quantized is not the baseline's",
        evidence,
        "Give the float model that the folder was made from (recipe.yaml names it), or make the folder anew: "
        + advice.quantize(m),
    )


def outliers(m: Measurements) -> Finding | None:
    """A channel dwarfs the others in what linears read, and the part it goes into loses a bit more than is usual."""
    found = harmful_outliers(m)
    if not found:
        return None
    worst, error = max(found, key=lambda each: each[1] / m.usual(each[0].part, each[0].modality))
    part = worst.part
    where = f"{', '.join(worst.linears)} of block {worst.block}"
    return Finding(
        "outliers",
        f"An outlier channel in block {worst.block} ({PART_NAMES[part]})",
        f"{_channels(worst.channels)} of what {where} reads: at {worst.modality} tokens channel {worst.channel} "
        f"reaches {worst.ratio:.0f} times the "
        f"median channel and holds {worst.share:.0%} of the sum of squares. The output error is {error:.3f}, the "
        f"median over blocks {m.usual(part, worst.modality):.3f}.",
        advice.against_outliers(m, worst.block, worst.linears),
    )


def harmful_outliers(m: Measurements) -> list[tuple[Outlier, float]]:
    """Outliers, and the own error of the part that reads them."""
    found = []
    for each in m.propagation.outliers:
        place = (each.block, each.part, each.modality)
        error = m.own(each.part, each.modality)[each.block] or 0.0
        if each.channels and place in m.places() and error > ONE_BIT * m.usual(each.part, each.modality):
            found.append((each, error))
    return found


def bad_block(m: Measurements) -> Finding | None:
    """A block whose own error is what a bit fewer would cost, or two bits more than what is usual among the blocks."""
    explained = {each.block for each, _ in harmful_outliers(m)}
    found = []
    for block, part, tokens in m.places():
        own, expected = m.own(part, tokens)[block] or 0.0, m.expected(part, tokens)[block] or 0.0
        usual = m.usual(part, tokens)
        if own > ONE_BIT * expected or (own > TWO_BITS * usual and block not in explained):
            found.append((own / min(expected, usual), block, part, tokens, own, expected, usual))
    if not found:
        return None
    _, block, part, tokens, own, expected, usual = max(found, key=lambda each: each[0])  # the first of equals
    before, after = (_accumulated(m, index, part, tokens) for index in (block - 1, block))
    return Finding(
        "bad_block",
        f"Block {block} is at fault ({PART_NAMES[part]})",
        f"On float inputs its error at {tokens} tokens is {own:.3f}, where rounding to nearest at {m.scheme.name} "
        f"gives {expected:.3f} and the median over blocks is {usual:.3f}. With its own inputs the model's error goes "
        f"from {before} in the block before to {after}." + _falls_text(m),
        "Keep the block in 16 bits: " + advice.quantize(m, ignore=advice.block_pattern(m, block)),
    )


def vision_tower(m: Measurements) -> Finding | None:
    """The quantized vision tower gives the decoder worse pictures than the decoder's own rounding costs."""
    entry = m.propagation.entry["vision"]
    usual = max(m.usual(part, "vision") for part in PART_NAMES)
    image = m.accuracy.get("image")
    if not m.tower_quantized or entry is None or entry <= usual or image is None or not image.falls:
        return None
    return Finding(
        "vision_tower",
        "The quantized vision tower costs the image tasks",
        f"What goes into the first block is off by {entry:.3f} at vision tokens, where a decoder block adds "
        f"{usual:.3f}.{_falls_text(m)}",
        "Keep the tower in 16 bits: " + advice.quantize(m, vision_tower=None),
    )


def modality_imbalance(m: Measurements) -> Finding | None:
    """Image tasks fall while language-only tasks hold, and no cause was found."""
    if not _only_falls(m, "image", "text") or cause(m):
        return None
    return Finding(
        "modality_imbalance",
        "Image tasks fall while language-only tasks hold: modality imbalance",
        _falls_text(m).strip(),
        advice.balance(m),
    )


def text_imbalance(m: Measurements) -> Finding | None:
    """The other way round: language-only tasks fall while image tasks hold."""
    if not _only_falls(m, "text", "image") or cause(m):
        return None
    return Finding(
        "text_imbalance",
        "Language-only tasks fall while image tasks hold",
        _falls_text(m).strip(),
        "Calibrate on plain text as well: " + advice.quantize(m, formatting="interleaved", text="plain.txt"),
    )


def bits_too_few(m: Measurements) -> Finding | None:
    """Image tasks and language-only tasks both fall, and the errors grow evenly."""
    if len(m.accuracy) < 2 or not all(each.falls for each in m.accuracy.values()) or cause(m):
        return None
    return Finding(
        "bits_too_few",
        f"{m.scheme.name} has too few bits for this model",
        f"{_falls_text(m).strip()} {_even(m)}",
        advice.more_bits(m),
    )


def accuracy_falls(m: Measurements) -> Finding | None:
    """Accuracy falls, and whether on one modality alone cannot be told from so many questions."""
    told = (modality_imbalance, text_imbalance, bits_too_few)
    if not any(each.falls for each in m.accuracy.values()) or cause(m) or any(rule(m) for rule in told):
        return None
    return Finding(
        "accuracy_falls",
        "Accuracy falls; on one modality alone or on both, so many questions cannot tell",
        f"{_falls_text(m).strip()} {_even(m)}",
        f"Give --data with more questions of the kind that does not surely fall. {advice.more_bits(m)}",
    )


def no_output(m: Measurements) -> Finding | None:
    return _answers(m, NO_OUTPUT, "Answers are empty", advice.empty(m))


def random_tokens(m: Measurements) -> Finding | None:
    return _answers(m, RANDOM, "Answers are random tokens", advice.random(m))


def repetition(m: Measurements) -> Finding | None:
    return _answers(m, REPETITION, "Answers go round in circles", advice.loops(m))


def missed_condition(m: Measurements) -> Finding | None:
    return _answers(m, CONDITION, "Answers ignore the form that was asked for", advice.conditions(m))


def no_speed_up(m: Measurements) -> Finding | None:
    """A decode step is not surely faster than the float model's."""
    speed = m.speed
    if speed is None or speed.reference is None or speed.quantized.high < speed.reference.low:
        return None
    ours, theirs = speed.quantized, speed.reference
    kernels = ", ".join(f"{name} ({count} layers)" for name, count in speed.kernels.items())
    refused = "".join(f" {name} does not run: {why}." for name, why in speed.refused.items())
    limit = "Memory was the limit" if speed.reading > HALF else "Memory was not the limit"
    return Finding(
        "no_speed_up",
        f"Decoding is not faster than the float model ({speed.device})",
        f"A step takes {_milliseconds(ours)}, the float model's {_milliseconds(theirs)}. Kernel: {kernels}.{refused} "
        f"{limit}: it reads {ours.bytes / 1e6:.1f} MB of weights a token, {ours.bandwidth / 1e9:.2g} GB/s, where a "
        f"copy moves {speed.bandwidth / 1e9:.1f} GB/s, so reading is {speed.reading:.0%} of the step.",
        advice.faster(m),
    )


RULES: tuple[Rule, ...] = (
    outside_differs,
    outliers,
    bad_block,
    vision_tower,
    modality_imbalance,
    text_imbalance,
    bits_too_few,
    accuracy_falls,
    no_output,
    random_tokens,
    repetition,
    missed_condition,
    no_speed_up,
)


def cause(m: Measurements) -> bool:
    """Whether something explains why accuracy falls."""
    return any(rule(m) is not None for rule in (outside_differs, outliers, bad_block, vision_tower))


def findings(m: Measurements) -> list[Finding]:
    """What the rules find, in their order; empty where nothing is wrong."""
    return [found for rule in RULES if (found := rule(m)) is not None]


def _only_falls(m: Measurements, falling: str, holding: str) -> bool:
    """One kind of tasks surely falls, the other does not, and the first surely falls further."""
    if not {falling, holding} <= set(m.accuracy):
        return False
    ours, others = m.accuracy[falling], m.accuracy[holding]
    return ours.falls and not others.falls and gap(ours.difference, others.difference).high < 0


def _channels(numbers: Sequence[int], most: int = 8) -> str:
    listed = ", ".join(map(str, numbers[:most]))
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return f"Channel {listed}" if len(numbers) == 1 else f"Channels {listed}{more}"


def _even(m: Measurements) -> str:
    spans = []
    for part, name in PART_NAMES.items():
        for tokens in ("language", "vision"):
            errors = [m.own(part, tokens)[b] or 0.0 for b, p, t in m.places() if (p, t) == (part, tokens)]
            spans += [f"{name}, {tokens} {min(errors):.3f} to {max(errors):.3f}"] if errors else []
    return f"No block stands out; own errors of the blocks: {'; '.join(spans)}."


def _falls_text(m: Measurements) -> str:
    names = {"image": "image tasks", "text": "language-only tasks"}
    parts = [
        f"{names[kind]} {each.difference.percent(signed=True)} points on {each.questions} questions"
        for kind, each in m.accuracy.items()
    ]
    return f" Right answers, quantized less float: {', '.join(parts)}." if parts else ""


def _milliseconds(step: Decode) -> str:
    return f"{1e3 * step.seconds:.2f} ms ({1e3 * step.low:.2f} to {1e3 * step.high:.2f})"


def _accumulated(m: Measurements, block: int, part: str, tokens: str) -> str:
    error = m.propagation.blocks[block].accumulated[part][tokens] if block >= 0 else m.propagation.entry[tokens]
    return "nothing" if error is None else f"{error:.3f}"


def _answers(m: Measurements, kind: str, title: str, what: str) -> Finding | None:
    """More bad answers of a kind than the float model gives to the same questions, surely."""
    ours, theirs = ([each == kind for each in column] for column in _kinds(m))
    if not any(ours):
        return None
    more = more_often(ours, theirs)
    if more.low <= 0:
        return None
    return Finding(
        kind.replace(" ", "_"),
        title,
        f"{kind.capitalize()}: {sum(ours)} of {len(ours)} answers, and {sum(theirs)} of the float model's, "
        f"{more.percent(signed=True)} points.",
        what,
    )


def _kinds(m: Measurements) -> tuple[list[str | None], list[str | None]]:
    return [each.kind for each in m.answers], [each.float_kind for each in m.answers]
