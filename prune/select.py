"""From scores and targets to a selection, under the constraints of what can be served."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from minipuzzle.architecture import Architecture, Layer
from minipuzzle.errors import UserError
from minipuzzle.metrics import CONTROLS
from minipuzzle.scores import Scores, control
from minipuzzle.selection import CUT_AXES, Indices, LayerSelection, Selection

from .constraints import SERVING, Constraints, nearest
from .depth import LAYER_METRIC, Removed, Units, least_important, removed_layers

__all__ = ["UNIT_METRICS", "Sizes", "least_important", "select", "top_units"]

Sizes = Mapping[str, int | Mapping[int, int]]
"""Axis -> units that every layer keeps, or layer -> units that it keeps (others: all)."""

# Best first; the first one that was measured counts. By docs/how-scores-compare.md:
# after repair where that was measured (channels of FFN and heads of Mamba), else after the cut.
UNIT_METRICS: dict[str, tuple[str, ...]] = {
    "width": ("surgeon", "energy", "activation"),
    "groups": ("energy", "activation"),
    "heads": ("surgeon", "energy", "activation"),
    "head_dim": ("energy", "activation"),
    "kv_heads": ("flap", "energy", "activation"),
    "query_heads": ("flap", "energy", "activation"),
    "hidden": ("activation", "energy"),
}


def select(
    scores: Scores,
    architecture: Architecture,
    *,
    removed: Removed = 0,
    sizes: Sizes | None = None,
    layer_metric: str = LAYER_METRIC,
    metrics: Mapping[str, str] | None = None,
    units: Units | None = None,
    constraints: Constraints | None = SERVING,
    seed: int = 0,
) -> Selection:
    """Keep the best layers and the best units of each axis.

    Args:
        scores: of the uncut model.
        architecture: of the uncut model.
        removed: kind -> number of layers that go, or a number of units of removal of any kind, or
            the positions of the layers themselves.
        sizes: axis (`width`, `heads`, `head_dim`, `groups`, `query_heads`, `kv_heads`, `hidden`)
            -> units that stay. A choice of groups takes the units of the others along.
        layer_metric: by which layers go; `removal_order`: as iterative removal took them.
        metrics: axis -> the score that ranks it, or a control (`order`, `reverse`, `random`);
            UNIT_METRICS says it for the others.
        units: layers that go together (`family.removable(architecture)`); None: every layer alone.
        constraints: None ignores all of them, equal numbers from every group included: such a
            selection can be shown by masks but not sliced.
        seed: of the random control.

    Raises:
        UserError: when the targets break a constraint (the message names the nearest allowed
            value), an axis is unknown, or a score was not measured.
    """
    scores.check(architecture)
    sizes = {} if sizes is None else sizes
    _check_axes(sizes, architecture)
    ranking = Ranking(scores, metrics or {}, seed)
    gone = removed_layers(
        scores, removed, metric=layer_metric, units=units, constraints=constraints
    )
    layers = tuple(
        None if i in gone else _select_units(ranking, i, layer, sizes, constraints)
        for i, layer in enumerate(architecture.layers)
    )
    selection = Selection(layers, _select_hidden(ranking, architecture, sizes, constraints))
    if constraints is not None:
        selection.apply(architecture)
    return selection


class Ranking:
    """What every unit of an axis is worth, by the metric chosen for that axis."""

    def __init__(self, scores: Scores, metrics: Mapping[str, str], seed: int) -> None:
        self.scores, self.metrics, self.seed = scores, metrics, seed

    def units(self, i: int, axis: str, size: int) -> torch.Tensor:
        """Scores of the units of an axis of layer i, (size,)."""
        measured = {m: v for (j, a, m), v in self.scores.units.items() if (j, a) == (i, axis)}
        return self._choose(axis, size, measured, f"`{axis}` of layer {i} was", self.seed + i)

    def hidden(self, size: int) -> torch.Tensor:
        """Scores of the hidden channels, (size,)."""
        which = "the hidden channels were"
        return self._choose("hidden", size, self.scores.hidden, which, self.seed)

    def _choose(
        self, axis: str, size: int, measured: Mapping[str, torch.Tensor], which: str, seed: int
    ) -> torch.Tensor:
        wanted = self.metrics.get(axis)
        if wanted in CONTROLS:
            return control(wanted, size, seed)
        for metric in UNIT_METRICS[axis] if wanted is None else (wanted,):
            if metric in measured:
                return measured[metric]
        wish = " or ".join(UNIT_METRICS[axis]) if wanted is None else wanted
        raise UserError(
            f"{which} not scored by {wish} (only by {', '.join(sorted(measured)) or 'none'}); "
            f"add it to score.unit_metrics and run `minipuzzle score` again"
        )


def top_units(values: torch.Tensor, keep: int, groups: int = 1) -> Indices:
    """The `keep` best units in ascending order, an equal number from each of `groups`.

    Ties go to the lower index.
    """
    per_group, size = keep // groups, len(values) // groups
    order = values.reshape(groups, size).argsort(dim=1, descending=True, stable=True)
    kept = order[:, :per_group] + torch.arange(groups)[:, None] * size
    return tuple(sorted(int(unit) for unit in kept.reshape(-1)))


def _check_axes(sizes: Sizes, architecture: Architecture) -> None:
    """UserError for axes that nothing has, and for wishes that no layer can mean."""
    layers = architecture.layers
    for axis, wish in sizes.items():
        if axis not in UNIT_METRICS:
            raise UserError(f"nothing has an axis `{axis}`; known axes: {', '.join(UNIT_METRICS)}")
        has = {i: getattr(x, axis) for i, x in enumerate(layers) if axis in CUT_AXES[x.kind]}
        if isinstance(wish, int):
            if has and wish > max(has.values()):
                raise UserError(
                    f"no layer can keep {wish} `{axis}`: the nearest is {max(has.values())}"
                )
        elif axis != "hidden" and (strange := sorted(set(wish) - set(has))):
            raise UserError(
                f"layer {strange[0]} has no axis `{axis}`; layers with one: {list(has)}"
            )


def _wish(axis: str, i: int, size: int, sizes: Sizes) -> int | None:
    """How many of its units layer i is to keep; None where nothing is to be cut."""
    wish = sizes.get(axis)
    keep = wish.get(i) if isinstance(wish, Mapping) else wish
    uniform = isinstance(wish, int)
    return None if keep is None or keep == size or (uniform and keep > size) else keep


def _select_units(
    ranking: Ranking, i: int, layer: Layer, sizes: Sizes, constraints: Constraints | None
) -> LayerSelection:
    axes: dict[str, Indices] = {}
    units, by = layer.grouping or (None, None)
    for axis in CUT_AXES[layer.kind]:  # groups come before their units
        if axis == units:
            continue
        size = getattr(layer, axis)
        keep = _wish(axis, i, size, sizes)
        if keep is not None:
            per = getattr(layer, units) // size if units and axis == by else 1
            _require(constraints, keep, axis, size, where=f"layer {i} ({layer.kind})", groups=per)
            axes[axis] = top_units(ranking.units(i, axis, size), keep)
    if layer.grouping is not None:
        axes |= _select_grouped(ranking, i, layer, axes, sizes, constraints)
    return axes


def _select_grouped(
    ranking: Ranking,
    i: int,
    layer: Layer,
    axes: LayerSelection,
    sizes: Sizes,
    constraints: Constraints | None,
) -> LayerSelection:
    """The units of the kept groups: the wished number of them, equally many from each group.

    Without constraints the best of all kept groups together.
    """
    assert layer.grouping is not None
    axis, by = layer.grouping
    size, groups = getattr(layer, axis), getattr(layer, by)
    per, kept = size // groups, axes.get(by, tuple(range(groups)))
    there = [g * per + unit for g in kept for unit in range(per)]
    keep = _wish(axis, i, size, sizes)
    if keep is None or keep == len(there):
        return {axis: tuple(there)} if by in axes else {}
    where = f"layer {i} ({layer.kind})"
    _require(constraints, keep, axis, len(there), where=where, groups=len(kept))
    values = ranking.units(i, axis, size)[there]
    best = top_units(values, keep, 1 if constraints is None else len(kept))
    return {axis: tuple(there[unit] for unit in best)}


def _select_hidden(
    ranking: Ranking, architecture: Architecture, sizes: Sizes, constraints: Constraints | None
) -> Indices | None:
    wish = sizes.get("hidden", architecture.hidden)
    if wish == architecture.hidden:
        return None
    if not isinstance(wish, int):
        raise UserError("`hidden` is one number: all layers share the channels of the stream")
    _require(constraints, wish, "hidden", architecture.hidden, where="the model")
    return top_units(ranking.hidden(architecture.hidden), wish)


def _require(
    constraints: Constraints | None, keep: int, axis: str, size: int, *, where: str, groups: int = 1
) -> None:
    if constraints is not None:
        constraints.require(keep, axis, size, where=where, groups=groups)
    elif not 0 < keep <= size:
        raise UserError(
            f"{where} cannot keep {keep} of {size} `{axis}`; {nearest(keep, (1, size))}"
        )
