"""Who plays in the tournament: the best candidates that are not all the same idea.

Candidates that differ by one step of a width come out of a tournament as they went in. So the
finalists are to lie apart, by a distance over what was decided.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .space import Point, Space

if TYPE_CHECKING:
    from .trials import Trial

APART = 0.1  # the distance asked for at first: a tenth of the layers gone in one and not the other
STEPS = 6  # how often it is halved until enough are found; after that any difference will do
POOL = 4  # times as many finalists: candidates behind that are too bad to play for being different


def finalists(trials: Sequence[Trial], space: Space, number: int) -> list[Trial]:
    """Up to `number` candidates, best KL first.

    The best one plays in any case. Others follow in the order of their KL if they lie at least
    APART from all that were taken; while too few do, the distance asked for is halved. Trials that
    were screened out or do not fit never play, nor does the same architecture twice.
    """
    ranked = sorted(
        (trial for trial in trials if not trial.screened and space.fits(trial.point)),
        key=lambda trial: (trial.proxies.kl, trial.number),
    )[: POOL * number]
    chosen: list[Trial] = []
    for apart in (*(APART / 2**step for step in range(STEPS)), 0.0):
        for trial in ranked:
            distances = [distance(space, trial.point, other.point) for other in chosen]
            if len(chosen) < number and all(d >= apart and d > 0 for d in distances):
                chosen.append(trial)
    return sorted(chosen, key=lambda trial: (trial.proxies.kl, trial.number))


def distance(space: Space, one: Point, other: Point) -> float:
    """How much two architectures differ, from 0 (the same) to 2.

    The mean over the teacher's layers of: 1 where a layer is gone in one of them only, else the
    largest difference of its sizes as a share of the teacher's. A difference of the stream's width
    adds its share of the teacher's width.
    """
    left, right = _layers(space, one), _layers(space, other)
    total = 0.0
    for whole, a, b in zip(space.architecture.layers, left, right, strict=True):
        if a is None or b is None:
            total += (a is None) != (b is None)
        else:
            sizes = {name: size for name, size in vars(whole).items() if size}  # a flag is no size
            total += max(abs(a[name] - b[name]) / size for name, size in sizes.items())
    stream = abs(space.shape(one).hidden - space.shape(other).hidden)
    return total / len(left) + stream / space.architecture.hidden


def _layers(space: Space, point: Point) -> list[dict[str, int] | None]:
    """The sizes of every layer of the teacher under a point; None for those that are gone."""
    gone, kept = space.gone(point), iter(space.shape(point).layers)
    return [None if i in gone else vars(next(kept)) for i in range(len(space.architecture.layers))]
