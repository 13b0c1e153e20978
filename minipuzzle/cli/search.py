"""`minipuzzle search`."""

from __future__ import annotations

from collections.abc import Sequence

from .options import run_one_stage, stage_command


@stage_command
def command(target: str, run: str | None, overrides: Sequence[str]) -> None:
    """Search architectures under the budget, keep the best.

    Writes RUN/search. Candidates are judged on search text inside the teacher; the finalists get a
    short distillation. Needs RUN/scores.
    TARGET is a recipe (.yaml), a run folder, or a model (folder or hub id).

    \b
    Example:
      minipuzzle search recipes/my.yaml --set search.trials=100
    """
    run_one_stage("search", target, run, overrides)
