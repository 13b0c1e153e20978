"""`minipuzzle export`."""

from __future__ import annotations

from collections.abc import Sequence

from .options import run_one_stage, stage_command


@stage_command
def command(target: str, run: str | None, overrides: Sequence[str]) -> None:
    """Make the folder that is served.

    Writes RUN/export: weights, tokenizer, generation config, model card. Needs RUN/student and
    RUN/evaluation.
    TARGET is a recipe (.yaml), a run folder, or a model (folder or hub id).

    \b
    Example:
      minipuzzle export runs/my
    """
    run_one_stage("export", target, run, overrides)
