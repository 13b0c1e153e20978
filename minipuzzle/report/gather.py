"""What a run folder holds, read as it is: every part may be missing, none is trusted to be tidy."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minipuzzle.architecture import Architecture
from minipuzzle.errors import UserError
from minipuzzle.files import read_json
from minipuzzle.recipe import Recipe
from minipuzzle.runfolder import RunFolder
from minipuzzle.source import resolve_config

ARTEFACTS = {
    "scores": "score",
    "search": "search",
    "pruned": "prune",
    "repaired": "repair",
    "student": "distill",
    "evaluation": "eval",
    "export": "export",
}
"""Artefact -> the stage that makes it, in the order of a run."""
SEARCH_FILES = ("trials.json", "finalists.json", "front.json", "best.json")

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Findings:
    """The records of a run; empty ones stand for stages that have not run."""

    teacher: Architecture | None = None
    importance: Sequence[float] = ()
    trials: Sequence[Record] = ()
    finalists: Sequence[Record] = ()
    front: Record = field(default_factory=dict)
    best: Record = field(default_factory=dict)
    missing: Sequence[str] = ()  # files that the search should have left
    history: Sequence[Record] = ()
    distillation: Record = field(default_factory=dict)
    evaluation: Record = field(default_factory=dict)
    proof: Record = field(default_factory=dict)
    stages: Mapping[str, Record] = field(default_factory=dict)

    @property
    def models(self) -> Mapping[str, Record]:
        """Model name -> its record of the evaluation."""
        models: Mapping[str, Record] = self.evaluation.get("models", {})
        return models

    @property
    def student(self) -> Architecture | None:
        """The architecture that the search chose."""
        record = self.best.get("architecture")
        return None if record is None else Architecture.from_json(record)

    @property
    def selection(self) -> Sequence[Record | None]:
        """Per layer of the teacher: None where it was removed, else axis -> kept indices."""
        layers: Sequence[Record | None] = self.best.get("selection", {}).get("layers", ())
        return layers


def gather(recipe: Recipe, folder: RunFolder) -> Findings:
    """Read everything; only whole artefacts count."""
    stages = {name: record for name in ARTEFACTS if (record := folder.stage(name)) is not None}

    def read(artefact: str, file: str) -> dict[str, Any]:
        return (read_json(folder.path / artefact / file) or {}) if artefact in stages else {}

    history = folder.path / "student" / "history.jsonl"
    return Findings(
        teacher=_teacher(recipe),
        importance=_importance(read("scores", "scores.json").get("layers", [])),
        trials=_usable(read("search", "trials.json").get("trials", []), "kl"),
        finalists=_usable(read("search", "finalists.json").get("finalists", []), "kl"),
        front=read("search", "front.json"),
        best=read("search", "best.json"),
        missing=[f for f in SEARCH_FILES if "search" in stages and not read("search", f)],
        history=_lines(history) if "student" in stages else [],
        distillation=read("student", "distill.json"),
        evaluation=read("evaluation", "evaluation.json"),
        proof=read("export", "verified.json"),
        stages=stages,
    )


def _teacher(recipe: Recipe) -> Architecture | None:
    """The teacher's architecture; a model that is no longer reachable leaves sections out."""
    try:
        return resolve_config(recipe.model, recipe.revision)[1]
    except UserError:
        return None


def _importance(layers: Sequence[Record]) -> list[float]:
    """The error before the head without each layer; nothing where that was not measured."""
    return [layer["hidden_mse"] for layer in layers if "hidden_mse" in layer]


def _usable(records: Sequence[Record], key: str) -> list[Record]:
    """Those with a finite positive `key`, which can be drawn."""
    return [r for r in records if math.isfinite(r.get(key, math.nan)) and r[key] > 0]


def _lines(path: Path) -> list[Record]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
