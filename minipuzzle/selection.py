"""Which layers and which indices of each axis are kept: the plan of a cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from minipuzzle.architecture import LAYER_CLASSES, SCHEMA_VERSION, Architecture, Kind, Layer
from minipuzzle.errors import UserError

Indices = tuple[int, ...]
LayerSelection = Mapping[str, Indices]

CUT_AXES: dict[Kind, tuple[str, ...]] = {
    "mamba": ("groups", "heads", "head_dim"),
    "attention": ("kv_heads", "query_heads"),
    "ffn": ("width",),
}
"""What may be cut of a layer. Not an attention layer's `head_dim` (scale and rotary positions
depend on it), nor a Mamba layer's `state` and `conv`."""


def _checked_indices(axis: str, kept: Indices) -> Indices:
    if not kept:
        raise UserError(f"axis `{axis}` keeps nothing; remove the layer instead")
    if list(kept) != sorted(set(kept)) or kept[0] < 0:
        raise UserError(
            f"indices of axis `{axis}` must ascend from 0 without repeats, got {_shown(kept)}"
        )
    return tuple(kept)


def _shown(kept: Indices) -> str:
    text = ", ".join(str(unit) for unit in kept[:8])
    return text if len(kept) <= 8 else f"{text}, ... ({len(kept)} of them)"


def _checked(axes: LayerSelection) -> LayerSelection:
    return MappingProxyType(
        {axis: _checked_indices(axis, kept) for axis, kept in sorted(axes.items())}
    )


@dataclass(frozen=True)
class Selection:
    """One entry per teacher layer: `None` (removed) or axis -> kept indices.

    The axis is the field name of the layer (`width`, `heads`, ...); an absent axis is kept whole.
    A choice of groups names the units of the kept groups too (`completed` writes them out).
    `hidden` are the kept channels of the residual stream, `None` for all of them.
    """

    layers: tuple[LayerSelection | None, ...]
    hidden: Indices | None = None

    def __post_init__(self) -> None:
        layers = tuple(None if axes is None else _checked(axes) for axes in self.layers)
        object.__setattr__(self, "layers", layers)
        if self.hidden is not None:
            object.__setattr__(self, "hidden", _checked_indices("hidden", self.hidden))

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
        self.check_indices(architecture)
        layers = tuple(
            narrow(layer, axes, where=f"layer {i}")
            for i, (layer, axes) in enumerate(zip(architecture.layers, self.layers, strict=True))
            if axes is not None
        )
        hidden = architecture.hidden if self.hidden is None else len(self.hidden)
        return replace(architecture, layers=layers, hidden=hidden)

    def completed(self, architecture: Architecture) -> Selection:
        """The same cut with what a choice of groups implies: the units of the kept groups stay."""
        self._check_number(architecture)
        layers = (
            None if axes is None else with_units_of_groups(layer, axes)
            for layer, axes in zip(architecture.layers, self.layers, strict=True)
        )
        return replace(self, layers=tuple(layers))

    def check_indices(self, architecture: Architecture) -> None:
        """UserError unless every index is of a unit that the model has, and a layer is left."""
        self._check_number(architecture)
        if self.hidden is not None and self.hidden[-1] >= architecture.hidden:
            raise UserError(
                f"the model has {architecture.hidden} hidden channels, "
                f"the selection asks for {self.hidden[-1]}; they are counted from 0"
            )
        if not self.kept:
            raise UserError("the selection removes every layer; keep at least one")
        for i in self.kept:
            _check_axes(architecture.layers[i], self.layers[i] or {}, where=f"layer {i}")

    def _check_number(self, architecture: Architecture) -> None:
        if len(self.layers) != len(architecture.layers):
            raise UserError(
                f"the selection is for {len(self.layers)} layers, "
                f"the model has {len(architecture.layers)}"
            )

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
                    axis: _pick(axis, first.get(axis), axes.get(axis)) for axis in {*first, *axes}
                }
        hidden = None
        if self.hidden is not None or later.hidden is not None:
            hidden = _pick("hidden", self.hidden, later.hidden)
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
    def from_json(cls, record: Any) -> Selection:
        """Read what `to_json` wrote; UserError for anything else."""
        if not isinstance(record, Mapping):
            raise UserError("there is no selection here; is it a selection.json or best.json?")
        if record.get("schema_version") != SCHEMA_VERSION:
            raise UserError(
                f"this selection has schema version {record.get('schema_version')!r}; "
                f"this minipuzzle reads {SCHEMA_VERSION}"
            )
        entries, hidden = record.get("layers"), record.get("hidden")
        if not isinstance(entries, list):
            raise UserError("this selection has no list of `layers`; is it a selection.json?")
        layers = tuple(
            None if axes is None else _axes_from_json(axes, f"layer {i}")
            for i, axes in enumerate(entries)
        )
        return cls(
            layers=layers,
            hidden=None if hidden is None else _indices_from_json(hidden, "`hidden`"),
        )


