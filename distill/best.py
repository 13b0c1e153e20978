"""Which of a training's states is the student: the one nearest to its teacher on held-out text."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from minipuzzle.errors import UserError
from minipuzzle.files import TEMPORARY

from .history import Evaluation, History
from .resume import trained, write_whole

BEST_PATTERN = "best-*.safetensors"


def best_of(history: History) -> Evaluation:
    """The evaluation with the lowest held-out KL, the start included; of equals the first."""
    return min(history.evaluations, key=lambda evaluation: evaluation.kl)


def out_of_patience(history: History, patience: int) -> bool:
    """Whether the last `patience` evaluations brought no gain on those before (0: never)."""
    if patience == 0:
        return False
    best = history.evaluations.index(best_of(history))
    return len(history.evaluations) - 1 - best >= patience


def keep_best(work: Path, student: nn.Module, history: History) -> None:
    """Write the parameters if the last evaluation is the best; the start is on disk anyway.

    Raises:
        UserError: the disk is full.
    """
    last = history.evaluations[-1]
    if last.step and best_of(history) is last:
        path = work / BEST_PATTERN.replace("*", str(last.step))
        temporary = path.with_name(f"{path.name}{TEMPORARY}0")
        tensors = {name: parameter.detach() for name, parameter in trained(student)}
        write_whole(tensors, temporary, {}, path)
        temporary.replace(path)


def drop_beaten(work: Path, history: History) -> None:
    """Remove what is no longer the best; call it after a checkpoint, which is never undone."""
    for path in work.glob(BEST_PATTERN):
        if history.evaluations and path.stem != f"best-{best_of(history).step}":
            path.unlink()


@torch.no_grad()
def restore_best(work: Path, student: nn.Module, step: int) -> None:
    """Put the parameters of `keep_best` at `step` back in place.

    Raises:
        UserError: they are not there, or damaged.
    """
    path = work / BEST_PATTERN.replace("*", str(step))
    try:
        tensors = load_file(path)
        for name, parameter in student.named_parameters():
            parameter.copy_(tensors[name])
    except (SafetensorError, OSError, KeyError, RuntimeError):
        raise UserError(
            f"{path}, the best student, cannot be read; remove {work} and train again"
        ) from None
