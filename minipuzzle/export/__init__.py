"""export: the compressed model as a folder that plain transformers, and servers, load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minipuzzle.recipe import Recipe
    from minipuzzle.runfolder import RunFolder


def run(recipe: Recipe, folder: RunFolder) -> Path:
    """Make ``<run>/export`` from the student: weights, config, tokenizer, model card, checksums.

    The folder is loaded once in a process of its own that never imports minipuzzle, and must give
    the student's logits and tokens there. UserError when it does not, or when there is no student.
    """
    from .stage import run as run_stage

    return run_stage(recipe, folder)
