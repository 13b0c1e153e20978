"""A peak learning rate for a number of steps, from a few short trainings.

A repaired student lies close to a minimum. With too high a rate a training ends above its start,
with too low a one it leaves a gain on the table. The rule, and where it is from:

- Trials of n / 16 steps (at least 4), each a whole schedule from the same start, at rates a factor
  of 2 apart from 1e-4 up or down until the lowest held-out KL has a higher one on both sides.
- That rate is the peak of trainings that are as short. Below about 34 steps it stays the same (the
  demo's repaired teacher: the best of 4 steps is the best of 24, docs/log.md); from there it grows
  with the square root of the steps (a repaired model of 8 M parameters: 5e-5 at 34, 1e-4 at 115).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minipuzzle import progress
from minipuzzle.files import atomic_write_json, read_json

from .config import Settings
from .faults import NotFinite
from .heldout import evaluate
from .teacher import Targets, Teacher
from .trainer import train

RANGE_FILE = "range_test.json"
FACTOR = 2.0
SHARE = 1 / 16
LEAST_STEPS = 4
MOST_TRIALS = 8
FIRST = 1e-4
FLAT_STEPS = 34  # up to here the best rate does not depend on the number of steps


def growth(steps: int) -> float:
    """How the best peak depends on the number of steps: a factor, 1 for few."""
    return math.sqrt(max(1.0, steps / FLAT_STEPS))


def choose_rate(
    student: nn.Module,
    teacher: Teacher | Targets,
    blocks: Tensor,
    settings: Settings,
    held_out: Tensor,
    judge: Teacher,
    work: Path,
) -> dict[str, Any]:
    """The peak learning rate of a training, with how it was found.

    Deterministic; a trial that was recorded in `work` is not run again. The student ends as it was.

    Args:
        student: the start of the training.
        teacher: what it learns from, on `blocks`.
        blocks: (B, T) ids the trials and the training read.
        settings: of the training; their rate is not used.
        held_out: (B', T') ids that no training reads.
        judge: the teacher of `held_out`.
        work: folder of the record.

    Returns:
        `learning_rate`, `steps` of a trial, `tokens` that all trials read, `kl` at the start, and
        `trials`: each `learning_rate` and `kl`, null where numbers were no longer finite.
    """
    path = work / RANGE_FILE
    record = read_json(path)
    if record is not None and "learning_rate" in record:
        return record
    steps = trial_steps(settings.steps)
    start = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    if record is None:
        kl = evaluate(student, judge, held_out).kl
        record = {"steps": steps, "kl": kl, "trials": []}

    def measure(rate: float) -> float:
        trial = replace(settings, steps=steps, learning_rate=rate, patience=0)
        try:
            train(student, teacher, blocks, replace(trial, checkpoint_every=0, evaluate_every=0))
            found = evaluate(student, judge, held_out).kl
        except NotFinite:
            found = math.inf
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                parameter.copy_(start[name])
                parameter.grad = None
        student.requires_grad_(False)
        return found

    def noted(rate: float) -> float:
        for trial in record["trials"]:
            if trial["learning_rate"] == rate:
                return math.inf if trial["kl"] is None else float(trial["kl"])
        found = measure(rate)
        finite = found if math.isfinite(found) else None
        record["trials"].append({"learning_rate": rate, "kl": finite})
        atomic_write_json(path, record)
        return found

    lowest = find_lowest(noted)
    record["learning_rate"] = lowest * growth(settings.steps) / growth(steps)
    record["tokens"] = len(record["trials"]) * steps * settings.batch * blocks.shape[1]
    atomic_write_json(path, record)
    progress.say(
        f"distill: learning rate {record['learning_rate']:.2g}, "
        f"after {len(record['trials'])} trials of {steps} steps"
    )
    return record


def trial_steps(steps: int) -> int:
    """Steps of a trial for a training of `steps`."""
    return min(steps, max(LEAST_STEPS, math.ceil(SHARE * steps)))


def find_lowest(measure: Callable[[float], float], first: float = FIRST) -> float:
    """The rate with the lowest `measure(rate)`, on a grid of factor 2 around `first`.

    Goes up, or down if that is worse at once, until it gets worse; at most 8 rates are measured.
    """
    best, lowest = first, measure(first)
    left = MOST_TRIALS - 1
    for factor in (FACTOR, 1 / FACTOR):
        while left:
            left -= 1
            found = measure(best * factor)
            if not found < lowest:
                break
            best, lowest = best * factor, found
        if best != first:
            break
    return best
