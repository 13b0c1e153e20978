"""What a space holds, without weights: parameters, how many candidates fit, the largest of them.

Layers go in the order of their scores. Where a model has not been scored here, a file with
published scores of its layers can say that order.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from minipuzzle.architecture import Architecture
from minipuzzle.errors import UserError
from minipuzzle.families.table import Family
from minipuzzle.jsonfile import read_json
from minipuzzle.metrics import LAYER_METRICS
from minipuzzle.progress import WIDTH, table
from minipuzzle.recipe import Recipe
from minipuzzle.scores import Scores
from minipuzzle.units import format_bytes, format_count, format_tokens

from .ranges import recipe_space, shown
from .space import Parameter, Point, Space

MOST = 50_000  # combinations that are counted one by one; more are only named
LARGEST = 20


@dataclass(frozen=True)
class Listing:
    """A space, and its candidates where they can be counted.

    `points`: those that fit, the largest first; `without_reserve`: how many would if nothing were
    kept free. Both are None in a space that is too large. `ordered`: whether scores say which
    layers go.
    """

    space: Space
    points: list[Point] | None
    without_reserve: int | None
    ordered: bool

    def gone(self, point: Point) -> list[int]:
        """Positions of the layers that a candidate lacks, ascending."""
        return sorted(self.space.gone(point))


def list_space(
    recipe: Recipe, architecture: Architecture, family: Family, scores: Scores | None = None
) -> Listing:
    """What the space of a recipe holds.

    A limit of latency is left out: it needs a measured table. UserError like `recipe_space`.
    """
    limits = recipe.search.limits.model_copy(update={"latency": None})
    search = recipe.search.model_copy(update={"limits": limits})
    recipe = recipe.model_copy(update={"search": search})
    space = recipe_space(recipe, architecture, family, scores)
    if space.cardinality > MOST:
        return Listing(space, None, None, scores is not None)
    reserve = space.model.deployment.reserve_bytes
    more = replace(space.limits, memory_bytes=space.limits.memory_bytes + reserve)
    within = list(replace(space, limits=more).points())
    points = [point for point in within if space.fits(point)]
    points.sort(key=lambda point: (-space.costs(point).memory_bytes, point.key))
    return Listing(space, points, len(within), scores is not None)


def published_scores(path: Path, architecture: Architecture) -> tuple[Scores, str]:
    """Scores of layers from a file, and the metric that they are.

    The file is a JSON object: `source` (where the numbers come from), `metric` (a layer metric),
    `pattern` (a letter per layer) and `scores` (a number per layer).

    Raises:
        UserError: for another kind of file, or scores of a model of another pattern.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a JSON file with scores of layers")
    record = read_json(path)
    metric, values, pattern = (record.get(key) for key in ("metric", "scores", "pattern"))
    if metric not in LAYER_METRICS:
        raise UserError(f"{path}: `metric` must be one of {', '.join(LAYER_METRICS)}")
    if pattern != architecture.pattern:
        raise UserError(f"{path} has scores of a model with other layers; compare `pattern`")
    if not isinstance(values, list) or not all(isinstance(value, int | float) for value in values):
        raise UserError(f"{path}: `scores` must be a list of numbers, one per layer")
    scores = Scores(
        kinds=tuple(layer.kind for layer in architecture.layers),
        layers={metric: torch.tensor(values, dtype=torch.float64)},
        units={},
        provenance={"source": record.get("source", str(path))},
    )
    return scores, metric


def render(listing: Listing, number: int | None = LARGEST) -> str:
    """A listing as text of at most 80 columns; `number`: candidates that are named, None: all."""
    space = listing.space
    at, whole = space.model.deployment, space.model.of(space.architecture)
    kept = f", {format_bytes(at.reserve_bytes)} reserved" if at.reserve_bytes else ""
    head = (
        f"Budget {format_bytes(space.limits.memory_bytes)} for {format_tokens(at.context)} tokens, "
        f"batch {at.batch}{kept}; the uncut model needs {format_bytes(whole.memory_bytes)}."
    )
    parts = [_wrapped(head), _parameters(space), _counts(listing)]
    if listing.points:
        parts.append(_candidates(listing, listing.points[:number]))
    return "\n\n".join(parts)


def _parameters(space: Space) -> str:
    """A row for each parameter; those of single layers share one where their values are equal."""
    groups: dict[tuple[str, tuple[int, ...]], list[Parameter]] = {}
    for parameter in space.parameters:
        single = parameter.layer is not None
        stem = parameter.name.partition(".")[0] + ".*" if single else parameter.name
        groups.setdefault((stem, parameter.choices), []).append(parameter)
    rows = [
        [stem if len(members) > 1 else members[0].name, choices(members[0]), str(len(members))]
        for (stem, _), members in groups.items()
    ]
    return table(["parameter", "values", "parameters"], rows)


def choices(parameter: Parameter) -> str:
    """The values of a parameter in short."""
    values = parameter.choices
    if len(values) < 3:
        return ", ".join(map(str, values))
    steps = {b - a for a, b in zip(values, values[1:], strict=False)}
    step = f", step {min(steps)}" if len(steps) == 1 and steps != {1} else ""
    return f"{values[0]} to {values[-1]}{step} ({len(values)})"


def _counts(listing: Listing) -> str:
    space = listing.space
    if listing.points is None:
        return _wrapped(
            f"{space.cardinality:.2g} combinations: too many to count those that fit. The search "
            f"proposes from them; nothing above the budget is evaluated."
        )
    reserve = space.model.deployment.reserve_bytes
    text = f"{space.cardinality:,} combinations, {len(listing.points):,} fit the budget"
    if reserve:
        text += f" ({listing.without_reserve:,} if the {format_bytes(reserve)} were not reserved)"
    if space.limits.parameters:
        text += f" and the limit of {shown('parameters', space.limits)}"
    return _wrapped(text + ".")


def _candidates(listing: Listing, points: list[Point]) -> str:
    """A row for each candidate and, where it is known, a line with the layers that go."""
    space = listing.space
    columns = [p.name for p in space.parameters if p.layer is None]
    heads = [name.removeprefix("removed.") for name in columns]
    rows = []
    for point in points:
        costs = space.costs(point)
        sizes = [str(point[name]) for name in columns]
        rows.append([format_bytes(costs.memory_bytes), format_count(costs.parameters), *sizes])
    text = table(["memory", "parameters", *heads], rows).splitlines()
    lines = text[:2]
    for point, row in zip(points, text[2:], strict=True):
        lines += [row, *_details(listing, point)]
    assert listing.points is not None
    left = len(listing.points) - len(points)
    which = f"The {len(points)} largest; --all lists {left} more." if left else "All that fit."
    removed = " Layer kinds: how many go." if any("." in name for name in columns) else ""
    return "\n".join([which + removed, "", *lines])


def _details(listing: Listing, point: Point) -> Iterator[str]:
    """Lines below a candidate: what concerns single layers."""
    space = listing.space
    gone = listing.gone(point)
    if gone and (listing.ordered or space.layers.free):
        yield from _indented("gone: " + " ".join(map(str, gone)))
    single = [p for p in space.parameters if p.layer is not None and p.axis is not None]
    kept = [f"{p.name} {point[p.name]}" for p in single if p.layer not in gone]
    if kept:
        yield from _indented(", ".join(kept))


def _indented(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ")


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, WIDTH))
