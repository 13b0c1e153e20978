"""`minipuzzle eval`."""

from __future__ import annotations

from collections.abc import Sequence

from .options import run_one_stage, stage_command


@stage_command
def command(target: str, run: str | None, overrides: Sequence[str]) -> None:
    """Measure teacher, pruned, repaired and student.

    Writes RUN/evaluation and RUN/summary.json: tasks, bits per byte, speed and memory on report
    text, for the models that RUN holds.
    TARGET is a recipe (.yaml), a run folder, or a model (folder or hub id).

    \b
    Example:
      minipuzzle eval runs/my --set eval.limit=200
    """
    run_one_stage("eval", target, run, overrides)
