"""What must be true of every cut, checked in the product and not only in tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from minipuzzle.families import parameter_count
from minipuzzle.masks import masked
from minipuzzle.model import Model, load, open_checked
from minipuzzle.selection import Selection

from .slice import differing_tensor

TOLERANCE = 1e-3  # largest difference of fp32 logits; rounding on real models stays below 1e-4


@torch.no_grad()
def verify_cut(
    teacher: Model, folder: Path, selection: Selection, ids: torch.Tensor
) -> dict[str, Any]:
    """Check a pruned checkpoint against its teacher; the findings, for the record.

    Planned and real parameter counts and shapes agree; the tensors on disk are bit for bit the
    slices of the teacher's; the uncut model under masks gives the sliced model's logits on ids
    (B, T). A difference is a slip of ours and therefore an assertion.
    """
    planned = selection.apply(teacher.architecture)
    _, family, architecture, checkpoint = open_checked(folder)
    assert architecture == planned, f"planned {planned}, written {architecture}"
    real = sum(torch.Size(checkpoint.shape(name)).numel() for name in checkpoint.names)
    assert real == parameter_count(planned, family), f"planned and real parameters of {folder}"
    strange = differing_tensor(teacher.folder, folder, selection)
    assert strange is None, f"{strange} on disk is not the slice of the teacher's"
    sliced = load(folder).module(ids, use_cache=False).logits
    with masked(teacher, selection) as module:
        shown = module(ids, use_cache=False).logits
    difference = float((sliced - shown).abs().max())
    scale = max(1.0, float(shown.abs().max()))
    assert difference <= TOLERANCE * scale, f"masked and sliced logits differ by {difference}"
    return {
        "parameters": real,
        "tensors": len(checkpoint.names),
        "bit_identical_slices": True,
        "masked_vs_sliced_max_difference": difference,
        "largest_logit": scale,
    }
