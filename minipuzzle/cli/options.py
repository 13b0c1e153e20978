"""Options that several commands share, and what they do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from minipuzzle.recipe import Recipe
    from minipuzzle.runfolder import RunFolder

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

run_option: Decorator = click.option(
    "--run", "run", metavar="RUN", help="Run folder. [default: runs/<name of the recipe>]"
)
set_option: Decorator = click.option(
    "--set",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    help="Change a key of the recipe, like search.trials=20. May be repeated.",
)
dry_run_option: Decorator = click.option(
    "--dry-run",
    is_flag=True,
    help="Say roughly what each stage needs in disk, memory and time, and stop.",
)


def stage_command(function: Callable[..., None]) -> click.Command:
    """A command with the argument and options of all stages: TARGET, --run, --set."""
    target = click.argument("target")
    decorated = target(run_option(set_option(function)))
    return click.command()(decorated)


def run_one_stage(name: str, target: str, run: str | None, overrides: Sequence[str]) -> None:
    """What a stage's command does: find recipe and run folder, run the stage."""
    from minipuzzle import pipeline

    recipe, folder = open_target(target, run, overrides)
    pipeline.run_stage(name, recipe, folder)


def open_target(target: str, run: str | None, overrides: Sequence[str]) -> tuple[Recipe, RunFolder]:
    """Recipe and run folder of a command.

    ``target``: a recipe (.yaml), `demo` for the demo's, a run folder (its recipe.yaml is used), or
    a model (folder or hub id) for the default recipe. UserError for anything wrong in the recipe.
    """
    from minipuzzle.pipeline import RECIPE_FILE
    from minipuzzle.recipe import Recipe, demo_recipe
    from minipuzzle.runfolder import RunFolder
    from minipuzzle.source import DEMO

    path = demo_recipe() if target == DEMO else Path(target)
    if path.suffix in (".yaml", ".yml"):
        return Recipe.load(path, overrides), RunFolder(run or Path("runs", path.stem))
    if (path / RECIPE_FILE).is_file():
        return Recipe.load(path / RECIPE_FILE, overrides), RunFolder(run or path)
    name = path.resolve().name if path.is_dir() else path.name
    return Recipe.from_mapping({"model": target}, overrides), RunFolder(run or Path("runs", name))
