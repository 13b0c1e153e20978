"""`minipuzzle score`."""

from __future__ import annotations

from collections.abc import Sequence

from .options import run_one_stage, stage_command


@stage_command
def command(target: str, run: str | None, overrides: Sequence[str]) -> None:
    """Score the layers, channels and heads of a model.

    Writes RUN/scores: the importance of every layer, FFN channel, Mamba head and attention
    head, measured on calibration text.
    TARGET is a recipe (.yaml), a run folder, or a model (folder or hub id).

    \b
    Example:
      minipuzzle score recipes/my.yaml
    """
    run_one_stage("score", target, run, overrides)
