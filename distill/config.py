"""Settings of a distillation, checked where they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from minipuzzle.errors import UserError


@dataclass(frozen=True)
class Settings:
    """How to train: `steps` steps of `batch` blocks each.

    `learning_rate` is the peak; it rises linearly over the first `warmup` share of the steps. With
    the schedule `cosine` it then falls along a cosine to `floor` times the peak; with `wsd`
    (warm-up, stable, decay; MiniCPM, arXiv:2404.06395, §4) it stays, and falls linearly to `floor`
    times the peak over the last `decay` share of the steps. `clip` bounds the norm of the whole
    gradient (0 switches it off). `checkpoint_every` and `evaluate_every` count steps, 0 is never.
    `micro` is the number of blocks whose activations exist at a time (0: all of a batch); it
    changes results by rounding only. The training ends early after `patience` evaluations without
    gain (0: never).

    Raises:
        UserError: a value is out of its range.
    """

    steps: int
    batch: int = 8
    learning_rate: float = 1e-4
    warmup: float = 0.1
    temperature: float = 1.0
    floor: float = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.0
    clip: float = 1.0
    micro: int = 0
    checkpoint_every: int = 0
    evaluate_every: int = 0
    seed: int = 0
    schedule: Literal["cosine", "wsd"] = "cosine"
    decay: float = 0.2
    patience: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "micro", "checkpoint_every", "evaluate_every", "patience"):
            self._require(getattr(self, name) >= 0, name, "at least 0")
        for name in ("weight_decay", "clip"):
            value = getattr(self, name)
            self._require(0 <= value < math.inf, name, "at least 0 and finite")
        for name in ("warmup", "floor", "decay"):
            self._require(0 <= getattr(self, name) <= 1, name, "between 0 and 1")
        for name in ("learning_rate", "temperature"):
            self._require(0 < getattr(self, name) < math.inf, name, "above 0 and finite")
        self._require(self.schedule in ("cosine", "wsd"), "schedule", "cosine or wsd")
        self._require(self.batch >= 1, "batch", "at least 1")
        self._require(all(0 <= beta < 1 for beta in self.betas), "betas", "at least 0 and below 1")

    def _require(self, holds: bool, name: str, rule: str) -> None:
        if not holds:
            raise UserError(f"distill.{name} must be {rule}, got {getattr(self, name)}")

    def learning_rate_at(self, step: int) -> float:
        """The rate of a step (0-based): linear warm-up, then half a cosine or a plateau and a line.

        The rate would reach the floor one step after the last.
        """
        rising = math.ceil(self.warmup * self.steps)
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        if self.schedule == "wsd":
            falling = math.ceil(self.decay * self.steps)
            above = min(1.0, (self.steps - step) / (falling + 1))
        else:
            done = (step - rising + 1) / (self.steps - rising + 1)
            above = 0.5 * (1 + math.cos(math.pi * done))
        return self.learning_rate * (self.floor + (1 - self.floor) * above)
