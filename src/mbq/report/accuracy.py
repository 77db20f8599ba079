"""What the models answered: accuracy with intervals, paired differences, how many answers changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mbq.evaluation.results import Results
from mbq.evaluation.statistics import Interval
from mbq.report import charts
from mbq.report.panel import Chart, Panel, Table, chooser, key
from mbq.report.subjects import Subject
from mbq.report.wording import MINUS, counted, percent, points


@dataclass(frozen=True)
class Comparison:
    """Runs that answered the same questions: the baseline, which is a float model where there is one, and the others.

    number  of the comparison on its page, in names of charts
    """

    number: int
    baseline: Subject
    others: tuple[Subject, ...]

    @property
    def subjects(self) -> tuple[Subject, ...]:
        return (self.baseline, *self.others)

    @property
    def kinds(self) -> dict[str, tuple[str, ...]]:
        """The tasks that show pictures and those that do not, where there are any."""
        results = results_of(self.baseline)
        kinds = {"image tasks": results.image_tasks, "text tasks": results.text_tasks}
        return {kind: tasks for kind, tasks in kinds.items() if tasks}


def results_of(subject: Subject) -> Results:
    assert subject.run is not None, "only runs are compared"
    assert subject.run.results is not None, "only runs with results are compared"
    return subject.run.results


def comparisons(subjects: Sequence[Subject]) -> list[Comparison]:
    """Runs with answers to the same questions together, each group under its first float model."""
    groups: dict[tuple[object, ...], list[Subject]] = {}
    for subject in subjects:
        results = None if subject.run is None else subject.run.results
        if results is not None and results.tasks:
            asked = (results.questions, *((task, len(correct)) for task, correct in results.correct.items()))
            groups.setdefault(asked, []).append(subject)
    found = []
    for number, group in enumerate(groups.values()):
        baseline = next((subject for subject in group if not subject.quantized), group[0])
        others = tuple(subject for subject in group if subject is not baseline)
        found.append(Comparison(number, baseline, others))
    return found


def accuracy_panel(comparison: Comparison) -> Panel:
    """Means a kind of tasks, what each model loses to the baseline in each task, and all of it as a table."""
    kinds, labels = comparison.kinds, [subject.label for subject in comparison.subjects]
    rows = [
        {"model": subject.label, "kind": kind, **_per_cent("mean", results_of(subject).mean(tasks))}
        for subject in comparison.subjects
        for kind, tasks in kinds.items()
    ]
    drawn = [
        Chart(
            f"means{comparison.number}",
            "Right answers on average",
            charts.means(rows, labels, list(kinds), "Mean accuracy of every model by kind of tasks, with intervals."),
        )
    ]
    controls, readout = [], {}
    if comparison.others:
        others = [subject.label for subject in comparison.others]
        tasks = [task for group in kinds.values() for task in group]
        about = f"Accuracy of the chosen model less that of {comparison.baseline.label}, by task, with intervals."
        changes = _changes(comparison, tasks)
        drawn.append(
            Chart(
                f"differences{comparison.number}",
                f"Against {comparison.baseline.label}, task by task",
                charts.differences(changes, {"model": others[0]}, tasks, comparison.baseline.label, about),
            )
        )
        controls = chooser("model", "Model", others)
        readout = {key(*([label] * (len(others) > 1))): _summary(comparison, label, changes) for label in others}
    return Panel(
        f"accuracy{comparison.number}",
        charts=drawn,
        tables=[accuracy_table(comparison), *([changes_table(comparison)] if comparison.others else [])],
        controls=controls,
        readout=readout,
        notes=[
            "An answer is right where it is the reference to the letter. Accuracy of a task: Wilson's 95 % interval. "
            "Means and differences: percentile bootstrap over pictures, differences paired by question.",
            "The questions are the only random part of an interval; another calibration sample would add to it.",
        ],
    )


def _per_cent(name: str, interval: Interval) -> dict[str, float]:
    return {name: 100 * interval.estimate, "low": 100 * interval.low, "high": 100 * interval.high}


def _changes(comparison: Comparison, tasks: Sequence[str]) -> list[dict[str, object]]:
    baseline, rows = results_of(comparison.baseline), []
    for subject in comparison.others:
        for task in tasks:
            found = results_of(subject).minus(baseline, [task])
            verdict = charts.VERDICTS[0 if found.high < 0 else 2 if found.low > 0 else 1]
            rows.append({"model": subject.label, "task": task, **_per_cent("difference", found), "verdict": verdict})
    return rows


def _summary(comparison: Comparison, label: str, changes: Sequence[dict[str, object]]) -> str:
    verdicts = [row["verdict"] for row in changes if row["model"] == label]
    subject = next(subject for subject in comparison.others if subject.label == label)
    lost, gained = flips(subject, comparison.baseline)
    asked = sum(len(correct) for correct in results_of(subject).correct.values())
    return (
        f"{label}: surely worse in {counted(verdicts.count(charts.VERDICTS[0]), 'task')}, surely better in "
        f"{verdicts.count(charts.VERDICTS[2])}, not told apart in {verdicts.count(charts.VERDICTS[1])}. Of "
        f"{counted(asked, 'question')} it lost {lost:,} and gained {gained:,}."
    )


def flips(subject: Subject, baseline: Subject, task: str | None = None) -> tuple[int, int]:
    """Answers that only the baseline has right (lost), and that only the model has right (gained)."""
    lost = gained = 0
    for name, correct in results_of(subject).correct.items():
        if task in (None, name):
            before = results_of(baseline).correct[name]
            lost += int(np.sum(before & ~correct))
            gained += int(np.sum(~before & correct))
    return lost, gained


def accuracy_table(comparison: Comparison) -> Table:
    """A row a task, a column a model, then the means of each kind and their differences to the baseline."""
    rows: list[list[str]] = []
    strong = set()
    for kind, tasks in comparison.kinds.items():
        for task in tasks:
            rows.append([task, *(percent(results_of(subject).accuracy(task)) for subject in comparison.subjects)])
        strong.add(len(rows))
        means = [percent(results_of(subject).mean(tasks)) for subject in comparison.subjects]
        rows.append([f"mean of {counted(len(tasks), kind.removesuffix('s'))}", *means])
        if comparison.others:
            strong.add(len(rows))
            baseline = results_of(comparison.baseline)
            less = [points(results_of(subject).minus(baseline, tasks)) for subject in comparison.others]
            rows.append([f"less {comparison.baseline.label}", "", *less])
    head = ("task", *(subject.label for subject in comparison.subjects))
    return Table("Right answers, % (95 % interval)", head, rows, frozenset(strong))


def changes_table(comparison: Comparison) -> Table:
    """How many answers each model lost and gained, by task."""
    rows = []
    for task, correct in results_of(comparison.baseline).correct.items():
        counts = (flips(subject, comparison.baseline, task) for subject in comparison.others)
        rows.append([task, str(len(correct)), *(f"{MINUS}{lost} +{gained}" for lost, gained in counts)])
    head = ("task", "questions", *(subject.label for subject in comparison.others))
    return Table(f"Answers lost and gained against {comparison.baseline.label}", head, rows)


def history_panel(found: Sequence[Comparison]) -> Panel | None:
    """Runs of one name on the same questions at several times; None where no name has more than one."""
    rows, table = [], []
    kinds: dict[str, None] = {}
    for comparison in found:
        names = [subject.run.name for subject in comparison.subjects if subject.run is not None]
        for subject in comparison.subjects:
            name = subject.run.name if subject.run is not None else ""
            if names.count(name) < 2 or not subject.created:
                continue
            for kind, tasks in comparison.kinds.items():
                kinds[kind] = None
                mean = results_of(subject).mean(tasks)
                rows.append({"name": name, "created": subject.created, "kind": kind, **_per_cent("mean", mean)})
                table.append([name, subject.created, kind, percent(mean)])
    if not rows:
        return None
    repeated = list(dict.fromkeys(str(row["name"]) for row in rows))
    about = "Mean accuracy of the runs of the chosen name over time, with intervals."
    spec = charts.history(rows, {"name": repeated[0]}, list(kinds), about)
    return Panel(
        "history",
        charts=[Chart("runs", "Right answers over time", spec)],
        tables=[Table("Runs over time", ("model", "created", "tasks", "right, % (95 % interval)"), table)],
        controls=chooser("name", "Runs of", repeated),
        notes=["Only runs that answered the same questions stand on one line."],
    )
