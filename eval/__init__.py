"""eval: what teacher, pruned, repaired and student are worth, measured side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minipuzzle.recipe import Recipe
    from minipuzzle.runfolder import RunFolder


def run(recipe: Recipe, folder: RunFolder) -> Path:
    """Make ``<run>/evaluation``: tasks, bits per byte, speed, memory of every model of the run.

    Reads the report split, which no other stage does. Evaluates the models that exist: the teacher
    and whichever of pruned, repaired and student the run folder holds whole.
    UserError: unknown tasks, unreadable report text, a model without tokenizer.
    """
    from .stage import run as run_stage

    return run_stage(recipe, folder)
