"""From scores and targets to a selection, under the constraints of what can be served."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from minipuzzle.architecture import Architecture, Kind, Layer
from minipuzzle.errors import UserError
from minipuzzle.scores import Scores
from minipuzzle.selection import LayerSelection, Selection

# Best first; the first one that was measured counts. Mamba heads go by the published score, because
# output energy is far worse for them (arXiv 2504.11409, table 3).
UNIT_METRICS: dict[str, tuple[str, ...]] = {"heads": ("activation",)}
DEFAULT_METRICS = ("surgeon", "energy")


def least_important(
    scores: Scores, kind: Kind, number: int, metric: str = "hidden_mse"
) -> set[int]:
    """Positions of the `number` layers of a kind with the lowest scores."""
    values = scores.layer_metric(metric)
    positions = [i for i, k in enumerate(scores.kinds) if k == kind]
    if number >= len(positions) and number:
        raise UserError(
            f"{number} {kind} layers cannot be removed: the model has {len(positions)} "
            f"and one must stay; ask for at most {len(positions) - 1}"
        )
    return set(sorted(positions, key=lambda i: (float(values[i]), i))[:number])


def top_units(values: torch.Tensor, keep: int, groups: int = 1) -> tuple[int, ...]:
    """The `keep` best units in ascending order, an equal number from each of `groups`.

    Ties go to the lower index.
    """
    per_group, size = keep // groups, len(values) // groups
    order = values.reshape(groups, size).argsort(dim=1, descending=True, stable=True)
    kept = order[:, :per_group] + torch.arange(groups)[:, None] * size
    return tuple(sorted(int(unit) for unit in kept.reshape(-1)))


def select(
    scores: Scores,
    architecture: Architecture,
    *,
    removed: Mapping[Kind, int],
    sizes: Mapping[str, int],
) -> Selection:
    """Keep the best layers of each kind and the best units of each axis.

    Args:
        scores: of the uncut model.
        architecture: of the uncut model.
        removed: kind -> number of layers that go.
        sizes: axis (`width`, `heads`, `query_heads`) -> units every layer keeps.

    Raises:
        UserError: when the targets break a constraint; the message names the nearest allowed value.
    """
    scores.check(architecture)
    gone = set().union(*(least_important(scores, kind, number) for kind, number in removed.items()))
    layers = tuple(
        None if i in gone else _select_units(scores, i, layer, sizes)
        for i, layer in enumerate(architecture.layers)
    )
    selection = Selection(layers=layers)
    selection.apply(architecture)
    return selection


def _select_units(scores: Scores, i: int, layer: Layer, sizes: Mapping[str, int]) -> LayerSelection:
    axes = {}
    for axis, keep in sizes.items():
        size = vars(layer).get(axis)
        if size is None or size == keep:
            continue
        groups = getattr(layer, layer.grouping[1]) if layer.grouping else 1
        if not 0 < keep <= size or keep % groups:
            nearest = min(max(groups, round(keep / groups) * groups), size)
            raise UserError(
                f"layer {i} ({layer.kind}) cannot keep {keep} of {size} `{axis}`: it must be a "
                f"multiple of {groups} and at most {size}; the nearest is {nearest}"
            )
        metrics = UNIT_METRICS.get(axis, DEFAULT_METRICS)
        values = next(scores.units[i, axis, m] for m in metrics if (i, axis, m) in scores.units)
        axes[axis] = top_units(values, keep, groups)
    return axes
