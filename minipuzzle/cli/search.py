"""`minipuzzle search`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from minipuzzle.errors import UserError

from .options import open_target, run_one_stage, run_option, set_option


@click.command()
@click.argument("target")
@run_option
@set_option
@click.option(
    "--trials",
    type=click.IntRange(min=1),
    metavar="N",
    help="Candidates that are evaluated; the same as --set search.trials=N.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Begin none after that time; the same as --set search.timeout=SECONDS.",
)
@click.option(
    "--worker",
    is_flag=True,
    help="Only help with the study in search.storage, beside the process that runs the stage.",
)
@click.option(
    "--list",
    "listed",
    is_flag=True,
    help="Say what the space holds and which candidates fit, and stop. Needs only a config.json.",
)
@click.option("--all", "whole", is_flag=True, help="With --list: all that fit, not the largest 20.")
@click.option(
    "--scores",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="With --list: published scores of the layers, which say the order in which they go.",
)
def command(
    target: str,
    run: str | None,
    overrides: tuple[str, ...],
    trials: int | None,
    timeout: float | None,
    worker: bool,
    listed: bool,
    whole: bool,
    scores: Path | None,
) -> None:
    """Search architectures under the budget, keep the best.

    Writes RUN/search. Candidates are judged on search text inside the teacher; the finalists get a
    short distillation. Needs RUN/scores.
    TARGET is a recipe (.yaml), a run folder, or a model (folder or hub id).

    \b
    Examples:
      minipuzzle search recipes/my.yaml --trials 100
      minipuzzle search recipes/my.yaml --list
    """
    if (whole or scores) and not listed:
        raise UserError("--all and --scores belong to --list; add it, or leave them out")
    if trials is not None:
        overrides += (f"search.trials={trials}",)
    if timeout is not None:
        overrides += (f"search.timeout={timeout}",)
    if listed:
        _list(target, run, overrides, whole, scores)
    elif worker:
        from minipuzzle.search.stage import work_along

        work_along(*open_target(target, run, overrides))
    else:
        run_one_stage("search", target, run, overrides)


def _list(
    target: str, run: str | None, overrides: Sequence[str], whole: bool, file: Path | None
) -> None:
    """Print the space of a recipe, with the order of a file or of scores in the run folder."""
    from minipuzzle.scores import Scores
    from minipuzzle.search import listing
    from minipuzzle.source import resolve_config

    recipe, folder = open_target(target, run, overrides)
    family, architecture = resolve_config(recipe.model, recipe.revision)
    scores = None
    if file is not None:
        scores, metric = listing.published_scores(file, architecture)
        search = recipe.search.model_copy(update={"layer_metric": metric})
        recipe = recipe.model_copy(update={"search": search})
    elif folder.stage("scores") is not None:
        scores = Scores.load(folder.artefact("scores"))
        scores.check(architecture)
    found = listing.list_space(recipe, architecture, family, scores)
    click.echo(listing.render(found, None if whole else listing.LARGEST))
