"""Spaces: what their points cost, which of them fit, and what a cut makes of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minipuzzle import families, model
from minipuzzle.errors import UserError
from minipuzzle.memory import Deployment, memory
from minipuzzle.prune import score
from minipuzzle.recipe import SearchConfig
from minipuzzle.scores import Scores
from minipuzzle.search.costs import CostModel
from minipuzzle.search.ranges import make_space
from minipuzzle.search.space import Limits, Point, Space
from tests.tiny import CONFIG, LLAMA, write_tiny

AT = Deployment(context=16)
AXES = {"width": {"min": 0.3, "step": 8}, "heads": {"min": 0.3}, "query_heads": {"min": 0.2}}
WIDE: dict[str, Any] = {"max_removed": {"mamba": 1, "attention": 1, "ffn": 2}, "axes": AXES}


def space_of(
    config: dict[str, Any],
    search: dict[str, Any],
    share: float,
    scores: Scores | None = None,
    **limits: float,
) -> Space:
    family, architecture = families.read(config)
    costs = CostModel(architecture, family, AT)
    budget = int(share * memory(architecture, family, AT).total)
    wanted = SearchConfig.model_validate({"axes": {"width": {"step": 8}}, **search}, strict=False)
    return make_space(costs, Limits(budget, **limits), wanted, scores)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> model.Model:
    return model.load(write_tiny(tmp_path_factory.mktemp("space") / "tiny"))


@pytest.fixture(scope="module")
def scores(teacher: model.Model) -> Scores:
    ids = torch.randint(0, 97, (4, 24), generator=torch.Generator().manual_seed(6))
    return score.score(teacher, ids, {})


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_costs_and_shape_of_a_point_are_those_of_its_cut(
    data: st.DataObject, teacher: model.Model, scores: Scores
) -> None:
    kinds = data.draw(st.sampled_from(["importance", "free"]))
    widths = data.draw(st.sampled_from(["uniform", "per_layer"]))
    space = space_of(CONFIG, {**WIDE, "layers": kinds, "widths": widths}, 0.8, scores)
    drawn = {p.name: data.draw(st.sampled_from(p.choices)) for p in space.parameters}
    point = space.canonical(drawn)
    if max(space.crowding(point), default=0) > 0:
        return
    cut = space.selection(point, scores).apply(teacher.architecture)
    assert cut == space.shape(point)
    costs = space.costs(point)
    assert costs.memory_bytes == memory(cut, teacher.family, AT).total
    assert costs.parameters == families.parameter_count(cut, teacher.family)
    fits = space.fitting(point)
    assert fits is None or space.fits(fits)
    if space.fits(point):
        assert fits == point
        filled = space.filled(point)
        assert space.fits(filled) and space.gone(filled) == space.gone(point)
    assert Point.from_json(point.to_json()) == point


def test_llama_goes_by_blocks() -> None:
    space = space_of(LLAMA, {"max_removed": {"ffn": 1}}, 0.8)
    names = [parameter.name for parameter in space.parameters]
    assert names[0] == "removed.block" and space.parameters[0].choices[-1] == 1
    point = space.canonical({**space.extreme(smallest=True).mapping})
    assert {space.architecture.layers[i].kind for i in space.gone(point)} == {"attention", "ffn"}


def test_points_are_all_that_fit_and_distinct() -> None:
    space = space_of(CONFIG, {"max_removed": {"mamba": 1, "attention": 0, "ffn": 1}}, 0.8)
    points = list(space.points())
    assert len({space.shape(point) for point in points}) == len(points) == len(set(points)) > 3
    assert all(space.costs(p).memory_bytes <= space.limits.memory_bytes for p in points)
    assert len(points) < space.cardinality


def test_the_width_of_a_removed_layer_counts_for_nothing() -> None:
    search = {"layers": "free", "widths": "per_layer", "max_removed": {"ffn": 1}}
    space = space_of(CONFIG, search, 0.8)
    gone = next(p for p in space.parameters if p.name.startswith("width."))
    values = {p.name: p.whole for p in space.parameters} | {f"layer.{gone.layer}": 1}
    keys = {space.canonical({**values, gone.name: n}).key for n in gone.choices}
    assert len(keys) == 1


def test_dropped_layers_go_and_protected_ones_stay(scores: Scores) -> None:
    ffn = families.read(CONFIG)[1].indices("ffn")
    search = {"max_removed": {"ffn": 2}, "protect": (ffn[0],), "drop": (ffn[-1],)}
    space = space_of(CONFIG, search, 0.8, scores)
    for smallest in (True, False):
        gone = space.gone(space.extreme(smallest=smallest))
        assert ffn[-1] in gone and ffn[0] not in gone
    assert max(next(p for p in space.parameters if p.name == "removed.ffn").choices) == 1


def test_a_limit_of_parameters_binds_too() -> None:
    free = space_of(CONFIG, WIDE, 0.9)
    least = free.costs(free.extreme(smallest=True)).parameters
    bound = space_of(CONFIG, WIDE, 0.9, parameters=least * 1.1)
    assert 0 < sum(1 for _ in bound.points()) < sum(1 for _ in free.points())
    with pytest.raises(UserError, match="limit of parameters"):
        space_of(CONFIG, WIDE, 0.9, parameters=least * 0.9)


@pytest.mark.parametrize(
    ("search", "share", "message"),
    [
        ({}, 1.0, "lower the budget"),
        ({}, 0.2, "cannot be reached: the smallest .* needs .* binds most"),
        ({"protect": (99,)}, 0.8, "names layer 99"),
        ({"protect": (1,), "drop": (1,)}, 0.8, "in both"),
        (
            {
                "max_removed": {"mamba": 0, "attention": 0, "ffn": 0},
                "axes": {"width": {"min": 1.0}},
            },
            0.8,
            "the search space is empty",
        ),
    ],
)
def test_impossible_spaces_are_refused(search: dict[str, Any], share: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        space_of(CONFIG, search, share)
