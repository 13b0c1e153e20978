"""From a selection to the rows and columns of every tensor: a visitor of the layout table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from minipuzzle.architecture import Architecture
from minipuzzle.checkpoint import Checkpoint
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
BLOCK_BYTES = 2 * 2**20  # stays in the processor's cache between reading, gathering and writing
AHEAD_BLOCKS = 8  # fetched from disk before they are asked for
MAX_RUN = 256


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


def sliced_blocks(
    checkpoint: Checkpoint,
    name: str,
    index: tuple[Index, ...],
    *,
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[torch.Tensor]:
    """`take` of a stored tensor as consecutive row blocks, read from disk as they are asked for.

    A block is valid until the next one is asked for. Memory: two blocks, or two rows where a row
    is larger than a block. The rows that stay must ascend, as those of a selection do.
    """
    shape, dtype = checkpoint.shape(name), checkpoint.dtype(name)
    rows, inner = (shape[0], shape[1:]) if shape else (1, ())
    row_bytes = math.prod(inner) * dtype.itemsize
    if rows * row_bytes == 0:
        return
    step = max(1, min(rows, block_bytes // row_bytes))
    buffer = np.empty((step, *inner), dtype=f"u{dtype.itemsize}")
    kept = np.arange(rows) if not index or index[0] is None else index[0].numpy()
    assert (np.diff(kept) > 0).all(), f"rows of {name} do not ascend"
    columns = [_Columns.of(dim, each, shape[dim]) for dim, each in enumerate(index[1:], 1)]
    checkpoint.will_need(name, 0, AHEAD_BLOCKS * step * row_bytes)
    for start in range(0, rows, step):
        checkpoint.will_need(name, (start + AHEAD_BLOCKS * step) * row_bytes, step * row_bytes)
        first, last = np.searchsorted(kept, [start, start + step])
        if first == last:
            continue
        local = kept[first:last] - kept[first]
        block = buffer[: int(local[-1]) + 1]
        raw = block.reshape(-1).view(np.uint8).data
        checkpoint.read_into(name, int(kept[first]) * row_bytes, raw)
        if len(local) < len(block):
            block = block.take(local, axis=0, mode="clip")
        for each in columns:
            block = each.take(block)
        yield torch.from_numpy(block.reshape(-1)).view(dtype).reshape(block.shape if shape else ())


@dataclass(frozen=True)
class _Columns:
    """Kept positions along a dimension, as runs of `unit` neighbours that stay together.

    Copying runs is many times as fast as gathering elements one by one.
    """

    dim: int
    unit: int
    index: np.ndarray[Any, np.dtype[np.int64]] | None

    @classmethod
    def of(cls, dim: int, index: Index, size: int) -> _Columns:
        if index is None:
            return cls(dim, 1, None)
        kept, unit = index.numpy(), 1
        while unit < MAX_RUN and _in_runs(kept, 2 * unit, size):
            unit *= 2
        return cls(dim, unit, kept[::unit] // unit)

    def take(self, block: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if self.index is None:
            return block
        before, after = block.shape[: self.dim], block.shape[self.dim + 1 :]
        runs = block.reshape(*before, -1, self.unit, *after)
        # indices are known to fit; "clip" spares numpy a check of each
        return runs.take(self.index, axis=self.dim, mode="clip").reshape(*before, -1, *after)


def _in_runs(kept: np.ndarray[Any, np.dtype[np.int64]], unit: int, size: int) -> bool:
    """Whether kept positions are aligned runs of `unit` neighbours."""
    if len(kept) % unit or size % unit:
        return False
    starts = kept[::unit]
    runs = starts[:, None] + np.arange(unit)
    return not (starts % unit).any() and bool((kept.reshape(-1, unit) == runs).all())


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
