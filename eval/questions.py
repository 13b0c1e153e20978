"""Which questions a recipe asks: lm-eval's own tasks, and those made from installed packages."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minipuzzle.data.sources import PACKAGES_PREFIX, package_names
from minipuzzle.errors import UserError

from .harness import Tasks

MADE_FROM = {"demo": "report", "demo_search": "search"}
"""Groups of questions that are made here -> the split whose packages they are made from."""


def prepare(
    names: Sequence[str],
    sources: Mapping[str, str],
    tokenizer: Any,
    folder: Path,
    *,
    limit: int | None,
    seed: int,
) -> Tasks:
    """Tasks ready to be put to models.

    Args:
        names: tasks and groups, lm-eval's own or those of `MADE_FROM`.
        sources: split -> source string; what questions are made from.
        tokenizer: the models' tokenizer; made questions have choices of one token.
        folder: where made questions are written; replaced.
        limit: questions per task, None for all there are.
        seed: decides which questions are made.

    Raises:
        UserError: a task is not known, or questions are to be made from a source that is not a
            list of installed packages.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    made = [name for name in names if name in MADE_FROM]
    for name in made:
        from minipuzzle.demo.tasks import write_tasks

        packages = _packages(name, sources)
        write_tasks(folder, tokenizer, limit=limit, packages=packages, prefix=name, seed=seed)
    return Tasks(
        names,
        folder=folder if made else None,
        defaults=len(made) < len(names),
        limit=limit,
    )


def keep_questions_only(folder: Path) -> None:
    """Leave the made questions as JSON lines, and no file that names this folder or caches it."""
    for path in folder.iterdir() if folder.exists() else ():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.suffix != ".jsonl":
            path.unlink()


def _packages(name: str, sources: Mapping[str, str]) -> list[str]:
    split = MADE_FROM[name]
    packages = package_names(sources[split])
    if packages is None:
        raise UserError(
            f"the questions of {name!r} are made from installed packages, but data.{split}.source "
            f"is {sources[split]!r}; set it to {PACKAGES_PREFIX}NAME,... or ask other tasks"
        )
    return packages
