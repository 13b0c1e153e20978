"""`minipuzzle prune`."""

from __future__ import annotations

from collections.abc import Sequence

from .options import run_one_stage, stage_command


@stage_command
def command(target: str, run: str | None, overrides: Sequence[str]) -> None:
    """Cut the model to the architecture the search chose.

    Writes RUN/pruned, a checkpoint that plain transformers loads. Needs RUN/scores and RUN/search.
    TARGET is a recipe (.yaml), a run folder, or a model (folder or hub id).

    \b
    Example:
      minipuzzle prune runs/my
    """
    run_one_stage("prune", target, run, overrides)
