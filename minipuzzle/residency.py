"""Where a model lives while it is walked: on the device, or streamed from its checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from minipuzzle import progress
from minipuzzle.checkpoint import Checkpoint
from minipuzzle.families import parameter_count
from minipuzzle.model import Model, load, read_architecture, stored_dtype
from minipuzzle.streaming import stream
from minipuzzle.units import format_bytes

Residency = Literal["auto", "resident", "streamed"]
SHARE = 0.85  # of the free memory that weights may take; states and workspace need the rest


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    lines = Path("/proc/meminfo").read_text() if Path("/proc/meminfo").exists() else ""
    for line in lines.splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 2**63  # unknown: let the allocator say


def computing_dtype(folder: Path, device: torch.device) -> torch.dtype:
    """fp32 on the CPU, where it is the fast one; what is stored elsewhere."""
    if device.type == "cpu":
        return torch.float32
    return stored_dtype(Checkpoint.open(folder))


def open_model(
    folder: Path,
    device: torch.device,
    *,
    residency: Residency = "auto",
    states_bytes: int = 0,
    quiet: bool = False,
) -> Model:
    """Load a model, or stream it where it does not fit; says which in one line.

    Args:
        folder: a whole checkpoint of a known family.
        device: where it computes.
        residency: `resident` or `streamed` leaves no choice.
        states_bytes: what else is to be on the device.
        quiet: say nothing.

    Raises:
        UserError: for a folder that is not such a checkpoint.
    """
    dtype = computing_dtype(folder, device)
    _, family, architecture = read_architecture(folder)
    weights = parameter_count(architecture, family) * dtype.itemsize
    free = free_bytes(device)
    fits = weights <= SHARE * free - states_bytes
    resident = residency == "resident" or (residency == "auto" and fits)
    if not quiet:
        where = "resident" if resident else "streamed from the checkpoint"
        why = "" if residency == "auto" else ", as asked"
        progress.say(
            f"weights of {format_bytes(weights)}, {format_bytes(free)} free on {device}: "
            f"{where}{why}"
        )
    if resident:
        return load(folder, dtype=dtype, device=str(device))
    return stream(folder, dtype=dtype, device=device)
