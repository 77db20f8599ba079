"""A run's figures in a model card: a section for readers, and ``model-index`` for the Hub."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard

from mbq.checkpoint.folder import write_file
from mbq.errors import MBQError
from mbq.evaluation.public import plus_minus, scores
from mbq.evaluation.results import Results
from mbq.evaluation.runs import Run
from mbq.evaluation.statistics import Interval
from mbq.model_card import RESULTS

_SECTION = re.compile(rf"^{RESULTS}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)


def write_results(folder: str | Path, results: str | Path, baseline: str | Path | None = None) -> Path:
    """Put a run's figures into the card of the model that it measured, in place of what stood there; return the card.

    results   a run of ``folder``'s model
    baseline  a run of another model on the same questions, to compare with

    They stand in the section "Results" and, for the Hub, as ``model-index`` in the front matter.

    Raises MBQError for a folder without a card, for what is no run, and for a run of another model.
    """
    folder, run = Path(folder), Run.load(results)
    other = None if baseline is None else Run.load(baseline)
    _check_same_model(folder, run)
    path = folder / "README.md"
    try:
        card = ModelCard.load(path)
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise MBQError(f"The front matter of {path} cannot be read ({said}); mend it.") from error
    section = "\n\n".join([RESULTS, *_paragraphs(run, other)]) + "\n\n"
    text, replaced = _SECTION.subn(lambda _: section, card.text, count=1)
    card.text = text if replaced else f"{card.text.rstrip()}\n\n{section}"
    card.data.model_name = folder.resolve().name
    found = list(_eval_results(run.results, run.info)) if run.results else []
    card.data.eval_results = [*found, *_public_results(run.info.get("lmms_eval") or {})] or None
    write_file(path, str(card).encode())
    return path


def _check_same_model(folder: Path, run: Run) -> None:
    own, measured = folder / "recipe.yaml", run.folder / "model" / "recipe.yaml"
    if not own.is_file() or not (folder / "README.md").is_file():
        raise MBQError(f"{folder} holds no model that mbq wrote with a card; give one that mbq quantize wrote.")
    if not measured.is_file() or own.read_bytes() != measured.read_bytes():
        raise MBQError(f"The run {run.folder} measured {run.name}, which was made by another recipe than {folder}.")


def _paragraphs(run: Run, baseline: Run | None) -> Iterator[str]:
    """Markdown, with no path of the machine that measured."""
    info = run.info
    if not (run.results or info.get("text") or info.get("lmms_eval")):
        raise MBQError(f"The run {run.folder} holds no figures; evaluate the model again.")
    version = (info.get("versions") or {}).get("mbq", "")
    kernel = f", kernel {info['kernel']}" if info.get("kernel") else ""
    yield (
        f"Measured by `mbq evaluate` {version} on {str(info.get('created'))[:10]}, in {info.get('dtype')} on "
        f"{str(info.get('device')).partition(':')[0]}{kernel}. In brackets stand 95 % intervals."
    )
    if run.results is not None:
        yield f"Right answers to the letter, in %, to {_questions(info)}{_beside(baseline)}:"
        yield "\n".join(_table(run.results, None if baseline is None else baseline.results, baseline))
    if info.get("text"):
        yield "\n".join(_text_lines(info["text"]))
    if info.get("lmms_eval"):
        limit = info["lmms_eval"].get("limit")
        of = f", the first {limit} documents of each task" if limit else ""
        yield f"lmms-eval {info['lmms_eval'].get('version', '')}{of}, ± one standard error:"
        yield "\n".join(_public_lines(info["lmms_eval"], baseline))


def _questions(info: Mapping[str, Any]) -> str:
    name = _asked(info)
    return f"the questions of {Path(name).name}" if name else "questions about mbq's synthetic world (`mbq.world`)"


def _beside(baseline: Run | None) -> str:
    return "" if baseline is None else f", beside {baseline.name}, with the paired difference"


def _table(results: Results, others: Results | None, baseline: Run | None) -> Iterator[str]:
    """A row a task and a row for the mean of each kind of tasks."""
    if baseline is not None and others is None:
        raise MBQError(f"The run {baseline.folder} asked no questions that {results.model} could be compared on.")
    yield "| task | questions | this model |" + (f" {baseline.name} | difference |" if baseline else "")
    yield "|---|--:|--:|" + ("--:|--:|" if baseline else "")
    for kind, tasks in (("image", results.image_tasks), ("text", results.text_tasks)):
        for task in tasks:
            yield _row(task, results, others, (task,))
        if len(tasks) > 1:
            yield _row(f"**{kind}: mean of {len(tasks)} tasks**", results, others, tasks)


def _row(name: str, results: Results, others: Results | None, tasks: tuple[str, ...]) -> str:
    def share(of: Results) -> Interval:
        return of.accuracy(tasks[0]) if len(tasks) == 1 else of.mean(tasks)

    cells = [name, str(sum(len(results.correct[task]) for task in tasks)), share(results).percent()]
    if others is not None:
        difference = results.minus(others, tasks)  # refuses other questions
        cells += [share(others).percent(), difference.percent(signed=True)]
    return f"| {' | '.join(cells)} |"


def _text_lines(text: Mapping[str, Any]) -> Iterator[str]:
    yield "| on given answers | |"
    yield "|---|--:|"
    names = {
        "perplexity": "perplexity",
        "perplexity_ratio": "perplexity / the float model's",
        "kl": "KL divergence from the float model, nats a token",
        "top1": "tokens that both find likeliest",
    }
    for key, name in names.items():
        if text.get(key):
            interval = Interval(**text[key])
            yield f"| {name} | {interval.estimate:.4g} ({interval.low:.4g} to {interval.high:.4g}) |"


def _public_lines(summary: Mapping[str, Any], baseline: Run | None) -> Iterator[str]:
    others = (baseline.info.get("lmms_eval") or {}) if baseline else {}
    beside = {(task, metric): shown for task, metric, _, shown in _scores(others)}
    yield "| task | metric | this model |" + (f" {baseline.name} |" if baseline and beside else "")
    yield "|---|---|--:|" + ("--:|" if beside else "")
    for task, metric, _, shown in _scores(summary):
        yield f"| {task} | {metric} | {shown} |" + (f" {beside.get((task, metric), '')} |" if beside else "")


def _scores(summary: Mapping[str, Any]) -> Iterator[tuple[str, str, float, str]]:
    """Task, metric, value, and the value with its standard error, of lmms-eval's own summary."""
    for task, metric, value, error in scores(summary):
        yield task, metric, value, plus_minus(value, error)


