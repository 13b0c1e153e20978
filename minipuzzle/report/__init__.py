"""report: the run as one HTML page that needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minipuzzle.recipe import Recipe
    from minipuzzle.runfolder import RunFolder


def run(recipe: Recipe, folder: RunFolder) -> Path:
    """Make ``<run>/report/report.html`` from the JSON files of the stages that have run.

    A section whose stage has not run is left out. UserError when no stage has run.
    """
    from .stage import run as run_stage

    return run_stage(recipe, folder)
