"""The recipe's space for a model: every parameter with its range, and the budget it is under."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from minipuzzle.architecture import Architecture, Kind, Layer
from minipuzzle.errors import UserError
from minipuzzle.families.table import Family
from minipuzzle.prune.constraints import SERVING
from minipuzzle.prune.depth import units_in_order
from minipuzzle.recipe import AxisRange, Recipe, SearchConfig
from minipuzzle.scores import Scores
from minipuzzle.selection import CUT_AXES
from minipuzzle.units import format_bytes, format_count, parse_budget, parse_latency
from minipuzzle.units import parse_parameters as parse_limit

from .costs import CostModel, Costs, Latency
from .space import GONE, KEPT, Layers, Limits, Parameter, Point, Space

BLOCK = "block"  # in the name of a parameter: layers that share a block, whatever their kinds


def recipe_space(
    recipe: Recipe,
    architecture: Architecture,
    family: Family,
    scores: Scores | None = None,
    latency: Latency | None = None,
) -> Space:
    """The space of a recipe for a model.

    Args:
        recipe: its budget, deployment and `search` section.
        architecture: of the uncut model.
        family: its layout table.
        scores: put the layers in the order in which they go; without them the last ones go first,
            which costs the same.
        latency: needed for a limit of latency.

    Raises:
        UserError: when the model fits already, a layer is named that is not there, or no point is
            within the limits (with the smallest reachable ones and the parameter that binds).
    """
    model = CostModel(architecture, family, recipe.deployment.build(), latency)
    return make_space(model, _limits(recipe, model), recipe.search, scores)


def make_space(
    model: CostModel, limits: Limits, config: SearchConfig, scores: Scores | None = None
) -> Space:
    """The space of a `search` section under limits; errors like `recipe_space`."""
    _require_reason(model, limits)
    architecture, family = model.architecture, model.family
    for i in (*config.protect, *config.drop):
        if i >= len(architecture.layers):
            raise UserError(
                f"search.protect or search.drop names layer {i}, but the model has "
                f"{len(architecture.layers)} layers, counted from 0"
            )
    layers, removals = _removals(architecture, family, config, scores)
    space = Space(
        architecture=architecture,
        family=family,
        parameters=(*removals, *_axes(architecture, config, layers.dropped)),
        layers=layers,
        limits=limits,
        model=model,
        layer_metric=config.layer_metric,
    )
    require_reachable(space)
    return space


def _limits(recipe: Recipe, model: CostModel) -> Limits:
    whole = model.of(model.architecture)
    wanted = recipe.search.limits
    latency = None
    if wanted.latency is not None:
        assert whole.latency is not None, "a limit of latency needs a table"
        latency = parse_latency(wanted.latency).of(whole.latency)
    parameters = wanted.parameters and parse_limit(wanted.parameters).of(whole.parameters)
    return Limits(parse_budget(recipe.budget).of(whole.memory_bytes), parameters or None, latency)


def _require_reason(model: CostModel, limits: Limits) -> None:
    """UserError when the uncut model is within all limits."""
    whole = model.of(model.architecture)
    if max(limits.excess(whole).values()) <= 0:
        raise UserError(
            f"the model needs {format_bytes(whole.memory_bytes)} and fits the budget of "
            f"{format_bytes(limits.memory_bytes)} as it is; lower the budget"
        )


def _removals(
    architecture: Architecture, family: Family, config: SearchConfig, scores: Scores | None
) -> tuple[Layers, list[Parameter]]:
    """How layers may go, and the parameters that decide on it."""
    units = family.removable(architecture)
    dropped = frozenset(i for unit in units if set(unit) & set(config.drop) for i in unit)
    if clash := sorted(dropped & set(config.protect)):
        raise UserError(f"layer {clash[0]} is in both search.protect and search.drop; choose one")
    order = _order(units, scores, config.layer_metric)
    order = [unit for unit in order if not set(unit) & (dropped | set(config.protect))]
    most = _most(architecture, family, config)
    if config.layers == "free":
        kinds = {unit: {architecture.layers[i].kind for i in unit} for unit in order}
        order = [
            u for u in order if all(most[k] > _number(architecture, dropped, k) for k in kinds[u])
        ]
        free = {f"layer.{unit[0]}": unit for unit in sorted(order)}
        parameters = [Parameter(name, (KEPT, GONE)) for name in free]
        return Layers(free=free, most=most, dropped=dropped), parameters
    groups: dict[str, list[tuple[int, ...]]] = {}
    for unit in units:
        groups.setdefault(f"removed.{_name(architecture, unit)}", []).append(unit)
    orders, parameters = {}, []
    for name, group in groups.items():
        mine = [unit for unit in order if unit in group]
        left = most[architecture.layers[group[0][0]].kind] - sum(u[0] in dropped for u in group)
        if last := max(0, min(left, len(mine))):
            orders[name] = mine
            parameters.append(Parameter(name, tuple(range(last + 1))))
    return Layers(orders=orders, dropped=dropped), parameters


def _order(
    units: tuple[tuple[int, ...], ...], scores: Scores | None, metric: str
) -> list[tuple[int, ...]]:
    """Units of removal, the first to go in front."""
    return list(reversed(units)) if scores is None else units_in_order(scores, metric, units)


def _name(architecture: Architecture, unit: tuple[int, ...]) -> str:
    return architecture.layers[unit[0]].kind if len(unit) == 1 else BLOCK


def _most(architecture: Architecture, family: Family, config: SearchConfig) -> dict[str, int]:
    """How many layers of each kind may go: the recipe's number, but one always stays.

    Kinds that share a block go together, so the largest of their numbers counts for all.
    """
    counts = architecture.counts()
    wanted: dict[Kind, int] = {
        "mamba": config.max_removed.mamba,
        "attention": config.max_removed.attention,
        "ffn": config.max_removed.ffn,
    }
    blocks = max((wanted[kind] for kind in family.block), default=0)
    wanted |= dict.fromkeys(family.block, blocks)
    least = SERVING.least_layers
    return {kind: max(0, min(number, counts[kind] - least)) for kind, number in wanted.items()}


def axis_sizes(architecture: Architecture, config: SearchConfig) -> dict[str, tuple[int, ...]]:
    """Axis -> the sizes that any candidate may have, the whole included."""
    sizes: dict[str, set[int]] = {}
    for parameter in _axes(architecture, config, frozenset()):
        assert parameter.axis is not None
        sizes.setdefault(parameter.axis, set()).update(parameter.choices)
    return {axis: tuple(sorted(choices)) for axis, choices in sizes.items()}


def _axes(
    architecture: Architecture, config: SearchConfig, dropped: frozenset[int]
) -> Iterator[Parameter]:
    """The parameters that narrow layers; an axis that may not be cut has none."""
    ranges: dict[str, AxisRange] = {
        name: getattr(config.axes, name) for name in type(config.axes).model_fields
    }
    for axis, wanted in ranges.items():
        if axis == "hidden":
            yield from _parameter(axis, architecture.hidden, wanted)
            continue
        there = {
            i: layer
            for i, layer in enumerate(architecture.layers)
            if axis in CUT_AXES[layer.kind] and i not in dropped
        }
        if axis == "width" and config.widths == "per_layer":
            for i, layer in there.items():
                yield from _parameter(f"width.{i}", getattr(layer, axis), wanted)
        elif there:
            layer = max(there.values(), key=lambda layer: int(getattr(layer, axis)))
            yield from _parameter(axis, getattr(layer, axis), wanted, groups=_groups(layer, axis))


def _groups(layer: Layer, axis: str) -> int:
    units, by = layer.grouping or (None, "")
    return int(getattr(layer, by)) if axis == units else 1


def _parameter(name: str, size: int, wanted: AxisRange, groups: int = 1) -> Iterator[Parameter]:
    axis = name.partition(".")[0]
    choices = tuple(
        n
        for n in SERVING.allowed(axis, size, groups=groups)
        if n == size or (n % wanted.step == 0 and n >= wanted.min * size)
    )
    if len(choices) > 1:
        yield Parameter(name, choices)


def require_reachable(space: Space) -> None:
    """UserError unless the space has a point within the limits.

    It says how small the space gets, and which parameter would give most if it went further.
    """
    if not space.parameters:
        raise UserError(
            "the search space is empty: no layer may go and no axis may be cut; "
            "raise search.max_removed or lower search.axes.width.min"
        )
    least = smallest(space)
    if space.fits(least):
        return
    excess = {name: over for name, over in space.limits.excess(space.costs(least)).items()}
    worst = max(excess, key=lambda name: excess[name])
    needs = shown(worst, space.costs(least))
    what = "budget" if worst == "memory" else f"limit of {worst}"
    raise UserError(
        f"the {what} of {shown(worst, space.limits)} cannot be reached: the smallest architecture "
        f"of the search space needs {needs}; raise it to that or more, or let more go "
        f"({_binding(space, least)} binds most)"
    )


def smallest(space: Space) -> Point:
    """The point that costs least: all parameters at their cheapest, as far as layers may go."""
    if not space.layers.free:
        return space.extreme(smallest=True)
    values = {p.name: p.cheapest for p in space.parameters}
    taken: dict[str, int] = {}
    for name, unit in sorted(space.layers.free.items(), key=lambda item: -_weight(space, item[1])):
        kinds = [space.architecture.layers[i].kind for i in unit]
        room = all(taken.get(k, _dropped(space, k)) < space.layers.most[k] for k in kinds)
        values[name] = GONE if room else KEPT
        for kind in kinds if room else ():
            taken[kind] = taken.get(kind, _dropped(space, kind)) + 1
    return space.canonical(values)


def _dropped(space: Space, kind: str) -> int:
    return _number(space.architecture, space.layers.dropped, kind)


def _number(architecture: Architecture, layers: frozenset[int], kind: str) -> int:
    return sum(architecture.layers[i].kind == kind for i in layers)


def _weight(space: Space, unit: tuple[int, ...]) -> int:
    layers, hidden = space.architecture.layers, space.architecture.hidden
    return sum(space.model.layer_bytes(layers[i], hidden) for i in unit)


def _binding(space: Space, least: Point) -> str:
    """The setting whose parameter saves most over its whole range: the one to open further."""
    saved: Mapping[str, int] = {
        p.name: space.costs(space.canonical({**least.mapping, p.name: p.whole})).memory_bytes
        for p in space.parameters
    }
    name = max(saved, key=lambda name: saved[name])
    parameter = next(p for p in space.parameters if p.name == name)
    if parameter.axis is not None:
        return f"search.axes.{parameter.axis}.min"
    kind = name.partition(".")[2]
    return "search.max_removed" if kind == BLOCK or kind.isdigit() else f"search.max_removed.{kind}"


def shown(limit: str, costs: Costs | Limits) -> str:
    """A cost or a limit in words."""
    if limit == "memory":
        return format_bytes(costs.memory_bytes)
    if limit == "parameters":
        return f"{format_count(costs.parameters or 0)} parameters"
    return f"{(costs.latency or 0) * 1000:.3g} ms"
