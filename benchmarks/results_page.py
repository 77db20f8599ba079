"""docs/results.md from the stored runs: nothing is measured here, figures are computed from right and wrong answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mbq.evaluation import statistics
from mbq.evaluation.results import Results
from mbq.evaluation.statistics import Interval

FAMILY_NAMES = {"llava_onevision": "LLaVA-OneVision", "internvl": "InternVL", "qwen2_vl": "Qwen2-VL"}
METHOD_NAMES = {
    "rtn": "RTN",
    "smoothquant": "SmoothQuant",
    "awq": "AWQ",
    "fixed": "fixed factor 0.1",
    "mbq-mae": "MBQ, MAE",
    "mbq-mse": "MBQ, MSE",
    "mbq-paper": "MBQ, the paper's weights",
    "mbq-gqa": "MBQ, MAE, v to o fold",
    "mbq-distorted": "MBQ, MAE, distorted input",
}
MBQ, RIVALS = "mbq-mae", ("awq", "rtn")

HEAD = """# Results

Written by `python -m benchmarks.results --write` from the right and wrong answers in `benchmarks/results/`; measured by
`python -m benchmarks.results`, on two CPU cores for InternVL's and Qwen2-VL's captions and the most of their questions,
on one H200 for the rest, by the kernels that `mbq.load` takes there. Sums are rounded differently on the two.

- The models are the three reference models in `models/`, trained on the synthetic world of heraldry (`mbq.world`).
- An answer is right if greedy decoding writes the reference answer to the letter and ends its turn. {questions}
- Weights are quantized to the named scheme, and so are activations where it says A8 or A4; vision tower, projector,
  embeddings and lm_head stay in 16 bits.
- Methods calibrate on {samples} rows: captioned pictures ("captions", as in the paper), or all image tasks alike
  ("questions", one in 17 a caption). A caption here has 93 answer tokens beside 16 or 36 vision tokens, so language
  outnumbers vision; other answers have two to five, so vision outnumbers language, as in the paper's data.
  Where several draws of rows (seeds) were measured, a question scores the share of draws that have it right.
- "61.2 (60.1 to 62.3)" is a mean accuracy in per cent and its 95 % interval: a bootstrap over questions, in which the
  questions about one picture stay together. Differences are in percentage points, with the paired bootstrap's interval
  (10,000 resamples). All intervals speak of other questions; how far draws of calibration samples lie apart is shown
  beside them.
"""


@dataclass(frozen=True)
class Measured:
    """One method at one scheme: the results of its seeds, by seed."""

    by_seed: dict[int, Results]

    @property
    def any(self) -> Results:
        return next(iter(self.by_seed.values()))

    def scores(self, tasks: Iterable[str]) -> dict[str, np.ndarray]:
        """task -> [question] share of seeds that have it right."""
        return {task: np.mean([result.correct[task] for result in self.by_seed.values()], axis=0) for task in tasks}

    def mean(self, tasks: Sequence[str]) -> Interval:
        return statistics.mean(self.scores(tasks), {task: self.any.pictures[task] for task in tasks})

    def minus(self, other: Measured, tasks: Sequence[str]) -> Interval:
        pictures = {task: self.any.pictures[task] for task in tasks}
        return statistics.paired_difference(self.scores(tasks), other.scores(tasks), pictures)

    def minus_by_seed(self, other: Measured, tasks: Sequence[str]) -> list[float]:
        """The difference for each seed alone; a method without seeds (RTN) is compared with every one."""
        only = next(iter(other.by_seed.values())) if len(other.by_seed) == 1 else None
        found = []
        for seed, result in self.by_seed.items():
            rival = only or other.by_seed.get(seed)
            if rival is not None:
                found.append(
                    float(np.mean([result.correct[task].mean() - rival.correct[task].mean() for task in tasks]))
                )
        return found


@dataclass(frozen=True)
class Family:
    """The stored runs of one model: the float one, and (scheme, method) -> the others."""

    name: str
    unquantized: Measured
    runs: dict[tuple[str, str], Measured]

    @property
    def schemes(self) -> list[str]:
        return list(dict.fromkeys(scheme for scheme, _ in self.runs))

    @property
    def methods(self) -> list[str]:
        found = {method for _, method in self.runs}
        return [method for method in METHOD_NAMES if method in found]

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        result = self.unquantized.any
        return {"image": result.image_tasks, "text": result.text_tasks}


def page(stored: Path, families: Sequence[str], schemes: Sequence[str]) -> str:
    """The page; families without stored runs are left out."""
    found = [family for name in families if (family := read_family(stored, name, schemes)) is not None]
    asked = [family for name in families if (family := read_family(stored, name, schemes, "questions")) is not None]
    if not found:
        return HEAD.format(questions="", samples=128) + "\nNothing has been measured yet.\n"
    first = found[0].unquantized.any
    counts = {len(correct) for correct in first.correct.values()}
    questions = (
        f"Every task has {' or '.join(f'{n:,}' for n in sorted(counts))} questions, about pictures that no model saw."
    )
    samples = max(m.any.recipe.get("num_calibration_samples", 0) for f in found for m in f.runs.values())
    parts = [HEAD.format(questions=questions, samples=samples), _gains(found, "captions")]
    if any(method == MBQ for family in asked for _, method in family.runs):
        parts.append(_gains(asked, "questions"))
        parts += [f"### {FAMILY_NAMES[family.name]}, calibrated on questions\n\n{_means(family)}" for family in asked]
    return "\n".join([*parts, *(_family(family) for family in found)])


def folder_of(stored: Path, family: str, calibration: str) -> Path:
    """Where a family's runs are stored; the float model and RTN, which see no calibration, are with the captions."""
    return stored / family if calibration == "captions" else stored / calibration / family


