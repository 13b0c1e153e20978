"""From a selection to the rows and columns of every tensor: a visitor of the layout table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from minipuzzle.architecture import Architecture
from minipuzzle.families.table import (
    Dim,
    Family,
    TensorSpec,
    axis_sizes,
    segment_size,
)
from minipuzzle.selection import Selection

Index = torch.Tensor | None
"""Kept positions of one dimension (int64), None for all of them."""


def segment_index(
    segment: tuple[str, ...], sizes: Mapping[str, int], kept: Mapping[str, tuple[int, ...]]
) -> torch.Tensor:
    """Kept units of a product of axes, in order: shape (units,)."""
    index = torch.zeros(1, dtype=torch.int64)
    for axis in segment:
        units = torch.tensor(kept.get(axis, tuple(range(sizes[axis]))), dtype=torch.int64)
        index = (index[:, None] * sizes[axis] + units[None, :]).reshape(-1)
    return index


def dim_index(dim: Dim, sizes: Mapping[str, int], kept: Mapping[str, tuple[int, ...]]) -> Index:
    """Kept positions of a dimension made of segments end to end; None when all stay."""
    if not any(axis in kept for segment in dim for axis in segment):
        return None
    parts, offset = [], 0
    for segment in dim:
        parts.append(segment_index(segment, sizes, kept) + offset)
        offset += segment_size(segment, sizes)
    return torch.cat(parts)


def tensor_index(
    spec: TensorSpec, architecture: Architecture, selection: Selection
) -> tuple[Index, ...]:
    """Kept positions of every dimension of a tensor of the uncut model."""
    layer = None if spec.layer is None else architecture.layers[spec.layer]
    axes = {} if spec.layer is None else dict(selection.layers[spec.layer] or {})
    if selection.hidden is not None:
        axes["hidden"] = selection.hidden
    sizes = axis_sizes(architecture, layer)
    return tuple(dim_index(dim, sizes, axes) for dim in spec.layout.dims)


def take(tensor: torch.Tensor, index: tuple[Index, ...]) -> torch.Tensor:
    """The kept part of a tensor."""
    for dim, kept in enumerate(index):
        if kept is not None:
            tensor = tensor.index_select(dim, kept.to(tensor.device))
    return tensor


def plan_tensors(
    family: Family, architecture: Architecture, selection: Selection
) -> Iterator[tuple[TensorSpec, TensorSpec, tuple[Index, ...]]]:
    """Pair every tensor of the pruned model with the one it is cut from, and how.

    Yields (tensor of the pruned model, tensor of the uncut model, kept positions).
    """
    cut = selection.apply(architecture)
    source = {(s.layer, s.layout.name): s for s in family.tensors(architecture)}
    kept = selection.kept
    for target in family.tensors(cut):
        parent = source[(None if target.layer is None else kept[target.layer], target.layout.name)]
        yield target, parent, tensor_index(parent, architecture, selection)
