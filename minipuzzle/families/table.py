"""The layout table: data that says which axis every dimension of every tensor carries.

Parameter counts, memory, slices, masks, probes and repair are visitors of this table; a new family
is a new table and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

from minipuzzle.architecture import Architecture, Kind, Layer

Role = Literal["embedding", "head", "reads", "writes", "inner", "norm", "inner_norm"]

Operation = Literal["mamba2", "rms_norm", "gated_rms_norm"]
"""What a module of the stock model computes, where minipuzzle has a faster way of its own."""

Segment = tuple[str, ...]
"""A product of axes, the first one slowest: `("heads", "head_dim")` is heads x head_dim units."""
Dim = tuple[Segment, ...]
"""Segments laid end to end along one dimension of a tensor."""

ONE: Dim = ((),)
HIDDEN: Dim = (("hidden",),)


@dataclass(frozen=True)
class TensorLayout:
    """One tensor of a layer (or of the model): `name` is relative to the layer's prefix."""

    name: str
    dims: tuple[Dim, ...]
    role: Role
    bias_flag: str | None = None
    untied_only: bool = False


@dataclass(frozen=True)
class Probe:
    """Where the units of an axis are scored (facts of the family, not of the algorithm).

    `module` is relative to the layer; `side` says whether its input or output is read; `segment`
    says which segment of that side carries the axis (0 for the only one).
    """

    axis: str
    module: str
    side: Literal["input", "output"]
    segment: int = 0


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a concrete architecture. `layer` is the layer's position or None."""

    name: str
    layout: TensorLayout
    layer: int | None
    shape: tuple[int, ...]

    @property
    def role(self) -> Role:
        """What the tensor does to the residual stream."""
        return self.layout.role

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Family:
    """Everything that is particular to a model family."""

    name: str
    layer_prefix: str  # of a block on disk, with {block}
    model_tensors: tuple[TensorLayout, ...]
    layer_tensors: Mapping[Kind, tuple[TensorLayout, ...]]
    probes: Mapping[Kind, tuple[Probe, ...]]
    memory_names: tuple[tuple[str, str], ...]  # (prefix on disk, prefix in memory)
    modules: Mapping[str, str]  # embed, norm, head (and positions) -> path in memory
    norms: Mapping[Kind, str]  # path of a layer's norm in its block
    mixers: Mapping[Kind, str]  # path of what comes between the norm and the sum
    read_config: Callable[[Mapping[str, Any]], Architecture]
    write_config: Callable[[Mapping[str, Any], Architecture], dict[str, Any]]
    block: tuple[Kind, ...] = ()  # layers that share a block, in order; (): a block for each
    operations: Mapping[str, Operation] = field(default_factory=dict)  # class in memory -> what

    @property
    def layers_per_block(self) -> int:
        """Layers that share one block's name."""
        return max(1, len(self.block))

    def prefix(self, i: int) -> str:
        """What the names on disk of layer i's tensors begin with."""
        return self.layer_prefix.format(block=i // self.layers_per_block)

    def removable(self, architecture: Architecture) -> tuple[tuple[int, ...], ...]:
        """Layers that can only go together, in order: single layers, or the layers of a block."""
        size = self.layers_per_block
        assert len(architecture.layers) % size == 0, "read_config lets only whole blocks through"
        return tuple(
            tuple(range(start, start + size)) for start in range(0, len(architecture.layers), size)
        )

    def tensors(self, architecture: Architecture) -> Iterator[TensorSpec]:
        """All tensors of a model of this architecture, in the order of the forward pass."""
        before = [t for t in self.model_tensors if t.role == "embedding"]
        after = [t for t in self.model_tensors if t.role != "embedding"]
        for layout in before:
            yield from self._spec(layout, "", architecture, None)
        for i in range(len(architecture.layers)):
            yield from self.tensors_of(architecture, i)
        for layout in after:
            yield from self._spec(layout, "", architecture, None)

    def tensors_of(self, architecture: Architecture, i: int) -> Iterator[TensorSpec]:
        """The tensors of layer i."""
        for layout in self.layer_tensors[architecture.layers[i].kind]:
            yield from self._spec(layout, self.prefix(i), architecture, i)

    def whole_blocks(self, removed: Mapping[Kind, int]) -> bool:
        """Whether so many layers of each kind can go without leaving part of a block."""
        return len({removed.get(kind, 0) for kind in self.block}) <= 1

    def _spec(
        self, layout: TensorLayout, prefix: str, architecture: Architecture, i: int | None
    ) -> Iterator[TensorSpec]:
        if layout.bias_flag is not None and layout.bias_flag not in architecture.biases:
            return
        if layout.untied_only and architecture.tied:
            return
        sizes = axis_sizes(architecture, None if i is None else architecture.layers[i])
        shape = tuple(dim_size(dim, sizes) for dim in layout.dims)
        yield TensorSpec(name=prefix + layout.name, layout=layout, layer=i, shape=shape)

    def memory_name(self, name: str) -> str:
        """The name that a tensor on disk has in the built model's state dict."""
        for disk, memory in self.memory_names:
            if name.startswith(disk):
                return memory + name.removeprefix(disk)
        return name

    def layer_module(self, i: int) -> str:
        """Path of the module of a layer's block in the built model."""
        return self.memory_name(self.prefix(i)).rstrip(".")

    def writer(self, kind: Kind) -> TensorLayout:
        """The projection of a layer that writes the residual stream."""
        return next(t for t in self.layer_tensors[kind] if t.role == "writes" and len(t.dims) == 2)


def axis_sizes(architecture: Architecture, layer: Layer | None) -> dict[str, int]:
    """Size of every axis that a tensor of `layer` may carry."""
    sizes = {"hidden": architecture.hidden, "vocabulary": architecture.vocabulary}
    return sizes if layer is None else sizes | vars(layer)


def segment_size(segment: Segment, sizes: Mapping[str, int]) -> int:
    """Number of units of a segment."""
    return prod(sizes[axis] for axis in segment)


def dim_size(dim: Dim, sizes: Mapping[str, int]) -> int:
    """Length of a dimension."""
    return sum(segment_size(segment, sizes) for segment in dim)


def parameter_count(architecture: Architecture, family: Family) -> int:
    """Parameters of a model, embeddings and head included, from its architecture alone."""
    return sum(spec.size for spec in family.tensors(architecture))
