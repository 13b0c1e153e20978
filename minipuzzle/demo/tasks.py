"""The questions as local lm-eval tasks: JSONL and YAML in a folder of the run."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from minipuzzle.demo.kinds import KINDS
from minipuzzle.demo.questions import Question, make_questions
from minipuzzle.errors import UserError
from minipuzzle.files import atomic_write_text

VERSION = 1
"""Of the questions; lm-eval shows it with the results."""


def write_tasks(
    folder: Path,
    tokenizer: Any,
    *,
    limit: int | None,
    packages: Sequence[str],
    prefix: str,
    seed: int,
) -> list[str]:
    """Make questions from installed packages and write them as lm-eval tasks.

    `TaskManager(include_path=folder, include_defaults=False)` then knows the group `prefix` and
    the tasks `prefix_scope`, `prefix_next`, ...: output type multiple_choice, metric acc. All
    choices are one token, which lets lm-eval answer a question with one forward pass.

    Args:
        folder: made if missing; holds the tasks afterwards. The YAML files name it, so it must
            not move before the tasks are loaded.
        tokenizer: a fast transformers tokenizer.
        limit: questions per task, None for every question there is.
        packages: names of installed packages.
        prefix: name of the group, and how the tasks' names begin.
        seed: see `make_questions`.

    Returns:
        names of the tasks, in order; kinds the packages have no question of are missing.

    Raises:
        UserError: a package is not installed, the tokenizer is not a fast one, or no question
            could be made.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UserError("the demo's questions need a fast tokenizer; save one as tokenizer.json")
    made = make_questions(KINDS, packages, tokenizer, limit=limit, seed=seed)
    folder.mkdir(parents=True, exist_ok=True)
    names: list[str] = []
    for kind, questions in made.items():
        if questions:
            names.append(f"{prefix}_{kind}")
            _write_task(folder, names[-1], questions)
    if not names:
        raise UserError(
            f"no question could be made from {', '.join(packages)} with this tokenizer; "
            "name larger packages"
        )
    _write_yaml(folder / f"{prefix}.yaml", _group(prefix, names))
    return names


def _write_task(folder: Path, name: str, questions: list[Question]) -> None:
    data = folder.absolute() / f"{name}.jsonl"
    atomic_write_text(data, "".join(json.dumps(asdict(q)) + "\n" for q in questions))
    _write_yaml(folder / f"{name}.yaml", _task(name, data))


def _task(name: str, data: Path) -> dict[str, Any]:
    return {
        "task": name,
        "dataset_path": "json",
        # The cache beside the data: nothing is left outside the run, nothing old is found again.
        "dataset_kwargs": {
            "data_files": {"test": str(data)},
            "cache_dir": str(data.parent / ".cache"),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        # The space before a choice is part of its token.
        "target_delimiter": "",
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": VERSION},
    }


def _group(prefix: str, names: list[str]) -> dict[str, Any]:
    mean = {"metric": "acc", "aggregation": "mean", "weight_by_size": False}
    return {
        "group": prefix,
        "task": names,
        "aggregate_metric_list": [mean],
        "metadata": {"version": VERSION},
    }


def _write_yaml(path: Path, content: dict[str, Any]) -> None:
    atomic_write_text(path, yaml.safe_dump(content, sort_keys=False))
