"""Intervals against closed forms, a slow bootstrap written out, and simulated coverage."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mbq.errors import MBQError
from mbq.evaluation import statistics


def bits(count: int, share: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(count) < share


def slow_bootstrap(scores: dict[str, np.ndarray], resamples: int, seed: int) -> tuple[float, float]:
    """Questions drawn with replacement, task by task, in a loop."""
    generator = np.random.default_rng(seed)
    means = [
        np.mean([generator.choice(values, len(values)).mean() for values in scores.values()]) for _ in range(resamples)
    ]
    return tuple(np.quantile(means, [0.025, 0.975]))


@pytest.mark.parametrize(("right", "asked"), [(0, 20), (7, 20), (20, 20), (1900, 2000)])
def test_accuracy_is_wilsons_interval(right: int, asked: int) -> None:
    share, z = right / asked, stats.norm.ppf(0.975)
    centre = (share + z**2 / (2 * asked)) / (1 + z**2 / asked)
    arm = z / (1 + z**2 / asked) * np.sqrt(share * (1 - share) / asked + z**2 / (4 * asked**2))
    found = statistics.accuracy(np.arange(asked) < right)
    assert found.estimate == share
    assert (found.low, found.high) == pytest.approx((centre - arm, centre + arm), abs=1e-12)


def test_mean_weighs_tasks_alike_whatever_their_size() -> None:
    scores = {"small": np.array([True, False]), "large": np.ones(1000, bool)}
    assert statistics.mean(scores).estimate == 0.75


def test_mean_agrees_with_a_bootstrap_written_out() -> None:
    scores = {"a": bits(300, 0.9, 0), "b": bits(500, 0.4, 1), "c": bits(80, 0.7, 2)}
    found = statistics.mean(scores)
    assert (found.low, found.high) == pytest.approx(slow_bootstrap(scores, 10_000, 3), abs=0.002)


def test_mean_of_one_task_agrees_with_the_normal_interval() -> None:
    correct = bits(5000, 0.6, 0)
    arm = 1.96 * np.sqrt(correct.mean() * (1 - correct.mean()) / len(correct))
    found = statistics.mean({"a": correct})
    assert (found.low, found.high) == pytest.approx((correct.mean() - arm, correct.mean() + arm), abs=0.001)


def test_paired_difference_agrees_with_a_bootstrap_written_out() -> None:
    first = {"a": bits(300, 0.9, 0), "b": bits(500, 0.4, 1)}
    second = {task: values ^ bits(len(values), 0.1, 2) for task, values in first.items()}
    differences = {task: first[task].astype(float) - second[task] for task in first}
    found = statistics.paired_difference(first, second)
    assert found.estimate == pytest.approx(np.mean([values.mean() for values in differences.values()]))
    assert (found.low, found.high) == pytest.approx(slow_bootstrap(differences, 10_000, 3), abs=0.002)


def test_pairing_narrows_the_interval() -> None:
    """Two models that differ in one question of fifty: the paired interval sees it, the two accuracies' do not."""
    first = {"a": bits(2000, 0.7, 0)}
    second = {"a": first["a"] & ~bits(2000, 0.02, 1)}
    found = statistics.paired_difference(first, second)
    assert found.low > 0
    assert statistics.accuracy(first["a"]).low < statistics.accuracy(second["a"]).high


def test_equal_results_differ_by_exactly_nothing() -> None:
    scores = {"a": bits(100, 0.7, 0)}
    found = statistics.paired_difference(scores, scores)
    assert (found.estimate, found.low, found.high) == (0, 0, 0)


def test_different_questions_are_not_compared() -> None:
    with pytest.raises(MBQError, match="same questions"):
        statistics.paired_difference({"a": bits(10, 0.5, 0)}, {"a": bits(11, 0.5, 0)})


def test_seeded() -> None:
    scores = {"a": bits(100, 0.7, 0), "b": bits(100, 0.2, 0)}
    assert statistics.mean(scores) == statistics.mean(scores)
    assert statistics.mean(scores) != statistics.mean(scores, seed=1)


def test_questions_about_one_picture_are_resampled_together() -> None:
    """Ten copies of one task are no more evidence than one: the interval is that of one task."""
    correct, pictures = bits(500, 0.6, 0), np.arange(500)
    copies = {f"task {i}": correct for i in range(10)}
    together = statistics.mean(copies, dict.fromkeys(copies, pictures))
    alone = statistics.mean({"one": correct})
    assert (together.low, together.high) == pytest.approx((alone.low, alone.high), abs=0.003)
    apart = statistics.mean(copies)
    assert apart.high - apart.low == pytest.approx((alone.high - alone.low) / np.sqrt(10), rel=0.05)


def test_interval_covers_the_truth_95_times_in_100() -> None:
    """Pictures of varying difficulty, asked three tasks each, beside a task without pictures."""
    generator = np.random.default_rng(0)
    shares, pictures = np.array([0.9, 0.6, 0.3]), np.arange(300)
    covered = {True: 0, False: 0}
    for _ in range(400):
        hard = generator.normal(0, 0.15, 300)  # a picture's difficulty, shared by its questions
        scores = {f"t{i}": generator.random(300) < np.clip(share + hard, 0, 1) for i, share in enumerate(shares)}
        truth = np.mean([np.clip(share + generator.normal(0, 0.15, 20_000), 0, 1).mean() for share in shares])
        for grouped in covered:
            found = statistics.mean(scores, dict.fromkeys(scores, pictures) if grouped else None)
            covered[grouped] += found.low <= truth <= found.high
    assert 0.925 <= covered[True] / 400 <= 0.98
    assert covered[False] < covered[True], "ignoring shared pictures gives intervals that are too narrow"


def test_percent() -> None:
    assert statistics.Interval(0.5, 0.25, 0.751).percent() == "50.0 (25.0 to 75.1)"
    assert statistics.Interval(0.012, -0.001, 0.025).percent(signed=True) == "+1.2 (-0.1 to +2.5)"
