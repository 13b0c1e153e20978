"""Sizes of layers at which latency is measured, and values between them.

A grid spans the axes on which layers of one kind differ between candidates. Coordinates are sizes,
but for heads that share something, which count per group: 12 query heads on 4 KV heads stand at
3, so that every point of the grid is a layer that exists.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from minipuzzle.architecture import LAYER_CLASSES, Architecture, Kind, Layer
from minipuzzle.errors import UserError
from minipuzzle.selection import CUT_AXES

KNOTS = 5  # sizes of an axis that are measured at most; time is close to linear in between
CROSSED_KNOTS = 3  # the same where several axes vary
HIDDEN = "hidden"

Place = tuple[int, ...]
"""A point of a grid: hidden size, then a coordinate per cut axis of the kind."""


@dataclass(frozen=True)
class Grid:
    """Where layers like `layer` are measured: axis -> ascending coordinates, `hidden` first."""

    layer: Layer
    knots: Mapping[str, tuple[int, ...]]

    @classmethod
    def spanning(
        cls, layer: Layer, hidden: Sequence[int], sizes: Mapping[str, Sequence[int]]
    ) -> Grid:
        """The grid over `sizes` (axis -> sizes, in any order), the layer's own among them.

        Of many sizes a few are taken, evenly and with both ends: `KNOTS` on the only axis that
        varies, fewer where several do. Head counts that the groups do not divide are left out.
        """
        wanted = {axis: _coordinates(layer, axis, sizes) for axis in CUT_AXES[layer.kind]}
        varying = sum(len(found) > 1 for found in (hidden, *wanted.values()))
        number = KNOTS if varying <= 1 else CROSSED_KNOTS
        knots = {
            axis: thinned(found, coordinate(layer, axis), number) for axis, found in wanted.items()
        }
        return cls(layer, {HIDDEN: tuple(sorted(hidden)), **knots})

    @property
    def kind(self) -> Kind:
        """Kind of the layers."""
        return self.layer.kind

    def places(self) -> Iterator[Place]:
        """All points, the last axis fastest."""
        yield from product(*self.knots.values())

    def place(self, layer: Layer, hidden: int) -> Place:
        """Where a layer stands; it need not be a point that is measured."""
        return (hidden, *(coordinate(layer, axis) for axis in CUT_AXES[self.kind]))

    def described(self, place: Place) -> str:
        """A point in words: "width 704"."""
        named = zip(CUT_AXES[self.kind], place[1:], strict=True)
        return ", ".join(f"{axis} {value}" for axis, value in named)

    def layer_at(self, place: Place) -> Layer:
        """The layer at a point."""
        layer = self.layer
        for axis, value in zip(CUT_AXES[self.kind], place[1:], strict=True):
            layer = _with(layer, axis, value)
        return layer

    def value(self, values: Mapping[Place, float], layer: Layer, hidden: int) -> float:
        """The value of a layer, piecewise linear along every axis (numpy.interp).

        Raises:
            UserError: for a layer outside the grid.
        """
        self._require_inside(layer, hidden)
        shape = tuple(len(knots) for knots in self.knots.values())
        grid = np.array([values[place] for place in self.places()]).reshape(shape)
        place = self.place(layer, hidden)
        for at, knots in zip(reversed(place), reversed(list(self.knots.values())), strict=True):
            lines = grid.reshape(-1, len(knots))
            grid = np.array([np.interp(at, knots, line) for line in lines]).reshape(grid.shape[:-1])
        return float(grid)

    def _require_inside(self, layer: Layer, hidden: int) -> None:
        fixed = set(vars(layer)) - set(CUT_AXES[self.kind])
        if any(getattr(layer, name) != getattr(self.layer, name) for name in fixed):
            raise UserError(
                f"the latency table holds layers like {self.layer}, not {layer}; measure it again"
            )
        for (axis, knots), at in zip(self.knots.items(), self.place(layer, hidden), strict=True):
            if not knots[0] <= at <= knots[-1]:
                per_group = " per group" if _grouped(self.kind, axis) else ""
                raise UserError(
                    f"the latency table holds {self.kind} layers of {axis} {knots[0]} to "
                    f"{knots[-1]}{per_group}, not {at}; measure it again with that size"
                )

    def to_json(self) -> dict[str, Any]:
        """A JSON-able record; `from_json` reads it back."""
        return {
            "kind": self.kind,
            "layer": vars(self.layer),
            "knots": {axis: list(knots) for axis, knots in self.knots.items()},
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Grid:
        """Read what `to_json` wrote."""
        layer = LAYER_CLASSES[record["kind"]](**record["layer"])
        return cls(layer, {axis: tuple(knots) for axis, knots in record["knots"].items()})


def grids(
    architecture: Architecture, sizes: Mapping[str, Sequence[int]], hidden: Sequence[int]
) -> dict[Kind, Grid]:
    """A grid for every kind of layer that an architecture of uniform layers has."""
    found: dict[Kind, Grid] = {}
    for layer in dict.fromkeys(architecture.layers):
        assert layer.kind not in found, "layers of one kind have one shape in a config.json"
        found[layer.kind] = Grid.spanning(layer, hidden, sizes)
    return found


def _coordinates(layer: Layer, axis: str, sizes: Mapping[str, Sequence[int]]) -> set[int]:
    """Coordinates of the sizes of an axis, the layer's own among them."""
    few = _group_size(layer, axis)
    given = {size // few for size in sizes.get(axis, ()) if size >= few and size % few == 0}
    return given | {coordinate(layer, axis)}


def thinned(sizes: set[int], own: int, number: int) -> tuple[int, ...]:
    """At most `number` of the sizes and `own`, evenly spaced among them, ascending."""
    ordered = sorted(sizes)
    if len(ordered) > number:
        picks = np.linspace(0, len(ordered) - 1, number).round().astype(int)
        ordered = sorted({ordered[i] for i in picks} | {own})
    return tuple(ordered)


def coordinate(layer: Layer, axis: str) -> int:
    """The size of a layer along an axis: per group for the many that share something."""
    size: int = getattr(layer, axis)
    return size // _group_size(layer, axis)


def _grouped(kind: Kind, axis: str) -> bool:
    grouping = LAYER_CLASSES[kind].grouping
    return grouping is not None and axis == grouping[0]


def _group_size(layer: Layer, axis: str) -> int:
    """How many groups an axis is counted in: 1 for an axis that is not divided."""
    if not _grouped(layer.kind, axis):
        return 1
    assert layer.grouping is not None
    few: int = getattr(layer, layer.grouping[1])
    return few


def _with(layer: Layer, axis: str, value: int) -> Layer:
    """A layer with another coordinate on one axis; heads per group stay when groups change."""
    changes: dict[str, Any] = {axis: value * _group_size(layer, axis)}
    if layer.grouping is not None and axis == layer.grouping[1]:
        many = layer.grouping[0]
        changes[many] = coordinate(layer, many) * value
    return replace(layer, **changes)
