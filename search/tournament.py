"""The finalists: repaired, distilled for a few steps, and ranked by what they are worth then.

Ranks before healing do not predict ranks after it (Nemotron-H, arXiv 2504.03624, table 6).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minipuzzle.distill.config import Settings
from minipuzzle.distill.heldout import evaluate
from minipuzzle.distill.teacher import OnlineTeacher
from minipuzzle.distill.trainer import train
from minipuzzle.files import atomic_write_json
from minipuzzle.jsonfile import read_json
from minipuzzle.model import Model, load
from minipuzzle.prune.repair import repair
from minipuzzle.prune.slice import slice_checkpoint
from minipuzzle.scores import Scores

from .space import Space
from .study import Trial


@dataclass(frozen=True)
class Texts:
    """Token ids (B, T) of the splits that the tournament reads."""

    calibration: torch.Tensor
    distillation: torch.Tensor
    search: torch.Tensor


def finalists(trials: Sequence[Trial], number: int) -> list[Trial]:
    """The best trials by KL that differ in the layers they remove, not in width alone."""
    chosen: list[Trial] = []
    for trial in sorted(trials, key=lambda t: (t.proxies.kl, t.number)):
        if all(trial.point.removed != other.point.removed for other in chosen):
            chosen.append(trial)
    return chosen[:number]


@dataclass(frozen=True)
class Tournament:
    """One rung: every finalist gets the same repair and the same distillation steps."""

    teacher: Model
    space: Space
    scores: Scores
    texts: Texts
    settings: Settings
    ridge: float
    work: Path

    def play(self, trial: Trial) -> dict[str, Any]:
        """KL to the teacher on the search text after cut, repair and distillation.

        The result is kept in `work`, so that an interrupted tournament goes on.
        """
        record = self.work / f"finalist-{trial.number}.json"
        if record.exists():
            return read_json(record)
        folder = self.work / f"finalist-{trial.number}"
        selection = self.space.selection(trial.point, self.scores)
        slice_checkpoint(self.teacher.folder, folder, selection)
        student = load(folder)
        label = f"finalist {trial.number}: repair"
        kl = {"kl_cut": self._kl(student)}
        repair(
            self.teacher,
            student,
            selection,
            self.texts.calibration,
            ridge=self.ridge,
            label=label,
        )
        kl["kl_repaired"] = kl["kl_distilled"] = self._kl(student)
        if self.settings.steps:
            train(student.module, self.teacher.module, self.texts.distillation, self.settings)
            kl["kl_distilled"] = self._kl(student)
        shutil.rmtree(folder)
        result = {**trial.to_json(), **kl}
        atomic_write_json(record, result)
        return result

    def _kl(self, student: Model) -> float:
        teacher = OnlineTeacher(self.teacher.module, self.texts.search)
        return evaluate(student.module, teacher, self.texts.search).kl
