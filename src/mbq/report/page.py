"""The page itself: everything put into the templates, with a policy that forbids whatever is not in the file."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mbq import __version__
from mbq.recipe import Recipe
from mbq.report import wording
from mbq.report.accuracy import Comparison, accuracy_panel, comparisons, history_panel, results_of
from mbq.report.charts import CONFIG
from mbq.report.figures import figure_tables
from mbq.report.making import diagnosis, diagnosis_panel, search_panel, sensitivity_panel, time_panel
from mbq.report.panel import Panel
from mbq.report.pictures import Pictures
from mbq.report.questions import DIRECTIONS, questions
from mbq.report.serving import serving
from mbq.report.subjects import Subject
from mbq.scheme import SCHEMES

HERE = Path(__file__).parent
SCRIPTS = ("vendor/vega.min.js", "vendor/vega-lite.min.js", "vendor/vega-embed.min.js", "templates/page.js")
GENERATOR = "mbq report"


def page(subjects: Sequence[Subject]) -> str:
    """The HTML of a report on ``subjects``. Raises MBQError for records that are not what mbq writes."""
    compared = comparisons(subjects)
    pictures = Pictures()
    answered = [accuracy_panel(each) for each in compared]
    evaluated = [
        {"comparison": each, "panel": panel, "questions": questions(each, pictures)}
        for each, panel in zip(compared, answered, strict=True)
    ]
    making = {
        "sensitivity": sensitivity_panel(subjects),
        "search": search_panel(subjects),
        "diagnosis": diagnosis_panel(subjects),
        "time": time_panel(subjects),
        "history": history_panel(compared),
    }
    diagnosed = [diagnosis(subject) for subject in subjects if subject.records.diagnosis]
    panels = [panel for panel in (*making.values(), *answered) if panel is not None]
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": wording.size, "duration": wording.duration, "number": wording.number}
    style, scripts = _text("templates/page.css"), [_text(name) for name in SCRIPTS]
    return environment.get_template("page.html").render(
        title=title(subjects),
        generator=f"{GENERATOR} {__version__}",
        policy=policy(style, scripts),
        style=Markup(style),
        scripts=[Markup(script) for script in scripts],
        drawings=drawings(panels),
        subjects=subjects,
        rows=overview(subjects, compared),
        single=next(iter(subjects)) if len(subjects) == 1 and subjects[0].quantized else None,
        evaluated=evaluated,
        figures=figure_tables(subjects),
        diagnosed=diagnosed,
        directions=DIRECTIONS,
        pictures=pictures,
        recipes=recipes(subjects),
        serving=serving(subjects),
        **making,
    )


def title(subjects: Sequence[Subject]) -> str:
    quantized = [subject for subject in subjects if subject.quantized]
    if len(quantized) == 1:
        recipe = quantized[0].records.recipe or {}
        method = wording.METHODS.get(quantized[0].method, quantized[0].method)
        return f"{str(recipe.get('model', '')).split('/')[-1] or quantized[0].label}, {quantized[0].scheme} by {method}"
    bases = {str((subject.records.recipe or {}).get("model")).split("/")[-1] for subject in quantized}
    if len(bases) == 1 and bases != {"None"}:
        return f"{bases.pop()}, quantized in {len(quantized)} ways"
    return wording.counted(len(subjects), "model")


def policy(style: str, scripts: Sequence[str]) -> str:
    """A Content-Security-Policy under which nothing runs or is shown that this file does not hold.

    Scripts and the style sheet are named by their hashes, so that not even a script that got into the page would run.
    Vega sets styles on the elements that it makes, which no hash can name.
    """
    allowed = " ".join(_hash(script) for script in scripts)
    return (
        f"default-src 'none'; script-src {allowed}; style-src-elem {_hash(style)}; style-src-attr 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def drawings(panels: Sequence[Panel]) -> dict[str, Any]:
    """What page.js reads: every chart's specification, and the sentence for each choice of a panel's controls."""
    return {
        "config": CONFIG,
        "charts": {chart.name: chart.spec for panel in panels for chart in panel.charts},
        "readouts": {panel.name: panel.readout for panel in panels},
    }


@dataclass(frozen=True)
class Overview:
    """A line of the table of models; texts, and a dash for what is not known."""

    label: str
    what: str
    before: str
    after: str
    made_in: str
    memory: str
    accuracy: str
    difference: str
    evaluated: str


def overview(subjects: Sequence[Subject], compared: Sequence[Comparison]) -> list[Overview]:
    at = {id(subject): comparison for comparison in compared for subject in comparison.subjects}
    return [_overview(subject, at.get(id(subject))) for subject in subjects]


def _overview(subject: Subject, comparison: Comparison | None) -> Overview:
    measured = subject.records.measurements or {}
    seconds = measured.get("seconds")
    kind = f"{subject.scheme}, {wording.METHODS.get(subject.method, subject.method)}" if subject.quantized else "float"
    accuracy = difference = wording.NOTHING
    if comparison is not None:
        results = results_of(subject)
        accuracy = wording.percent(results.mean())
        if subject is not comparison.baseline:
            difference = wording.points(results.minus(results_of(comparison.baseline)))
    info = {} if subject.run is None else subject.run.info
    return Overview(
        subject.label,
        kind,
        wording.size(_at(measured, "bytes", "before")),
        wording.size(subject.bytes if subject.bytes is not None else _at(measured, "bytes", "after")),
        wording.duration(sum(seconds.values())) if isinstance(seconds, Mapping) else wording.NOTHING,
        memory(measured),
        accuracy,
        difference,
        f"{wording.duration(info.get('seconds'))} on {info.get('device', '?')}" if info else wording.NOTHING,
    )


def memory(measured: Mapping[str, Any]) -> str:
    peak = measured.get("peak_memory")
    if not isinstance(peak, Mapping):
        return wording.NOTHING
    parts = [wording.size(peak.get("process"))]
    if peak.get("device") is not None:
        parts.append(f"{wording.size(peak['device'])} on the GPU")
    return ", ".join(parts)


def _at(content: Any, *names: str) -> Any:
    for name in names:
        content = content.get(name) if isinstance(content, Mapping) else None
    return content


@dataclass(frozen=True)
class Option:
    """A line of the table of recipes: the value for each quantized model, and whether it is the default everywhere."""

    name: str
    values: tuple[str, ...]
    default: bool


def recipes(subjects: Sequence[Subject]) -> dict[str, Any]:
    """The options of every quantized model beside each other, and each recipe.yaml as it stands."""
    having = [subject for subject in subjects if subject.records.recipe]
    usual = vars(Recipe())
    sizes = {name: scheme.weights.group_size for name, scheme in SCHEMES.items()}  # which recipe.yaml spells out
    names = dict.fromkeys(str(name) for subject in having for name in subject.records.recipe or {})
    options = []
    for name in names:
        values = [(subject.records.recipe or {}).get(name) for subject in having]
        plain = name in usual and all(value == _plain(usual[name]) for value in values)
        if name == "group_size":
            plain = all(value == sizes.get(subject.scheme) for value, subject in zip(values, having, strict=True))
        if name != "versions":
            options.append(Option(name, tuple(_shown(value) for value in values), plain))
    return {"subjects": having, "options": options}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    if value is None or value == []:
        return wording.NOTHING
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


@cache
def _text(name: str) -> str:
    """Without the references to source maps, which are not in the file."""
    text = (HERE / name).read_text(encoding="utf-8")
    return "\n".join(line for line in text.split("\n") if not line.startswith("//# sourceMappingURL")).strip()
