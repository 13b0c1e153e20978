"""A space that is a formula: the study's tests need no model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path

from minipuzzle.search.costs import Costs
from minipuzzle.search.proxies import Proxies
from minipuzzle.search.space import Parameter, Point
from minipuzzle.search.study import Judged

PARAMETERS = (
    Parameter("removed.mamba", tuple(range(5))),
    Parameter("removed.attention", (0, 1)),
    Parameter("removed.ffn", tuple(range(5))),
    Parameter("width", (*range(168, 672, 42), 672)),
)


@dataclass(frozen=True)
class TableSpace:
    """Layers that go and a width, under a budget of bytes."""

    budget: int = 820
    parameters: tuple[Parameter, ...] = PARAMETERS

    @property
    def cardinality(self) -> int:
        return prod(len(p.choices) for p in self.parameters)

    def canonical(self, values: Mapping[str, int]) -> Point:
        return Point(tuple((p.name, values[p.name]) for p in self.parameters))

    def costs(self, point: Point) -> Costs:
        mamba, attention, ffn, width = (value for _, value in point.values)
        size = 100 + 35 * (11 - mamba) + 33 * (3 - attention) + 40 * (11 - ffn) * width // 672
        return Costs(size, size // 2, size / 1e6)

    def fitting(self, point: Point) -> Point | None:
        for width in reversed(self.parameters[-1].choices):
            if width <= point["width"]:
                fits = self.canonical({**point.to_json(), "width": width})
                if self.costs(fits).memory_bytes <= self.budget:
                    return fits
        return None

    def points(self) -> Iterator[Point]:
        for values in product(*(p.choices for p in self.parameters)):
            names = (p.name for p in self.parameters)
            point = self.canonical(dict(zip(names, values, strict=True)))
            if self.fitting(point) == point:
                yield point


def divergence(point: Point) -> float:
    """A landscape with interactions and ripples, whose best point is found by looking at all."""
    mamba, attention, ffn, width = (value for _, value in point.values)
    narrow = 1 - width / 672
    layers = 0.02 * mamba * mamba + 0.09 * attention + 0.03 * ffn * ffn + 0.3 * narrow * narrow
    together = 0.02 * mamba * ffn + 0.3 * narrow * ffn * 0.2 + 0.03 * mamba * attention
    ripple = 0.01 * ((7 * mamba + 5 * attention + 3 * ffn + width // 42) % 11) / 11
    return layers + together + ripple


def judge(points: Sequence[Point]) -> list[Judged]:
    return [Judged(Proxies(divergence(p), 0.5, 0.25, 4), screened=False) for p in points]


def slow_judge(log: Path, seconds: float) -> Callable[[Sequence[Point]], list[Judged]]:
    """The same, that takes its time and writes down each point: when begun, when done."""

    def wait(points: Sequence[Point]) -> list[Judged]:
        with log.open("a") as file:
            file.writelines(f"begun {point.key}\n" for point in points)
        time.sleep(seconds * len(points))
        with log.open("a") as file:
            file.writelines(f"done {point.key}\n" for point in points)
        return judge(points)

    return wait
