"""`minipuzzle repair`."""

from __future__ import annotations

from collections.abc import Sequence

from .options import run_one_stage, stage_command


@stage_command
def command(target: str, run: str | None, overrides: Sequence[str]) -> None:
    """Re-fit the pruned model's projections in closed form.

    Writes RUN/repaired; no training. Needs RUN/pruned.
    TARGET is a recipe (.yaml), a run folder, or a model (folder or hub id).

    \b
    Example:
      minipuzzle repair runs/my --set repair.blocks=200
    """
    run_one_stage("repair", target, run, overrides)
