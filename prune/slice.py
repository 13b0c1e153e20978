"""Surgery: a pure function of weights and selection, streamed in row blocks from shard to shard."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from minipuzzle.checkpoint import Checkpoint
from minipuzzle.model import open_checked
from minipuzzle.selection import Selection
from minipuzzle.shards import TensorPlan, tensor_bytes
from minipuzzle.slicing import BLOCK_BYTES, Index, plan_tensors, sliced_blocks, take
from minipuzzle.writer import MAX_SHARD_BYTES, CheckpointWriter

THREADS = 4  # of two cores: mostly they wait for the disk
COMPARED_BLOCKS = 8  # of each tensor, evenly spaced, first and last among them
COMPARED_BYTES = 256 * 2**10


def slice_checkpoint(
    source: Path,
    target: Path,
    selection: Selection,
    *,
    block_bytes: int = BLOCK_BYTES,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    sync: bool = True,
) -> None:
    """Write the pruned checkpoint of `source` to `target`, in the dtypes of the source.

    Memory does not depend on the model: a few blocks. The keywords after `block_bytes` are those
    of `CheckpointWriter`. Raises UserError for a source that is not
    whole, a selection that does not fit the model, and too little disk; nothing is written then.
    """
    config, family, architecture, checkpoint = open_checked(source)
    plans: list[TensorPlan] = []
    origin: dict[str, tuple[str, tuple[Index, ...]]] = {}
    for new, old, index in plan_tensors(family, architecture, selection):
        plans.append(TensorPlan(new.name, new.shape, checkpoint.dtype(old.name)))
        origin[new.name] = old.name, index
    pruned = family.write_config(config, selection.apply(architecture))
    writer = CheckpointWriter(
        target, pruned, plans, carry_from=source, max_shard_bytes=max_shard_bytes, sync=sync
    )

    def cut(name: str) -> None:
        old, index = origin[name]
        writer.write(name, sliced_blocks(checkpoint, old, index, block_bytes=block_bytes))

    with writer, ThreadPoolExecutor(THREADS, "slice") as pool:
        for _ in pool.map(cut, writer.order):
            pass  # an error of a thread is raised here


def differing_tensor(source: Path, target: Path, selection: Selection) -> str | None:
    """Name of a tensor on disk that is not bit for bit its slice; None when none is found.

    Of a tensor larger than COMPARED_BLOCKS x COMPARED_BYTES only so many evenly spaced row blocks
    are compared, so that the check stays small beside the cut of a large model; small models are
    compared whole. The slices are made by the plain `take`, not by what made the file.
    """
    _, family, architecture, parent = open_checked(source)
    written = Checkpoint.open(target)
    for new, old, index in plan_tensors(family, architecture, selection):
        for rows in _compared_rows(new.shape, written.dtype(new.name).itemsize):
            if not _same(written, new.name, parent, old.name, index, rows):
                return new.name
    return None


def compared_share(target: Path) -> float:
    """Part of a written checkpoint's bytes that `differing_tensor` compares; 1 for small ones."""
    written = Checkpoint.open(target)
    compared = 0
    for name in written.names:
        shape, itemsize = written.shape(name), written.dtype(name).itemsize
        rows = sum(part.stop - part.start for part in _compared_rows(shape, itemsize))
        compared += rows * torch.Size(shape[1:]).numel() * itemsize
    return compared / written.total_bytes


def _compared_rows(shape: tuple[int, ...], itemsize: int) -> Iterator[slice]:
    """All rows in blocks, or COMPARED_BLOCKS evenly spaced blocks of a tensor with more of them."""
    rows = shape[0] if shape else 1
    step = max(1, COMPARED_BYTES * rows // max(1, torch.Size(shape).numel() * itemsize))
    blocks = min(-(-rows // step), COMPARED_BLOCKS)
    for i in range(blocks):
        start = i * step if rows <= blocks * step else (rows - step) * i // (blocks - 1)
        yield slice(start, min(start + step, rows))


def _same(
    written: Checkpoint,
    name: str,
    parent: Checkpoint,
    origin: str,
    index: tuple[Index, ...],
    rows: slice,
) -> bool:
    """Whether rows of a written tensor have the bits of the parent's kept part."""
    if not written.shape(name):
        return tensor_bytes(parent.tensor(origin)) == tensor_bytes(written.tensor(name))
    kept = torch.arange(rows.start, rows.stop) if index[0] is None else index[0][rows]
    first = int(kept[0])
    part = parent.rows(origin, first, int(kept[-1]) + 1)
    expected = take(part, (kept - first, *index[1:]))
    return tensor_bytes(expected) == tensor_bytes(written.rows(name, rows.start, rows.stop))
