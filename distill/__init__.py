"""distill: the student learns to say what its teacher says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minipuzzle.recipe import Recipe
    from minipuzzle.runfolder import RunFolder


def run(recipe: Recipe, folder: RunFolder) -> Path:
    """Make ``<run>/student``: the repaired (or only pruned) model, distilled from the teacher.

    A checkpoint in the teacher's stored precision, `history.jsonl` (every step) and `distill.json`
    (how near to the teacher the student was before and after, on blocks it did not train on).
    With no steps the student is the model it starts from. Stopped, it goes on where it was.
    UserError: nothing to distill in the run folder, or too little text.
    """
    from .stage import run as run_stage

    return run_stage(recipe, folder)
