"""What must be true of every cut, checked in the product and not only in tests."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from minipuzzle import progress
from minipuzzle.architecture import Architecture
from minipuzzle.errors import UserError
from minipuzzle.families import Family, parameter_count
from minipuzzle.masks import masked
from minipuzzle.model import Model, load, open_checked
from minipuzzle.residency import SHARE, free_bytes
from minipuzzle.selection import Selection
from minipuzzle.streaming import stream
from minipuzzle.units import format_bytes
from minipuzzle.walk import Walk

from .slice import compared_share, differing_tensor

TOLERANCE = 1e-3  # largest difference of fp32 logits; rounding on real models stays below 1e-4
STREAMED_TOKENS = 64  # every weight is read for them all the same
FP32_BYTES = 4
CPU = torch.device("cpu")

How = Literal["resident", "streamed", "skipped"]


@dataclass(frozen=True)
class Logits:
    """How masked and sliced logits were compared, on how many tokens, and what was found.

    `resident`: stock forward passes in fp32. `streamed`: the models do not fit the memory
    together; layer by layer from their checkpoints. `skipped`: not even that fits.
    """

    how: How
    needed_bytes: int
    tokens: int = 0
    masked_vs_sliced_max_difference: float | None = None
    largest_logit: float | None = None


def verify_cut(
    teacher: Model | Path, folder: Path, selection: Selection, ids: torch.Tensor
) -> dict[str, Any]:
    """Check a pruned checkpoint against its teacher; the findings, for the record.

    Planned and real parameter counts and shapes agree; the tensors on disk are bit for bit the
    slices of the teacher's (evenly spaced rows of large ones); the uncut model under masks gives
    the sliced model's logits on ids (B, T), as far as the free memory allows. A difference is a
    slip of ours and therefore an assertion.

    Args:
        teacher: the uncut model, or its folder: then it is loaded only where it fits.
        folder: the pruned checkpoint.
        selection: the cut.
        ids: tokens to compare logits on.
    """
    source = teacher if isinstance(teacher, Path) else teacher.folder
    uncut = open_checked(source)[2]
    planned = selection.apply(uncut)
    _, family, architecture, checkpoint = open_checked(folder)
    assert architecture == planned, f"planned {planned}, written {architecture}"
    real = sum(torch.Size(checkpoint.shape(name)).numel() for name in checkpoint.names)
    assert real == parameter_count(planned, family), f"planned and real parameters of {folder}"
    strange = differing_tensor(source, folder, selection)
    assert strange is None, f"{strange} on disk is not the slice of the teacher's"
    logits = compare_logits(teacher, uncut, folder, selection, ids)
    return {
        "parameters": real,
        "tensors": len(checkpoint.names),
        "bit_identical_slices": True,
        "compared_share": compared_share(folder),
        **asdict(logits),
    }


def compare_logits(
    teacher: Model | Path,
    architecture: Architecture,
    folder: Path,
    selection: Selection,
    ids: torch.Tensor,
) -> Logits:
    """Masked against sliced logits in fp32 on ids (B, T), in the way that fits the memory.

    `architecture` is the teacher's.
    """
    planned, family = selection.apply(architecture), open_checked(folder)[1]
    free = free_bytes(CPU)
    shapes = (planned,) if isinstance(teacher, Model) else (architecture, planned)
    whole = sum(parameter_count(shape, family) for shape in shapes) + 2 * _logits(ids, planned)
    few = ids[:1, :STREAMED_TOKENS]
    streamed = _streamed_parameters(architecture, family) + 2 * _logits(few, planned)
    if whole * FP32_BYTES <= SHARE * free:
        found = _resident(teacher, folder, selection, ids)
        return _finding("resident", whole * FP32_BYTES, ids, *found)
    needed = streamed * FP32_BYTES
    if needed > SHARE * free:
        progress.say(
            f"masked and sliced logits are not compared: even streamed that needs "
            f"{format_bytes(needed)}, and {format_bytes(free)} are free"
        )
        return Logits("skipped", needed)
    progress.say(
        f"both models need {format_bytes(whole * FP32_BYTES)}, {format_bytes(free)} are free: "
        f"masked and sliced logits are compared layer by layer on {few.numel()} tokens"
    )
    source = teacher if isinstance(teacher, Path) else teacher.folder
    return _finding("streamed", needed, few, *_streamed(source, folder, selection, few))


def _finding(
    how: How,
    needed: int,
    ids: torch.Tensor,
    shown: torch.Tensor,
    sliced: torch.Tensor,
) -> Logits:
    """The record of two logits (B, T, V); an assertion that they agree."""
    if not torch.isfinite(shown).all():
        raise UserError(
            "the cut model's logits are not finite: the checkpoint holds NaN, infinite or far too "
            "large weights; check it with the uncut model"
        )
    difference = float((sliced - shown).abs().max())
    scale = max(1.0, float(shown.abs().max()))
    assert difference <= TOLERANCE * scale, f"masked and sliced logits differ by {difference}"
    return Logits(how, needed, ids.numel(), difference, scale)


@torch.no_grad()
def _resident(
    teacher: Model | Path, folder: Path, selection: Selection, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked and sliced logits by the stock forward passes."""
    sliced = load(folder).module(ids, use_cache=False).logits
    with masked(load(teacher) if isinstance(teacher, Path) else teacher, selection) as module:
        return module(ids, use_cache=False).logits, sliced


@torch.no_grad()
def _streamed(
    teacher: Path, folder: Path, selection: Selection, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked and sliced logits, one model after the other and one layer at a time."""
    return _walked(teacher, ids, selection), _walked(folder, ids, None)


def _walked(folder: Path, ids: torch.Tensor, selection: Selection | None) -> torch.Tensor:
    model = stream(folder, dtype=torch.float32, device=CPU)
    walk = Walk(model)
    with nullcontext() if selection is None else masked(model, selection):
        hidden = walk.embed(ids)
        for i in walk.layers():
            hidden = walk.layer(i, hidden)
        return walk.logits(walk.final(hidden))


def _logits(ids: torch.Tensor, architecture: Architecture) -> int:
    return ids.numel() * architecture.vocabulary


def _streamed_parameters(architecture: Architecture, family: Family) -> int:
    """Parameters that a streamed walk holds at once: the head, a layer and the next one."""
    layers = [0] * len(architecture.layers)
    for spec in family.tensors(architecture):
        if spec.layer is not None:
            layers[spec.layer] += spec.size
    return architecture.hidden * architecture.vocabulary + 2 * max(layers)
