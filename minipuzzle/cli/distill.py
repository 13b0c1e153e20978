"""`minipuzzle distill`."""

from __future__ import annotations

from collections.abc import Sequence

from .options import run_one_stage, stage_command


@stage_command
def command(target: str, run: str | None, overrides: Sequence[str]) -> None:
    """Train the repaired model towards the teacher.

    Writes RUN/student. Stopped at any time, it goes on where it was. Needs RUN/repaired.
    TARGET is a recipe (.yaml), a run folder, or a model (folder or hub id).

    \b
    Example:
      minipuzzle distill runs/my --set distill.steps=2000
    """
    run_one_stage("distill", target, run, overrides)
