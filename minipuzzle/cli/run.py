"""`minipuzzle run`: all stages in order."""

from __future__ import annotations

from collections.abc import Sequence

import click

from .options import dry_run_option, open_target, run_option, set_option


@click.command()
@click.argument("target", metavar="RECIPE")
@run_option
@set_option
@dry_run_option
def command(target: str, run: str | None, overrides: Sequence[str], dry_run: bool) -> None:
    """Run all stages of a recipe.

    In this order: score, search, prune, repair, distill, eval, export, report. Stages that are done
    are not run again; an interrupted one goes on where it was. RECIPE may also be a run folder, or
    a model for the default recipe.

    \b
    Examples:
      minipuzzle run recipes/my.yaml --dry-run
      minipuzzle run recipes/my.yaml --run runs/try --set budget=70%
    """
    from minipuzzle import pipeline

    recipe, folder = open_target(target, run, overrides)
    if dry_run:
        pipeline.dry_run(recipe, folder)
    else:
        pipeline.run(recipe, folder)
