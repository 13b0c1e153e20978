"""What changed between two models that answered the same questions.

Answers of two models to one question go together (both know it, or neither): the error of their
difference is taken over the differences, which is smaller than from two separate accuracies.
Method: A. Agresti, Categorical Data Analysis, section 11.1 (matched pairs); the ratio's error by
the delta method.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Answers = Mapping[str, Mapping[int, float]]
"""Task -> question number -> 1.0 right, 0.0 wrong."""

Z95 = statistics.NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Difference:
    """Accuracy of a model minus that of the reference, over ``n`` questions both answered.

    ``low`` and ``high`` bound the 95 % interval. ``lost`` questions only the reference answered,
    ``won`` only the other one; ``p_value`` is McNemar's exact two-sided test of lost = won.
    """

    mean: float
    stderr: float
    low: float
    high: float
    n: int
    lost: int
    won: int
    p_value: float


@dataclass(frozen=True)
class Retained:
    """Mean accuracy as a share of the reference's, unweighted over tasks, with 95 % interval."""

    value: float
    stderr: float
    low: float
    high: float


def accuracy(answers: Mapping[int, float]) -> tuple[float, float]:
    """Mean and its standard error: sample standard deviation / sqrt(n), 0 for one question."""
    values = list(answers.values())
    return statistics.fmean(values), _mean_stderr(values)


def difference(reference: Mapping[int, float], other: Mapping[int, float]) -> Difference:
    """Compare two models on one task. AssertionError unless the questions are the same."""
    pairs = _pairs(reference, other)
    deltas = [b - a for a, b in pairs]
    mean, stderr = statistics.fmean(deltas), _mean_stderr(deltas)
    lost, won = sum(d < 0 for d in deltas), sum(d > 0 for d in deltas)
    low, high = mean - Z95 * stderr, mean + Z95 * stderr
    return Difference(mean, stderr, low, high, len(deltas), lost, won, mcnemar(lost, won))


def mean_difference(differences: Sequence[Difference]) -> Difference:
    """The unweighted mean of differences over tasks, whose questions are independent."""
    count = len(differences)
    mean = statistics.fmean(d.mean for d in differences)
    stderr = math.sqrt(sum(d.stderr**2 for d in differences)) / count
    lost, won = sum(d.lost for d in differences), sum(d.won for d in differences)
    low, high = mean - Z95 * stderr, mean + Z95 * stderr
    total = sum(d.n for d in differences)
    return Difference(mean, stderr, low, high, total, lost, won, mcnemar(lost, won))


def retained(reference: Answers, other: Answers) -> Retained:
    """Mean accuracy of ``other`` / mean accuracy of ``reference``, unweighted over tasks.

    Delta method: with R the ratio, the error of R is that of the mean of (b - R a) / mean(a) over
    pairs (a, b), task by task.
    """
    means = {name: accuracy(answers)[0] for name, answers in reference.items()}
    base = statistics.fmean(means.values())
    assert base > 0, "the reference answers nothing right"
    value = statistics.fmean(accuracy(other[name])[0] for name in reference) / base
    variance = sum(
        _mean_stderr([(b - value * a) / base for a, b in _pairs(reference[name], other[name])]) ** 2
        for name in reference
    )
    stderr = math.sqrt(variance) / len(means)
    return Retained(value, stderr, value - Z95 * stderr, value + Z95 * stderr)


def comparison(reference: Answers, other: Answers) -> dict[str, Any]:
    """Everything above as a JSON-able record: ``tasks``, their ``mean``, ``retained``."""
    tasks = {name: difference(reference[name], other[name]) for name in reference}
    return {
        "tasks": {name: asdict(value) for name, value in tasks.items()},
        "mean": asdict(mean_difference(list(tasks.values()))),
        "retained": asdict(retained(reference, other)),
    }


def mcnemar(lost: int, won: int) -> float:
    """Chance of a split at least this uneven of ``lost + won`` fair coin tosses."""
    tosses = lost + won
    tail = sum(math.comb(tosses, k) for k in range(min(lost, won) + 1))
    return min(1.0, 2 * tail / (1 << tosses))


def _pairs(reference: Mapping[int, float], other: Mapping[int, float]) -> list[tuple[float, float]]:
    assert reference.keys() == other.keys(), "the two models were asked different questions"
    return [(value, other[question]) for question, value in reference.items()]


def _mean_stderr(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
