"""Which layers go: the least important ones, of given kinds or of any, whole blocks at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import get_args

from minipuzzle.architecture import KINDS, Kind
from minipuzzle.errors import UserError
from minipuzzle.scores import Scores

from .constraints import SERVING, Constraints

Units = Sequence[tuple[int, ...]]
"""Layers that can only be removed together (`Family.removable`)."""
Removed = Mapping[Kind, int] | int | frozenset[int]
"""Kind -> number of layers, or a number of units of any kind, or the positions themselves."""

LAYER_METRIC = "hidden_mse"
REMOVAL_ORDER = "removal_order"


def removed_layers(
    scores: Scores,
    removed: Removed,
    *,
    metric: str = LAYER_METRIC,
    units: Units | None = None,
    constraints: Constraints | None = SERVING,
) -> frozenset[int]:
    """Positions of the layers that go.

    Args:
        scores: of the uncut model.
        removed: what is to go.
        metric: the layers' score that decides, or `removal_order`: what iterative removal took
            first. Ties go to the earlier layer.
        units: layers that go together; None: every layer alone.
        constraints: how many layers of each kind must stay.

    Raises:
        UserError: when more are asked for than may go, for half a block, or when iterative removal
            was stopped before.
    """
    units = [(i,) for i in range(len(scores.kinds))] if units is None else units
    least = 0 if constraints is None else constraints.least_layers
    if isinstance(removed, Mapping):
        _check_numbers(scores, removed, least)
        return _of_kinds(scores, units_in_order(scores, metric, units), removed)
    if isinstance(removed, int):
        return _of_any_kind(scores, units_in_order(scores, metric, units), removed, least)
    return _given(scores, removed, units, least)


def least_important(
    scores: Scores, kind: Kind, number: int, metric: str = LAYER_METRIC
) -> frozenset[int]:
    """Positions of the `number` layers of a kind with the lowest scores; one of them stays."""
    return removed_layers(scores, {kind: number}, metric=metric)


def units_in_order(scores: Scores, metric: str, units: Units) -> list[tuple[int, ...]]:
    """Units of removal, the one to go first in front."""
    if metric == REMOVAL_ORDER:
        if not scores.removal_order:
            raise UserError(
                "layers were not removed one by one; set score.iterative and run "
                "`minipuzzle score` again, or choose layers by another metric"
            )
        return list(scores.removal_order)
    values = scores.layer_metric(metric)
    return sorted(units, key=lambda unit: (float(values[list(unit)].mean()), unit))


def _check_numbers(scores: Scores, removed: Mapping[Kind, int], least: int) -> None:
    there = Counter(scores.kinds)
    for kind, number in removed.items():
        if kind not in get_args(Kind):
            raise UserError(f"unknown layer kind {kind!r}; known kinds: {', '.join(KINDS)}")
        most = max(0, there[kind] - least)
        if not 0 <= number <= most:
            stay = f" and {least} must stay" if least else ""
            raise UserError(
                f"{number} {kind} layers cannot be removed: the model has {there[kind]}{stay}; "
                f"ask for at most {most}"
            )


def _of_kinds(scores: Scores, order: Units, removed: Mapping[Kind, int]) -> frozenset[int]:
    """The first units of the order whose kinds are still wanted."""
    wanted: Counter[Kind] = Counter(removed)
    gone: set[int] = set()
    for unit in order:
        kinds = Counter(scores.kinds[i] for i in unit)
        if all(wanted[kind] >= number for kind, number in kinds.items()):
            wanted -= kinds
            gone |= set(unit)
    taken = Counter(scores.kinds[i] for i in gone)
    if missing := {kind: n for kind, n in removed.items() if n > taken[kind]}:
        kind, number = next(iter(missing.items()))
        raise UserError(
            f"{number} {kind} layers cannot be removed like this: the layers of a block go "
            f"together, and iterative removal only goes as far as it went; the nearest is "
            f"{', '.join(f'{k}: {taken[k]}' for k in removed)}"
        )
    return frozenset(gone)


def _of_any_kind(scores: Scores, order: Units, number: int, least: int) -> frozenset[int]:
    """The first `number` units of the order, but for the last ones of a kind."""
    left = Counter(scores.kinds)
    gone: set[int] = set()
    taken = 0
    for unit in order:
        kinds = Counter(scores.kinds[i] for i in unit)
        if taken < number and all(left[kind] - n >= least for kind, n in kinds.items()):
            left -= kinds
            gone |= set(unit)
            taken += 1
    if taken != number or len(gone) == len(scores.kinds):
        most = taken - (len(gone) == len(scores.kinds))
        raise UserError(
            f"{number} layers or blocks cannot be removed: some must stay; the nearest is "
            f"{max(0, most)}"
        )
    return frozenset(gone)


def _given(scores: Scores, gone: frozenset[int], units: Units, least: int) -> frozenset[int]:
    """Positions as they are, checked."""
    layers = len(scores.kinds)
    if strange := sorted(i for i in gone if not 0 <= i < layers):
        raise UserError(f"layer {strange[0]} cannot be removed: layers are 0 to {layers - 1}")
    for unit in units:
        if gone & set(unit) and not gone >= set(unit):
            raise UserError(
                f"layers {', '.join(map(str, unit))} share a block; remove all of them or none"
            )
    left = Counter(kind for i, kind in enumerate(scores.kinds) if i not in gone)
    for kind in dict.fromkeys(scores.kinds):
        if left[kind] < min(least, scores.kinds.count(kind)):
            raise UserError(f"{least} {kind} layers must stay; remove at least one less of them")
    return gone
