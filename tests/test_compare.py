"""Paired comparison: held against scipy and the bootstrap."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping

import pytest
from scipy import stats

from minipuzzle.eval import compare


def answers_of(values: list[float]) -> dict[int, float]:
    return dict(enumerate(values))


def test_difference_is_paired() -> None:
    teacher, student = [1.0, 1, 1, 0, 0, 1, 1, 0], [1.0, 1, 0, 0, 1, 1, 0, 0]
    result = compare.difference(answers_of(teacher), answers_of(student))
    deltas = [b - a for a, b in zip(teacher, student, strict=True)]
    assert result.mean == pytest.approx(-1 / 8)
    assert result.stderr == pytest.approx(float(stats.sem(deltas)))
    assert (result.lost, result.won, result.n) == (2, 1, 8)
    low, high = stats.norm.interval(0.95, result.mean, result.stderr)
    assert (result.low, result.high) == pytest.approx((float(low), float(high)))


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (9, 2), (40, 61), (2000, 2100)])
def test_mcnemar_is_the_exact_binomial_test(lost: int, won: int) -> None:
    expected = stats.binomtest(lost, lost + won).pvalue if lost + won else 1.0
    assert compare.mcnemar(lost, won) == pytest.approx(expected)


def test_different_questions_are_an_own_slip() -> None:
    with pytest.raises(AssertionError, match="different questions"):
        compare.difference({0: 1.0, 1: 0.0}, {0: 1.0, 2: 0.0})


def simulated(rng: random.Random, sizes: Mapping[str, int]) -> tuple[compare.Answers, ...]:
    teacher: dict[str, dict[int, float]] = {}
    student: dict[str, dict[int, float]] = {}
    for name, size in sizes.items():
        known = [float(rng.random() < 0.7) for _ in range(size)]
        teacher[name] = answers_of(known)
        student[name] = answers_of([k if rng.random() < 0.9 else 1.0 - k for k in known])
    return teacher, student


def test_retained_accuracy_and_its_error_against_the_bootstrap() -> None:
    rng = random.Random(0)
    teacher, student = simulated(rng, {"a": 300, "b": 120})
    result = compare.retained(teacher, student)
    means = [
        statistics.fmean(statistics.fmean(task.values()) for task in answers.values())
        for answers in (teacher, student)
    ]
    assert result.value == pytest.approx(means[1] / means[0])
    ratios = []
    for _ in range(1000):
        drawn = {name: rng.choices(list(task), k=len(task)) for name, task in teacher.items()}
        sums = [
            statistics.fmean(
                statistics.fmean(answers[name][i] for i in drawn[name]) for name in drawn
            )
            for answers in (teacher, student)
        ]
        ratios.append(sums[1] / sums[0])
    assert result.stderr == pytest.approx(statistics.stdev(ratios), rel=0.1)


def test_a_model_equals_itself() -> None:
    teacher, _ = simulated(random.Random(1), {"a": 50, "b": 20})
    record = compare.comparison(teacher, teacher)
    assert record["mean"]["mean"] == record["mean"]["stderr"] == 0
    assert record["retained"]["value"] == 1 and record["retained"]["stderr"] == 0
    assert record["mean"]["p_value"] == 1
