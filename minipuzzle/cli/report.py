"""`minipuzzle report`."""

from __future__ import annotations

from collections.abc import Sequence

from .options import run_one_stage, stage_command


@stage_command
def command(target: str, run: str | None, overrides: Sequence[str]) -> None:
    """Write the report: one HTML file.

    Writes RUN/report, tables and pictures from the files of the other stages.
    TARGET is a recipe (.yaml), a run folder, or a model (folder or hub id).

    \b
    Example:
      minipuzzle report runs/my
    """
    run_one_stage("report", target, run, overrides)
