"""`minipuzzle demo`: the whole job on the bundled model."""

from __future__ import annotations

from collections.abc import Sequence

import click

from .options import dry_run_option, open_target, set_option


@click.command()
@click.option("--run", default="runs/demo", show_default=True, metavar="RUN", help="Run folder.")
@set_option
@dry_run_option
def command(run: str, overrides: Sequence[str], dry_run: bool) -> None:
    """Compress the bundled model: the whole job at small size.

    Runs every stage, then shows the results and how to load the model. Needs no network and no
    GPU. Run again, it finds everything done; stopped, it goes on.

    \b
    Example:
      minipuzzle demo --run runs/demo
    """
    from minipuzzle import pipeline
    from minipuzzle.source import DEMO

    recipe, folder = open_target(DEMO, run, overrides)
    if dry_run:
        pipeline.dry_run(recipe, folder)
    else:
        pipeline.run(recipe, folder)
