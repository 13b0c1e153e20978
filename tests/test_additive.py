"""Additive prices: the integer program against trying all points, and the greedy way."""

from __future__ import annotations

import random
from typing import Any

import pytest

from minipuzzle.scores import Scores
from minipuzzle.search.additive import (
    Prices,
    additive_seeds,
    greedy,
    layers_of,
    measure_prices,
    open_units,
)
from minipuzzle.search.program import solve
from minipuzzle.search.space import Space
from minipuzzle.selection import Selection
from tests.test_space import WIDE, scores, space_of, teacher  # noqa: F401 (fixtures)
from tests.tiny import CONFIG, LLAMA

SPACES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (CONFIG, WIDE),
    (CONFIG, {**WIDE, "layers": "free", "axes": {"width": {"min": 0.3, "step": 16}}}),
    (CONFIG, {"widths": "per_layer", "axes": {"width": {"min": 0.3, "step": 16}}}),
    (CONFIG, {"axes": {"hidden": {"min": 0.5, "step": 8}, "width": {"step": 16}}, "drop": (5,)}),
    (LLAMA, {"max_removed": {"ffn": 1}, "axes": {"width": {"min": 0.3, "step": 8}}}),
]


def random_prices(space: Space, seed: int) -> Prices:
    rng = random.Random(seed)
    removal = {unit: rng.uniform(0.1, 2) for unit in open_units(space)}
    sizes = {
        p.name: {v: rng.uniform(0.5, 3) * (1 - v / p.whole) for v in p.choices}
        for p in space.parameters
        if p.axis is not None
    }
    return Prices(removal, sizes)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("config", "search"), SPACES)
def test_the_program_finds_what_trying_all_points_finds(
    config: dict[str, Any], search: dict[str, Any], seed: int
) -> None:
    space = space_of(config, search, 0.8)
    prices = random_prices(space, seed)
    everything = sorted(prices.of(space, point) for point in space.points())
    found = [prices.of(space, point) for point in solve(space, prices, 3)]
    assert found == pytest.approx(everything[:3], rel=1e-6)


def test_a_limit_of_parameters_is_in_the_program() -> None:
    loose = space_of(CONFIG, WIDE, 0.95)
    least = loose.costs(loose.extreme(smallest=True)).parameters
    space = space_of(CONFIG, WIDE, 0.95, parameters=least * 1.2)
    prices = random_prices(space, 1)
    best = min(prices.of(space, point) for point in space.points())
    assert prices.of(space, solve(space, prices, 1)[0]) == pytest.approx(best)


def test_greedy_fits_and_is_no_better_than_the_program() -> None:
    for config, search in SPACES:
        space = space_of(config, search, 0.8)
        prices = random_prices(space, 7)
        point = greedy(space, prices)
        assert point is not None and space.fits(point)
        seeds = additive_seeds(space, prices)
        assert all(map(space.fits, seeds)) and len(set(seeds)) == len(seeds)
        best = prices.of(space, seeds[0])
        assert best == pytest.approx(min(prices.of(space, seed) for seed in seeds))


def test_prices_are_those_of_single_changes(scores: Scores) -> None:  # noqa: F811
    space = space_of(CONFIG, WIDE, 0.8, scores)
    asked: list[Selection] = []

    def measure(selections: Any) -> list[float]:
        asked.extend(selections)
        return [float(i + 1) for i in range(len(selections))]

    prices = measure_prices(space, scores, measure)
    units = open_units(space)
    for number, unit in enumerate(units):
        assert prices.removal[unit] == number + 1
        assert {i for i, axes in enumerate(asked[number].layers) if axes is None} == set(unit)
    for parameter in space.parameters:
        if parameter.axis is not None:
            by_size = prices.sizes[parameter.name]
            assert set(by_size) == set(parameter.choices) and by_size[parameter.whole] == 0
            assert layers_of(space, parameter)
    assert prices.of(space, space.extreme(smallest=False)) == 0
