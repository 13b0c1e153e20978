"""The Pareto front of trials."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .study import Trial


def values(trial: Trial, objectives: Sequence[str]) -> tuple[float, ...]:
    """What a trial is worth by each objective, the less the better: nats, bytes, seconds."""
    named = {
        "kl": trial.proxies.kl,
        "memory": trial.costs.memory_bytes,
        "latency": trial.costs.latency,
    }
    found = []
    for objective in objectives:
        value = named[objective]
        assert value is not None, f"{objective} was not measured"
        found.append(float(value))
    return tuple(found)


def front(trials: Sequence[Trial], objectives: Sequence[str]) -> list[Trial]:
    """Trials than which no other is as good by all objectives and better by one, in their order.

    Of trials with equal values all are kept. One objective: the best.
    """
    points = [values(trial, objectives) for trial in trials]
    return [
        trial
        for trial, point in zip(trials, points, strict=True)
        if not any(_dominates(other, point) for other in points)
    ]


def _dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))
