"""The search space: which layers may go, and how narrow the others may become.

A point gives every parameter of the space a value. What it costs is known before anything is
evaluated; which layers and units go for it follows from the scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from math import prod

from minipuzzle.architecture import LAYER_CLASSES, Architecture, Layer
from minipuzzle.families.table import Family
from minipuzzle.prune.select import Sizes, select
from minipuzzle.scores import Scores
from minipuzzle.selection import CUT_AXES, Selection

from .costs import CostModel, Costs

GONE, KEPT = 1, 0  # values of a free layer


@dataclass(frozen=True)
class Parameter:
    """One decision: a name and the values it may take, ascending.

    `removed.KIND`: how many layers of a kind go, in the order of their scores (`removed.block`
    where layers share blocks); `layer.I`: whether that one goes (1) or stays (0); an axis
    (`width`, `heads`, ...): units that all layers keep; `width.I`: channels that one layer keeps.
    """

    name: str
    choices: tuple[int, ...]

    @property
    def axis(self) -> str | None:
        """The axis that it narrows; None where it removes layers."""
        stem = self.name.partition(".")[0]
        return None if stem in ("removed", "layer") else stem

    @property
    def layer(self) -> int | None:
        """The position of the layer that it is about; None for all layers."""
        number = self.name.partition(".")[2]
        return int(number) if number.isdigit() else None

    @property
    def cheapest(self) -> int:
        """The value that leaves the smallest model."""
        return self.choices[-1] if self.axis is None else self.choices[0]

    @property
    def whole(self) -> int:
        """The value that cuts the least."""
        return self.choices[0] if self.axis is None else self.choices[-1]


@dataclass(frozen=True)
class Point:
    """One architecture of a space: a value for every parameter, in the space's order."""

    values: tuple[tuple[str, int], ...]

    def __getitem__(self, name: str) -> int:
        return self.mapping[name]

    @cached_property
    def mapping(self) -> dict[str, int]:
        """Parameter -> value."""
        return dict(self.values)

    @property
    def key(self) -> str:
        """The architecture as text; equal for equal architectures of one space."""
        return " ".join(f"{name}={value}" for name, value in self.values)

    def to_json(self) -> dict[str, int]:
        """Parameter -> value; `from_json` reads it back."""
        return dict(self.values)

    @classmethod
    def from_json(cls, record: Mapping[str, int]) -> Point:
        """Read what `to_json` wrote."""
        return cls(tuple(record.items()))


@dataclass(frozen=True)
class Limits:
    """What a candidate may cost at most; None: anything."""

    memory_bytes: int
    parameters: float | None = None
    latency: float | None = None

    def excess(self, costs: Costs) -> dict[str, float]:
        """Limit -> how far the costs are above it, relative to it; not above 0 where they fit."""
        pairs = {
            "memory": (costs.memory_bytes, self.memory_bytes),
            "parameters": (costs.parameters, self.parameters),
            "latency": (costs.latency, self.latency),
        }
        return {
            name: cost / limit - 1
            for name, (cost, limit) in pairs.items()
            if cost is not None and limit is not None
        }


