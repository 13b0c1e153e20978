"""What a hybrid model is made of: frozen values that know nothing of tensors or files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from minipuzzle.errors import UserError

SCHEMA_VERSION = 1

Kind = Literal["mamba", "attention", "ffn"]
KINDS: tuple[Kind, ...] = ("mamba", "attention", "ffn")
PATTERN_LETTERS: dict[Kind, str] = {"mamba": "M", "attention": "*", "ffn": "-"}


def _require_positive(layer: object) -> None:
    for field in fields(layer):  # type: ignore[arg-type]  # only called on the dataclasses below
        value = getattr(layer, field.name)
        if not isinstance(value, bool) and (not isinstance(value, int) or value < 1):
            raise UserError(
                f"`{type(layer).__name__}.{field.name} >= 1` must hold, but got {value!r}"
            )


def _require_multiple(layer: object, many: str, few: str) -> None:
    a, b = getattr(layer, many), getattr(layer, few)
    if a % b:
        raise UserError(f"`{many} % {few} == 0` must hold, but got {many}={a}, {few}={b}")


@dataclass(frozen=True)
class MambaLayer:
    """A Mamba-2 mixer: `heads` x `head_dim` inner channels, B and C shared inside `groups`."""

    heads: int
    head_dim: int
    groups: int
    state: int
    conv: int

    kind: ClassVar[Kind] = "mamba"
    # (axis, axis that shares something among its units): cuts keep equal numbers per shared unit
    grouping: ClassVar[tuple[str, str] | None] = ("heads", "groups")

    def __post_init__(self) -> None:
        _require_positive(self)
        _require_multiple(self, "heads", "groups")


@dataclass(frozen=True)
class AttentionLayer:
    """Grouped-query attention: `query_heads / kv_heads` query heads read one KV head."""

    query_heads: int
    kv_heads: int
    head_dim: int

    kind: ClassVar[Kind] = "attention"
    grouping: ClassVar[tuple[str, str] | None] = ("query_heads", "kv_heads")

    def __post_init__(self) -> None:
        _require_positive(self)
        _require_multiple(self, "query_heads", "kv_heads")


@dataclass(frozen=True)
class FFNLayer:
    """A feed-forward layer of `width` inner channels; `gated` ones have a second up-projection."""

    width: int
    gated: bool = False

    kind: ClassVar[Kind] = "ffn"
    grouping: ClassVar[tuple[str, str] | None] = None

    def __post_init__(self) -> None:
        _require_positive(self)


Layer = MambaLayer | AttentionLayer | FFNLayer
LAYER_CLASSES: dict[Kind, type[Layer]] = {
    "mamba": MambaLayer,
    "attention": AttentionLayer,
    "ffn": FFNLayer,
}


@dataclass(frozen=True)
class Architecture:
    """Hidden size, vocabulary and the layers in order.

    `tied`: one matrix serves as embedding and head. `biases`: which optional biases exist, by the
    flag names of the family's layout table.
    """

    hidden: int
    vocabulary: int
    tied: bool
    layers: tuple[Layer, ...]
    biases: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for name in ("hidden", "vocabulary"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"`{name} >= 1` must hold, but got {value!r}")
        if not self.layers:
            raise UserError("an architecture needs at least one layer, but got none")

    @property
    def pattern(self) -> str:
        """One letter per layer: `M` Mamba-2, `*` attention, `-` FFN."""
        return "".join(PATTERN_LETTERS[layer.kind] for layer in self.layers)

    def counts(self) -> dict[Kind, int]:
        """Number of layers per kind."""
        return {kind: sum(layer.kind == kind for layer in self.layers) for kind in KINDS}

    def indices(self, kind: Kind) -> tuple[int, ...]:
        """Positions of the layers of one kind."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.kind == kind)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able record; `from_json` reads it back."""
        return {
            "schema_version": SCHEMA_VERSION,
            "hidden": self.hidden,
            "vocabulary": self.vocabulary,
            "tied": self.tied,
            "biases": sorted(self.biases),
            "layers": [{"kind": layer.kind, **vars(layer)} for layer in self.layers],
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Architecture:
        """Read what `to_json` wrote; UserError on another schema version or unknown fields."""
        if record.get("schema_version") != SCHEMA_VERSION:
            raise UserError(
                f"this architecture has schema version {record.get('schema_version')!r}; "
                f"this minipuzzle reads {SCHEMA_VERSION}"
            )
        return cls(
            hidden=record["hidden"],
            vocabulary=record["vocabulary"],
            tied=record["tied"],
            biases=frozenset(record["biases"]),
            layers=tuple(_layer_from_json(layer) for layer in record["layers"]),
        )


def _layer_from_json(record: Mapping[str, Any]) -> Layer:
    values = dict(record)
    kind = values.pop("kind", None)
    if kind not in LAYER_CLASSES:
        raise UserError(f"unknown layer kind {kind!r}; known kinds: {', '.join(KINDS)}")
    try:
        return LAYER_CLASSES[kind](**values)
    except TypeError as error:
        raise UserError(f"a {kind} layer cannot be read from {values}: {error}") from error
