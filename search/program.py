"""The integer program of additive prices, solved exactly by HiGHS through SciPy.

One binary variable per layer and option (gone, or kept at some sizes), one per uniform size. Every
layer takes one option; layers of a uniform axis agree on its size; layers that go in an order, or
in blocks, do so; the limits are linear in the options.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from minipuzzle.selection import CUT_AXES

from .space import Parameter, Point, Space, narrowed

if TYPE_CHECKING:
    from .additive import Prices

TIME_LIMIT = 30.0  # seconds for one solution
OPTIMAL = 0


@dataclass(frozen=True)
class Option:
    """What becomes of a layer: gone (None), or kept with these values of its parameters."""

    layer: int
    values: Mapping[str, int] | None
    price: float
    bytes: int
    parameters: int
    latency: float


@dataclass
class Rows:
    """Linear constraints, collected row by row."""

    columns: list[list[int]] = field(default_factory=list)
    factors: list[list[float]] = field(default_factory=list)
    least: list[float] = field(default_factory=list)
    most: list[float] = field(default_factory=list)

    def add(self, terms: Mapping[int, float], least: float, most: float) -> None:
        """Hold least <= sum of factor x variable <= most."""
        self.columns.append(list(terms))
        self.factors.append(list(terms.values()))
        self.least.append(least)
        self.most.append(most)

    def constraint(self, variables: int) -> LinearConstraint:
        """All rows as SciPy takes them."""
        rows = [i for i, columns in enumerate(self.columns) for _ in columns]
        flat = [c for columns in self.columns for c in columns]
        data = [f for factors in self.factors for f in factors]
        matrix = coo_array((data, (rows, flat)), shape=(len(self.columns), variables))
        return LinearConstraint(matrix.tocsr(), np.array(self.least), np.array(self.most))


def solve(space: Space, prices: Prices, number: int) -> list[Point]:
    """The `number` points with the lowest additive prices within the limits, best first.

    The width of the stream enters every layer's size, so there is one program for each.
    """
    hidden = next((p for p in space.parameters if p.axis == "hidden"), None)
    widths = (space.architecture.hidden,) if hidden is None else hidden.choices
    found = [p for width in widths for p in _Program(space, prices, width).best(number)]
    return sorted(dict.fromkeys(found), key=lambda point: prices.of(space, point))[:number]


class _Program:
    """The program for one width of the stream."""

    def __init__(self, space: Space, prices: Prices, hidden: int) -> None:
        self.space, self.prices, self.hidden = space, prices, hidden
        self.local = [p for p in space.parameters if p.axis not in (None, "hidden")]
        self.options = [
            option
            for i in range(len(space.architecture.layers))
            if i not in space.layers.dropped
            for option in self._options(i)
        ]
        self.gone = {o.layer: j for j, o in enumerate(self.options) if o.values is None}
        uniform = [(p, v) for p in self.local if p.layer is None for v in p.choices]
        self.sizes = {(p.name, v): len(self.options) + j for j, (p, v) in enumerate(uniform)}
        self.variables = len(self.options) + len(self.sizes)
        self.rows = Rows()
        self._one_each()
        self._uniform()
        self._orders()
        self._limits()

    def best(self, number: int) -> list[Point]:
        """Solve, forbid the solution, solve again."""
        points: list[Point] = []
        prices = np.zeros(self.variables)
        prices[: len(self.options)] = [option.price for option in self.options]
        while len(points) < number:
            result: Any = milp(
                prices,
                integrality=np.ones(self.variables),
                bounds=Bounds(0, 1),
                constraints=self.rows.constraint(self.variables),
                options={"time_limit": TIME_LIMIT, "mip_rel_gap": 0.0},
            )
            if result.status != OPTIMAL:
                break
            chosen = np.flatnonzero(result.x[: len(self.options)] > 0.5).tolist()
            self.rows.add(dict.fromkeys(chosen, 1.0), 0, len(chosen) - 1)
            point = self._point(result.x, chosen)
            if self.space.fits(point):
                points.append(point)
        return list(dict.fromkeys(points))

    def _options(self, i: int) -> list[Option]:
        """What may become of a layer, with its price and costs."""
        layer, model = self.space.architecture.layers[i], self.space.model
        unit = next((u for u in self.prices.removal if i in u), None)
        options = []
        if unit is not None:
            options.append(Option(i, None, self.prices.removal[unit] / len(unit), 0, 0, 0.0))
        mine = [p for p in self.local if p.axis in CUT_AXES[layer.kind] and p.layer in (None, i)]
        for values in product(*(p.choices for p in mine)):
            named = {p.name: v for p, v in zip(mine, values, strict=True)}
            sizes = self.space.sizes(named)
            own = {a: w if isinstance(w, int) else w.get(i) for a, w in sizes.items()}
            kept = narrowed(layer, own)
            price = sum(self._price(p, named[p.name]) for p in mine)
            latency = 0.0 if model.latency is None else model.latency.layer(kept, self.hidden)
            size = model.layer(kept, self.hidden)
            bytes_ = model.layer_bytes(kept, self.hidden)
            options.append(Option(i, named, price, bytes_, size.weights, latency))
        return options

    def _price(self, parameter: Parameter, value: int) -> float:
        price = self.prices.sizes[parameter.name][value]
        return price / self.prices.share(self.space, parameter)

    def _one_each(self) -> None:
        by_layer: dict[int, dict[int, float]] = {}
        for j, option in enumerate(self.options):
            by_layer.setdefault(option.layer, {})[j] = 1.0
        for terms in by_layer.values():
            self.rows.add(terms, 1, 1)

    def _uniform(self) -> None:
        """Layers keep a size only where that size is the one of all."""
        for parameter in (p for p in self.local if p.layer is None):
            columns = {self.sizes[parameter.name, v]: 1.0 for v in parameter.choices}
            self.rows.add(columns, 1, 1)
        for j, option in enumerate(self.options):
            for name, value in (option.values or {}).items():
                if (name, value) in self.sizes:
                    self.rows.add({j: 1.0, self.sizes[name, value]: -1.0}, -np.inf, 0)

    def _orders(self) -> None:
        """Blocks go whole, layers in their order, and no more of them than may."""
        for unit in self.prices.removal:
            for a, b in zip(unit, unit[1:], strict=False):
                self.rows.add({self.gone[a]: 1.0, self.gone[b]: -1.0}, 0, 0)
        for name, order in self.space.layers.orders.items():
            columns = [self.gone[unit[0]] for unit in order]
            for first, then in zip(columns, columns[1:], strict=False):
                self.rows.add({then: 1.0, first: -1.0}, -np.inf, 0)
            most = next(p for p in self.space.parameters if p.name == name).choices[-1]
            if columns:
                self.rows.add(dict.fromkeys(columns, 1.0), 0, most)
        if self.space.layers.free:
            for kind, most in self.space.layers.most.items():
                layers = self.space.architecture.layers
                mine = {j: 1.0 for i, j in self.gone.items() if layers[i].kind == kind}
                already = sum(layers[i].kind == kind for i in self.space.layers.dropped)
                if mine:
                    self.rows.add(mine, 0, most - already)

    def _limits(self) -> None:
        space, limits = self.space, self.space.limits
        base = space.model.base(self.hidden)
        self._limit([o.bytes for o in self.options], limits.memory_bytes - space.model.bytes(base))
        if limits.parameters is not None:
            room = limits.parameters - base.weights - base.embeddings
            self._limit([o.parameters for o in self.options], room)
        if limits.latency is not None and space.model.latency is not None:
            table, whole = space.model.latency, replace(space.architecture, hidden=self.hidden)
            layers = sum(table.layer(layer, self.hidden) for layer in whole.layers)
            room = limits.latency - (table.of(whole) - layers)
            self._limit([o.latency for o in self.options], room)

    def _limit(self, costs: Sequence[float], room: float) -> None:
        """Costs in shares of what there is room for: HiGHS minds numbers of many sizes."""
        scale = max(1.0, abs(room)) if max(costs, default=0) > 1 else max(costs, default=1.0)
        terms = {j: cost / scale for j, cost in enumerate(costs) if cost}
        self.rows.add(terms, -np.inf, room / scale)

    def _point(self, solution: Any, chosen: Sequence[int]) -> Point:
        """The values that a solution stands for."""
        options = {self.options[j].layer: self.options[j] for j in chosen}
        gone = {i for i, option in options.items() if option.values is None}
        values = {p.name: p.whole for p in self.space.parameters}
        for name, order in self.space.layers.orders.items():
            values[name] = sum(unit[0] in gone for unit in order)
        values |= {name: int(unit[0] in gone) for name, unit in self.space.layers.free.items()}
        for (name, value), column in self.sizes.items():
            if solution[column] > 0.5:
                values[name] = value
        for option in options.values():
            own = option.values or {}
            values |= {name: v for name, v in own.items() if (name, v) not in self.sizes}
        if "hidden" in values:
            values["hidden"] = self.hidden
        return self.space.canonical(values)
