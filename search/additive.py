"""Where the study begins: exact solutions for additive prices, and greedy ones.

A price is the KL of a single change to the teacher: one unit of layers gone, or one axis narrowed
(Puzzle's replace-1-block scores: arXiv 2411.19146, section 4). If prices simply added up, the best
architecture under the limits would be the solution of an integer program. They do not, which is
why a study follows; but they say where to begin.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from minipuzzle.prune.select import select
from minipuzzle.scores import Scores
from minipuzzle.selection import CUT_AXES, Selection

from .program import solve
from .space import GONE, Parameter, Point, Space

PRICED_SIZES = 4  # of an axis are measured, between them prices are interpolated
EXACT, GREEDY = 5, 1  # seeds of each sort

Measure = Callable[[Sequence[Selection]], Sequence[float]]
"""KL to the teacher of each selection."""


@dataclass(frozen=True)
class Prices:
    """Prices in nats per token.

    `removal`: unit of layers -> price. `sizes`: parameter -> value -> price; that of an axis of
    all layers is shared equally by the layers that have it.
    """

    removal: Mapping[tuple[int, ...], float]
    sizes: Mapping[str, Mapping[int, float]]

    def share(self, space: Space, parameter: Parameter) -> int:
        """Number of layers that share the price of a parameter."""
        return len(layers_of(space, parameter)) or 1

    def of(self, space: Space, point: Point) -> float:
        """The additive price of a point."""
        gone = space.gone(point)
        total = sum(price for unit, price in self.removal.items() if set(unit) <= gone)
        for parameter in space.parameters:
            if parameter.axis is not None:
                there = layers_of(space, parameter)
                kept = len(set(there) - gone) / len(there) if there else 1.0
                total += kept * self.sizes[parameter.name][point[parameter.name]]
        return total


def layers_of(space: Space, parameter: Parameter) -> tuple[int, ...]:
    """Positions of the layers that a parameter of sizes narrows; () for the stream."""
    assert parameter.axis is not None
    if parameter.layer is not None:
        return (parameter.layer,)
    return tuple(
        i
        for i, layer in enumerate(space.architecture.layers)
        if parameter.axis in CUT_AXES[layer.kind] and i not in space.layers.dropped
    )


def open_units(space: Space) -> tuple[tuple[int, ...], ...]:
    """Units of layers that a point may remove or not."""
    ordered = (unit for order in space.layers.orders.values() for unit in order)
    return tuple(sorted({*ordered, *space.layers.free.values()}))


def measure_prices(space: Space, scores: Scores, measure: Measure) -> Prices:
    """Measure every single change on its own, all in one batch."""
    units = open_units(space)
    asked = {p.name: _samples(p) for p in space.parameters if p.axis is not None}
    dropped = space.layers.dropped

    def single(gone: frozenset[int], values: Mapping[str, int]) -> Selection:
        together = space.family.removable(space.architecture)
        sizes = space.sizes(values)
        return select(scores, space.architecture, removed=gone, sizes=sizes, units=together)

    cuts = [single(dropped | set(unit), {}) for unit in units]
    cuts += [single(dropped, {name: v}) for name, values in asked.items() for v in values]
    base = [single(dropped, {})] if dropped else []
    found = list(measure([*cuts, *base]))
    floor = found.pop() if base else 0.0
    removal = {unit: found.pop(0) - floor for unit in units}
    sizes = {}
    for parameter in space.parameters:
        if parameter.axis is not None:
            points = {value: found.pop(0) - floor for value in asked[parameter.name]}
            sizes[parameter.name] = _interpolated(parameter, points)
    return Prices(removal, sizes)


def _samples(parameter: Parameter) -> list[int]:
    """The sizes to measure: spread over those below the whole, the narrowest among them."""
    below = parameter.choices[:-1]
    picks = np.linspace(0, len(below) - 1, min(PRICED_SIZES, len(below))).round()
    return [below[int(i)] for i in sorted(set(picks.tolist()))]


def _interpolated(parameter: Parameter, measured: Mapping[int, float]) -> dict[int, float]:
    known = {**measured, parameter.whole: 0.0}
    at = sorted(known)
    prices = np.interp(parameter.choices, at, [known[size] for size in at])
    return dict(zip(parameter.choices, prices.tolist(), strict=True))


def additive_seeds(space: Space, prices: Prices) -> list[Point]:
    """Points to begin with: the best additive ones, the greedy one, and width alone."""
    found = [*solve(space, prices, EXACT), greedy(space, prices)]
    found.append(space.fitting(space.extreme(smallest=False)))
    return list(dict.fromkeys(point for point in found if point is not None))


def greedy(space: Space, prices: Prices) -> Point | None:
    """One step of a parameter after the other, the one that costs least per byte it saves."""
    point = space.extreme(smallest=False)
    while not space.fits(point):
        moves = [move for p in space.parameters if (move := _cheaper(space, point, p))]
        moves = [m for m in moves if _saved(space, point, m) > 0]
        if not moves:
            return None
        here = prices.of(space, point)
        point = min(
            moves,
            key=lambda m: (prices.of(space, m) - here) / _saved(space, point, m),  # noqa: B023
        )
    return space.filled(point)


def _saved(space: Space, point: Point, move: Point) -> int:
    return space.costs(point).memory_bytes - space.costs(move).memory_bytes


def _cheaper(space: Space, point: Point, parameter: Parameter) -> Point | None:
    """The point with one parameter a step cheaper, if layers of that kind may still go."""
    towards = 1 if parameter.axis is None else -1
    at = parameter.choices.index(point[parameter.name]) + towards
    if not 0 <= at < len(parameter.choices):
        return None
    move = space.canonical({**point.mapping, parameter.name: parameter.choices[at]})
    crowded = parameter.choices[at] == GONE and max(space.crowding(move), default=0) > 0
    return None if crowded else move