def _axes_from_json(record: object, where: str) -> LayerSelection:
    if not isinstance(record, dict):
        raise UserError(f"{where} of a selection must be null or axes, but is {record!r}")
    return {axis: _indices_from_json(kept, f"{where}, `{axis}`") for axis, kept in record.items()}


def _indices_from_json(record: object, where: str) -> Indices:
    if isinstance(record, list) and all(type(unit) is int for unit in record):
        return tuple(record)
    raise UserError(f"{where} of a selection must be a list of indices, but is {str(record)[:60]}")


def _frozen(axes: LayerSelection | None) -> tuple[tuple[str, Indices], ...] | None:
    return None if axes is None else tuple(axes.items())


def _pick(axis: str, first: Indices | None, later: Indices | None) -> Indices:
    if first is None:
        assert later is not None
        return later
    if later is not None and later[-1] >= len(first):
        raise UserError(
            f"the later selection asks for {later[-1]} of `{axis}`, "
            f"the earlier one leaves {len(first)}; they are counted from 0"
        )
    return first if later is None else tuple(first[i] for i in later)


def with_units_of_groups(layer: Layer, axes: LayerSelection) -> LayerSelection:
    """`axes`; where it chooses groups and says nothing of their units, with all units of those."""
    if layer.grouping is None:
        return axes
    axis, by = layer.grouping
    groups = getattr(layer, by)
    if axis in axes or by not in axes or axes[by][-1] >= groups:
        return axes
    size = getattr(layer, axis) // groups
    return {**axes, axis: tuple(g * size + unit for g in axes[by] for unit in range(size))}


def narrow(layer: Layer, axes: LayerSelection, *, where: str) -> Layer:
    """The layer with only the kept indices of each axis; UserError where they do not fit it."""
    _check_axes(layer, axes, where=where)
    if layer.grouping is not None:
        _check_grouping(layer, axes, *layer.grouping, where=where)
    sizes = vars(layer) | {axis: len(kept) for axis, kept in axes.items()}
    return LAYER_CLASSES[layer.kind](**sizes)


def _check_axes(layer: Layer, axes: LayerSelection, *, where: str) -> None:
    """UserError unless the layer has these axes and enough units on them."""
    for axis, kept in axes.items():
        if axis not in CUT_AXES[layer.kind]:
            known = ", ".join(f"`{name}`" for name in CUT_AXES[layer.kind])
            raise UserError(
                f"{where}: a {layer.kind} layer has no axis `{axis}` that can be cut; "
                f"it has {known}"
            )
        size = getattr(layer, axis)
        if kept[-1] >= size:
            raise UserError(
                f"{where}: `{axis}` has {size} units, "
                f"the selection asks for {kept[-1]}; they are counted from 0"
            )


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
            f"{where}: every kept one of the `{by}` must keep the same number of `{axis}` and a "
            f"cut one none, but they keep {_shown(tuple(counts))}"
        )
