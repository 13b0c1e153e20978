"""Scoring, selecting, slicing and repairing."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minipuzzle.recipe import Recipe
    from minipuzzle.runfolder import RunFolder


def run(recipe: Recipe, folder: RunFolder) -> None:
    """Stage `prune`: write pruned/, the teacher cut as the search decided, and verify it."""
    from .stage import run as run_prune

    run_prune(recipe, folder)