def read_family(stored: Path, name: str, schemes: Sequence[str], calibration: str = "captions") -> Family | None:
    """The stored runs of a family, named scheme-method-seed.json, in the order of ``schemes``."""
    main, folder = folder_of(stored, name, "captions"), folder_of(stored, name, calibration)
    if not (main / "float.json").is_file():
        return None
    unquantized = Results.load(main / "float.json")
    by_key: dict[tuple[str, str], dict[int, Results]] = {}
    for path in sorted({*main.glob("*-rtn-*.json"), *folder.glob("*-*.json")}):
        scheme, rest = path.stem.split("-", 1)
        method, seed = rest.rsplit("-", 1)
        result = Results.load(path)
        if result.questions == unquantized.questions and result.recipe["weights"] == unquantized.recipe["weights"]:
            by_key.setdefault((scheme, method), {})[int(seed)] = result
    by_key = {key: seeds for key, seeds in by_key.items() if key[0] in schemes}
    ordered = sorted(by_key, key=lambda key: (list(schemes).index(key[0]), list(METHOD_NAMES).index(key[1])))
    runs = {key: Measured(by_key[key]) for key in ordered}
    return Family(name, Measured({0: unquantized}), runs)


def _gains(families: Sequence[Family], calibration: str) -> str:
    """What MBQ gains over plain equalization and over RTN, for every model and scheme, as a table and in words."""
    lines = [
        f"## What MBQ gains, calibrated on {calibration}\n",
        f"{METHOD_NAMES[MBQ]}, less AWQ (plain equalization) and less RTN, percentage points.\n",
    ]
    header = [
        "model",
        "scheme",
        *(f"{kind}: less {METHOD_NAMES[rival]}" for kind in ("image", "text") for rival in RIVALS),
    ]
    rows, sentences = [], []
    gains: dict[str, list[Interval]] = {rival: [] for rival in RIVALS}
    for family in families:
        for scheme in family.schemes:
            mbq = family.runs.get((scheme, MBQ))
            if mbq is None or any((scheme, rival) not in family.runs for rival in RIVALS):
                continue
            cells = []
            for tasks in family.groups.values():
                for rival in RIVALS:
                    other = family.runs[scheme, rival]
                    cells.append(mbq.minus(other, tasks).percent(signed=True) if tasks else "")
            rows.append([FAMILY_NAMES[family.name], scheme, *cells])
            sentences.append(f"- {_sentence(family, scheme, mbq)}")
            for rival in RIVALS:
                gains[rival].append(mbq.minus(family.runs[scheme, rival], family.groups["image"]))
    counted = [f"In words, for the image tasks ({_count(gains)}):\n"]
    return "\n".join([*lines, markdown(header, rows), "", *counted, *sentences, ""])


def _count(gains: dict[str, list[Interval]]) -> str:
    """In how many cases MBQ is surely ahead and behind."""
    texts = []
    for rival, found in gains.items():
        ahead, behind = sum(gain.low > 0 for gain in found), sum(gain.high < 0 for gain in found)
        texts.append(f"surely ahead of {METHOD_NAMES[rival]} in {ahead} of {len(found)} cases, behind in {behind}")
    return "; ".join(texts)


def _sentence(family: Family, scheme: str, mbq: Measured) -> str:
    tasks = family.groups["image"]
    text = f"{FAMILY_NAMES[family.name]} at {scheme}: MBQ has {100 * mbq.mean(tasks).estimate:.1f} % right"
    for rival, name in zip(RIVALS, ("AWQ's", "RTN's"), strict=True):
        other = family.runs[scheme, rival]
        gain = mbq.minus(other, tasks)
        verdict = "more than" if gain.low > 0 else "less than" if gain.high < 0 else "not surely different from"
        seeds = mbq.minus_by_seed(other, tasks)
        apart = f"; by draw {', '.join(f'{100 * value:+.1f}' for value in seeds)}" if len(seeds) > 1 else ""
        share = 100 * other.mean(tasks).estimate
        text += f", {verdict} {name} {share:.1f} % ({gain.percent(signed=True)}{apart})"
    return text + "."


def _means(family: Family) -> str:
    """Mean accuracy over the image and the text tasks, a row a method; schemes that only RTN has are left out."""
    lines = []
    schemes = [s for s in family.schemes if any(key[0] == s and key[1] != "rtn" for key in family.runs)]
    for kind, tasks in family.groups.items():
        if not tasks:
            continue
        lines += [f"Mean accuracy over {len(tasks)} {kind} tasks ({', '.join(tasks)}), %:\n"]
        rows = [["float", *[family.unquantized.mean(tasks).percent()] * len(schemes)]]
        for method in family.methods:
            row = [METHOD_NAMES[method]]
            for scheme in schemes:
                run = family.runs.get((scheme, method))
                row.append(run.mean(tasks).percent() if run else "")
            rows.append(row)
        lines += [markdown(["method", *schemes], rows), ""]
    return "\n".join(lines)


def _family(family: Family) -> str:
    lines = [f"## {FAMILY_NAMES[family.name]}, calibrated on captions\n", _means(family)]
    for scheme in family.schemes:
        lines += [f"### {FAMILY_NAMES[family.name]}, {scheme}, task by task\n", _by_task(family, scheme), ""]
    return "\n".join(lines)


def _by_task(family: Family, scheme: str) -> str:
    runs = {method: family.runs[scheme, method] for method in family.methods if (scheme, method) in family.runs}
    header = ["task", "float", *(METHOD_NAMES[method] for method in runs)]
    rows = [
        [task, *(run.mean([task]).percent() for run in (family.unquantized, *runs.values()))]
        for task in family.unquantized.any.tasks
    ]
    return markdown(header, rows)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
