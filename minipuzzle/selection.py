"""Which layers and which indices of each axis are kept: the plan of a cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from minipuzzle.architecture import LAYER_CLASSES, SCHEMA_VERSION, Architecture, Layer
from minipuzzle.errors import UserError

Indices = tuple[int, ...]
LayerSelection = Mapping[str, Indices]


def _checked(axes: LayerSelection) -> LayerSelection:
    for axis, kept in axes.items():
        if not kept:
            raise UserError(f"axis `{axis}` keeps nothing; remove the layer instead")
        if list(kept) != sorted(set(kept)) or kept[0] < 0:
            raise UserError(f"indices of axis `{axis}` must ascend without repeats, got {kept}")
    return MappingProxyType({axis: tuple(kept) for axis, kept in sorted(axes.items())})


@dataclass(frozen=True)
class Selection:
    """One entry per teacher layer: `None` (removed) or axis -> kept indices.

    The axis is the field name of the layer (`width`, `heads`, ...); an absent axis is kept whole.
    `hidden` are the kept channels of the residual stream, `None` for all of them.
    """

    layers: tuple[LayerSelection | None, ...]
    hidden: Indices | None = None

    def __post_init__(self) -> None:
        layers = tuple(None if axes is None else _checked(axes) for axes in self.layers)
        object.__setattr__(self, "layers", layers)

    def __hash__(self) -> int:
        return hash((self.hidden, tuple(_frozen(axes) for axes in self.layers)))

    @classmethod
    def identity(cls, architecture: Architecture) -> Selection:
        """Keep everything."""
        return cls(layers=tuple({} for _ in architecture.layers))

    @property
    def kept(self) -> tuple[int, ...]:
        """Teacher positions of the layers that stay, in order."""
        return tuple(i for i, axes in enumerate(self.layers) if axes is not None)

    def apply(self, architecture: Architecture) -> Architecture:
        """The pruned architecture; UserError where the cut breaks a constraint of the model."""
        if len(self.layers) != len(architecture.layers):
            raise UserError(
                f"the selection is for {len(self.layers)} layers, "
                f"the model has {len(architecture.layers)}"
            )
        layers = tuple(
            narrow(layer, axes, where=f"layer {i}")
            for i, (layer, axes) in enumerate(zip(architecture.layers, self.layers, strict=True))
            if axes is not None
        )
        hidden = architecture.hidden if self.hidden is None else len(self.hidden)
        return replace(architecture, layers=layers, hidden=hidden)

    def compose(self, later: Selection) -> Selection:
        """This cut followed by `later`, which is expressed in the pruned model's indices."""
        if len(later.layers) != len(self.kept):
            raise UserError(
                f"the later selection is for {len(later.layers)} layers, "
                f"the earlier one leaves {len(self.kept)}"
            )
        layers: list[LayerSelection | None] = [None] * len(self.layers)
        for position, axes in zip(self.kept, later.layers, strict=True):
            if axes is not None:
                first = self.layers[position]
                assert first is not None
                layers[position] = {
                    axis: _pick(first.get(axis), axes.get(axis)) for axis in {*first, *axes}
                }
        hidden = None
        if self.hidden is not None or later.hidden is not None:
            hidden = _pick(self.hidden, later.hidden)
        return Selection(layers=tuple(layers), hidden=hidden)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able record; `from_json` reads it back."""
        return {
            "schema_version": SCHEMA_VERSION,
            "hidden": self.hidden and list(self.hidden),
            "layers": [
                None if axes is None else {axis: list(kept) for axis, kept in axes.items()}
                for axes in self.layers
            ],
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Selection:
        """Read what `to_json` wrote."""
        if record.get("schema_version") != SCHEMA_VERSION:
            raise UserError(
                f"this selection has schema version {record.get('schema_version')!r}; "
                f"this minipuzzle reads {SCHEMA_VERSION}"
            )
        layers = tuple(
            None if axes is None else {axis: tuple(kept) for axis, kept in axes.items()}
            for axes in record["layers"]
        )
        hidden = record.get("hidden")
        return cls(layers=layers, hidden=None if hidden is None else tuple(hidden))


def _frozen(axes: LayerSelection | None) -> tuple[tuple[str, Indices], ...] | None:
    return None if axes is None else tuple(axes.items())


def _pick(first: Indices | None, later: Indices | None) -> Indices:
    if first is None:
        assert later is not None
        return later
    return first if later is None else tuple(first[i] for i in later)


def narrow(layer: Layer, axes: LayerSelection, *, where: str) -> Layer:
    """The layer with only the kept indices of each axis."""
    for axis, kept in axes.items():
        size = getattr(layer, axis, None)
        if not isinstance(size, int) or isinstance(size, bool):
            raise UserError(f"{where}: a {layer.kind} layer has no axis `{axis}`")
        if kept[-1] >= size:
            raise UserError(
                f"{where}: `{axis}` has {size} units, the selection asks for {kept[-1]}"
            )
    if layer.grouping is not None:
        _check_grouping(layer, axes, *layer.grouping, where=where)
    sizes = vars(layer) | {axis: len(kept) for axis, kept in axes.items()}
    return LAYER_CLASSES[layer.kind](**sizes)


def _check_grouping(layer: Layer, axes: LayerSelection, axis: str, by: str, *, where: str) -> None:
    """Every kept group keeps the same number of units, and no unit outlives its group."""
    size, groups = getattr(layer, axis), getattr(layer, by)
    per_group = size // groups
    counts = [0] * groups
    for unit in axes.get(axis, range(size)):
        counts[unit // per_group] += 1
    kept_groups = set(axes.get(by, range(groups)))
    numbers = {counts[group] for group in kept_groups}
    strays = [g for g in range(groups) if g not in kept_groups and counts[g]]
    if len(numbers) != 1 or strays or 0 in numbers:
        raise UserError(
            f"{where}: every one of the `{by}` must keep the same number of `{axis}`, "
            f"but they keep {counts}"
        )
