"""Surgery: a pure function of weights and selection, streamed tensor by tensor to disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from minipuzzle.checkpoint import Checkpoint, write_checkpoint
from minipuzzle.model import open_checked
from minipuzzle.selection import Selection
from minipuzzle.slicing import plan_tensors, take


def slice_checkpoint(source: Path, target: Path, selection: Selection) -> None:
    """Write the pruned checkpoint of `source` to `target`, in the dtypes of the source.

    At most one shard is in memory. Raises UserError for a selection that does not fit the model
    and for too little disk.
    """
    config, family, architecture, checkpoint = open_checked(source)
    plan = list(plan_tensors(family, architecture, selection))
    total = sum(new.size * checkpoint.dtype(old.name).itemsize for new, old, _ in plan)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for new, old, index in plan:
            yield new.name, take(checkpoint.tensor(old.name), index)

    write_checkpoint(
        target,
        family.write_config(config, selection.apply(architecture)),
        tensors(),
        total_bytes=total,
        carry_from=source,
    )


def differing_tensor(source: Path, target: Path, selection: Selection) -> str | None:
    """Name of a tensor on disk that is not bit for bit its slice; None when all are."""
    _, family, architecture, parent = open_checked(source)
    written = Checkpoint.open(target)
    for new, old, index in plan_tensors(family, architecture, selection):
        if not torch.equal(written.tensor(new.name), take(parent.tensor(old.name), index)):
            return new.name
    return None