@dataclass(frozen=True)
class Layers:
    """How layers may go.

    `orders`: parameter `removed.KIND` -> units of removal (positions of layers that go together),
    the first to go in front. `free`: parameter `layer.I` -> the unit that it decides on, with
    `most` of every kind. `dropped`: positions of layers that are gone in every candidate.
    """

    orders: Mapping[str, Sequence[tuple[int, ...]]] = field(default_factory=dict)
    free: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    most: Mapping[str, int] = field(default_factory=dict)
    dropped: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Space:
    """Points, what they cost, and the limits. Made by `ranges.make_space`."""

    architecture: Architecture
    family: Family
    parameters: tuple[Parameter, ...]
    layers: Layers
    limits: Limits
    model: CostModel
    layer_metric: str = "hidden_mse"
    _costs: dict[Point, Costs] = field(default_factory=dict, repr=False, compare=False)

    def canonical(self, values: Mapping[str, int]) -> Point:
        """The point of these values; what a removed layer would keep is set to all of it."""
        gone = self._gone(values)
        named = []
        for parameter in self.parameters:
            lost = parameter.axis is not None and parameter.layer in gone
            named.append((parameter.name, parameter.whole if lost else values[parameter.name]))
        return Point(tuple(named))

    def gone(self, point: Point) -> frozenset[int]:
        """Positions of the layers that a point removes."""
        return self._gone(point.mapping)

    def _gone(self, values: Mapping[str, int]) -> frozenset[int]:
        units = [
            unit for name, order in self.layers.orders.items() for unit in order[: values[name]]
        ]
        units += [unit for name, unit in self.layers.free.items() if values[name] == GONE]
        return self.layers.dropped.union(*units)

    def sizes(self, values: Mapping[str, int]) -> Sizes:
        """Axis -> units that stay, as `prune.select.select` takes them, by the parameters named."""
        uniform: dict[str, int] = {}
        single: dict[str, dict[int, int]] = {}
        for parameter in self.parameters:
            if parameter.axis is None or parameter.name not in values:
                continue
            if parameter.layer is None:
                uniform[parameter.axis] = values[parameter.name]
            else:
                single.setdefault(parameter.axis, {})[parameter.layer] = values[parameter.name]
        if "kv_heads" in uniform and "query_heads" in uniform:
            # query heads are counted as if all KV heads stayed
            whole = next(p.whole for p in self.parameters if p.name == "kv_heads")
            uniform["query_heads"] = uniform["query_heads"] * uniform["kv_heads"] // whole
        return {**uniform, **single}

    def shape(self, point: Point) -> Architecture:
        """The architecture of a point."""
        gone, sizes = self.gone(point), self.sizes(point.mapping)
        layers = tuple(
            narrowed(layer, {axis: _size(wish, i) for axis, wish in sizes.items()})
            for i, layer in enumerate(self.architecture.layers)
            if i not in gone
        )
        hidden = sizes.get("hidden", self.architecture.hidden)
        assert isinstance(hidden, int)
        return replace(self.architecture, layers=layers, hidden=hidden)

    def costs(self, point: Point) -> Costs:
        """What a point costs; computed once."""
        if point not in self._costs:
            self._costs[point] = self.model.of(self.shape(point))
        return self._costs[point]

    def violation(self, point: Point) -> float:
        """The largest relative excess over a limit; a point that fits has none above 0."""
        crowding = max(self.crowding(point), default=0.0)
        if crowding > 0:  # there may be no layer left to count the costs of
            return crowding
        return max(self.limits.excess(self.costs(point)).values())

    def crowding(self, point: Point) -> Iterator[float]:
        """For free layers: how far more of a kind go than may."""
        gone = self.gone(point) if self.layers.free else frozenset()
        for kind, most in self.layers.most.items():
            number = sum(self.architecture.layers[i].kind == kind for i in gone)
            yield (number - most) / max(1, most)

    def fits(self, point: Point) -> bool:
        """Whether a point is within all limits."""
        return self.violation(point) <= 0

    def fitting(self, point: Point) -> Point | None:
        """The point itself, or with the widest FFN that fits; None where no width does."""
        while not self.fits(point):
            narrower = self._step(point, wider=False)
            if narrower is None:
                return None
            point = narrower
        return point

    def filled(self, point: Point) -> Point:
        """A point that fits, with its FFN as wide as the limits allow."""
        wider = self._step(point, wider=True)
        while wider is not None and self.fits(wider):
            point, wider = wider, self._step(wider, wider=True)
        return point

    def _step(self, point: Point, *, wider: bool) -> Point | None:
        """The FFN one step wider or narrower: of all layers, or of the one that has it coming.

        Of single layers the narrowest grows and the widest shrinks.
        """
        gone, towards = self.gone(point), 1 if wider else -1
        open_ones = []
        for parameter in self.parameters:
            if parameter.axis == "width" and parameter.layer not in gone:
                at = parameter.choices.index(point[parameter.name]) + towards
                if 0 <= at < len(parameter.choices):
                    open_ones.append((towards * point[parameter.name], parameter.name, at))
        if not open_ones:
            return None
        _, name, at = min(open_ones)
        choices = next(p.choices for p in self.parameters if p.name == name)
        return self.canonical({**point.mapping, name: choices[at]})

    @property
    def cardinality(self) -> int:
        """Number of combinations of values, whether they fit or not."""
        return prod(len(parameter.choices) for parameter in self.parameters)

    def points(self) -> Iterator[Point]:
        """All distinct points that fit; look at `cardinality` first."""
        names = [parameter.name for parameter in self.parameters]
        seen = set()
        for values in product(*(parameter.choices for parameter in self.parameters)):
            point = self.canonical(dict(zip(names, values, strict=True)))
            if point not in seen and self.fits(point):
                seen.add(point)
                yield point

    def extreme(self, *, smallest: bool) -> Point:
        """The point with every parameter at its cheapest value, or at its largest."""
        return self.canonical(
            {p.name: p.cheapest if smallest else p.whole for p in self.parameters}
        )

    def selection(self, point: Point, scores: Scores) -> Selection:
        """The point as a cut: the layers of the space's order, the best units by score."""
        return select(
            scores,
            self.architecture,
            removed=self.gone(point),
            sizes=self.sizes(point.mapping),
            units=self.family.removable(self.architecture),
        )


def _size(wish: int | Mapping[int, int], i: int) -> int | None:
    return wish.get(i) if isinstance(wish, Mapping) else wish


def narrowed(layer: Layer, sizes: Mapping[str, int | None]) -> Layer:
    """A layer of at most these sizes; units that share a cut group go with it."""
    wanted = {axis: sizes[axis] for axis in CUT_AXES[layer.kind] if sizes.get(axis) is not None}
    cut = {axis: size for axis, size in wanted.items() if size and size < getattr(layer, axis)}
    if layer.grouping is not None:
        axis, by = layer.grouping
        if by in cut and axis not in cut:
            cut[axis] = getattr(layer, axis) // getattr(layer, by) * cut[by]
    return LAYER_CLASSES[layer.kind](**(vars(layer) | cut))
