"""Architecture search under a memory budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minipuzzle.recipe import Recipe
    from minipuzzle.runfolder import RunFolder


def run(recipe: Recipe, folder: RunFolder) -> None:
    """Stage `search`: write search/ with the trials, the finalists and the best candidate.

    Raises:
        UserError: when the budget is impossible in the recipe's space, or nothing needs to go.
    """
    from .stage import run as run_search

    run_search(recipe, folder)
