"""Which questions a recipe asks: lm-eval's own tasks, and those made from installed packages."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from minipuzzle.data.sources import PACKAGES_PREFIX, package_names
from minipuzzle.errors import UserError
from minipuzzle.recipe import Recipe

from .harness import Tasks

MADE_FROM = {"demo": "report", "demo_search": "search"}
"""Groups of questions that are made here -> the split whose packages they are made from."""


def prepare(recipe: Recipe, tokenizer: Any, folder: Path, *, limit: int | None) -> Tasks:
    """The recipe's tasks, ready to be put to models.

    Args:
        recipe: names the tasks and the sources of the splits.
        tokenizer: the models' tokenizer; made questions have choices of one token.
        folder: where made questions are written; replaced.
        limit: questions per task, None for all there are.

    Raises:
        UserError: a task is not known, or questions are to be made from a source that is not a
            list of installed packages.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    names = list(recipe.eval.tasks)
    made = [name for name in names if name in MADE_FROM]
    for name in made:
        _make(name, recipe, tokenizer, folder, limit)
    return Tasks(
        names,
        folder=folder if made else None,
        defaults=len(made) < len(names),
        limit=limit,
    )


def _make(name: str, recipe: Recipe, tokenizer: Any, folder: Path, limit: int | None) -> None:
    from minipuzzle.demo.tasks import write_tasks

    split = MADE_FROM[name]
    source = getattr(recipe.data, split).source
    packages = package_names(source)
    if packages is None:
        raise UserError(
            f"the questions of {name!r} are made from installed packages, but data.{split}.source "
            f"is {source!r}; set it to {PACKAGES_PREFIX}NAME,... or ask other tasks"
        )
    write_tasks(folder, tokenizer, limit=limit, packages=packages, prefix=name, seed=recipe.seed)