def _eval_results(results: Results, info: Mapping[str, Any]) -> Iterator[EvalResult]:
    """A task's accuracy, in per cent, as the Hub's ``model-index`` takes it."""
    asked = _asked(info)
    name = Path(asked).stem if asked else "mbq's synthetic world"
    for task in results.tasks:
        share = results.accuracy(task)
        yield EvalResult(
            task_type="image-text-to-text" if task in results.image_tasks else "text-generation",
            dataset_type=re.sub(r"[^\w.-]+", "-", name.replace("'", "")).lower(),
            dataset_name=f"{name}: {task}",
            dataset_config=task,
            metric_type="exact_match",
            metric_name=f"Exact match, % (95 % interval): {share.percent()}",
            metric_value=round(100 * share.estimate, 2),
        )


def _public_results(summary: Mapping[str, Any]) -> Iterator[EvalResult]:
    for task, metric, value, shown in _scores(summary):
        yield EvalResult(
            task_type="image-text-to-text",
            dataset_type=task,
            dataset_name=task,
            metric_type=metric.partition(" ")[0],
            metric_name=f"{metric} (lmms-eval {summary.get('version', '')}): {shown}",
            metric_value=value,
        )


def _asked(info: Mapping[str, Any]) -> str | None:
    """The file that the questions came from; None for the built-in ones."""
    return (info.get("data") or {}).get("data")
