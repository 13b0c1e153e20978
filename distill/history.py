"""What a training went through, step by step, in memory and as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from minipuzzle.errors import UserError
from minipuzzle.files import atomic_write_text, disk_full_is_a_user_error

HISTORY_FILE = "history.jsonl"


@dataclass(frozen=True)
class Step:
    """Step number `step` (0-based): loss of its batch before the update, rate, gradient norm.

    The loss is the mean KL times temperature squared, in nats; the norm is that of the whole
    gradient before clipping.
    """

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float


@dataclass(frozen=True)
class Evaluation:
    """Means over held-out tokens after `step` steps.

    `kl` is KL(teacher || student) at temperature 1 and `loss` the next-token loss, both in nats;
    `agreement` is the share of positions where both have the same most likely next token.
    """

    step: int
    kl: float
    agreement: float
    loss: float


@dataclass(frozen=True)
class Halving:
    """Memory ran out at step `step`: from there on at most `micro` blocks at a time."""

    step: int
    micro: int


Entry = Step | Evaluation | Halving


@dataclass
class History:
    """All that happened in order; with a path, every entry is written when it happens."""

    steps: list[Step] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    halvings: list[Halving] = field(default_factory=list)
    path: Path | None = None

    @property
    def losses(self) -> list[float]:
        """Loss of each step."""
        return [step.loss for step in self.steps]

    @property
    def learning_rates(self) -> list[float]:
        """Learning rate of each step."""
        return [step.learning_rate for step in self.steps]

    def micro_at(self, step: int) -> int:
        """Blocks at a time that memory allows at a step; 0: nothing is known against a batch."""
        return min((h.micro for h in self.halvings if h.step <= step), default=0)

    def add(self, entry: Entry) -> None:
        """Append one entry, to the file as well. UserError when the disk is full."""
        self._keep(entry)
        if self.path is not None:
            with (
                disk_full_is_a_user_error(self.path),
                self.path.open("a", encoding="utf-8") as file,
            ):
                file.write(_line(entry))

    @classmethod
    def resume(cls, path: Path | None, done: int) -> History:
        """The entries in `path` made before step `done`; the file is cut back to them.

        What a killed run wrote after its last checkpoint will be written again, and a last line
        it did not finish is no entry. Halvings stay: the steps after them are to give the same
        bits again, whether or not memory is short this time.

        Raises:
            UserError: the file lacks some of these steps.
        """
        if path is None:
            return cls()
        history = cls(path=path)
        read = list(_read(path)) if path.exists() else []
        kept = [entry for entry in read if isinstance(entry, Halving) or entry.step < done]
        for entry in kept:
            history._keep(entry)
        if len(history.steps) != done:
            raise UserError(
                f"{path} lacks steps before {done}, where the checkpoint beside it goes on; "
                f"remove {path.parent}"
            )
        atomic_write_text(path, "".join(map(_line, kept)), sync=False)
        return history

    def _keep(self, entry: Entry) -> None:
        if isinstance(entry, Step):
            self.steps.append(entry)
        elif isinstance(entry, Evaluation):
            self.evaluations.append(entry)
        else:
            self.halvings.append(entry)


def read_history(path: Path) -> History:
    """A history written earlier (`history.jsonl` of an artefact)."""
    history = History()
    for entry in _read(path):
        history.add(entry)
    return history


_KINDS: dict[str, Callable[..., Entry]] = {
    "step": Step,
    "evaluation": Evaluation,
    "halving": Halving,
}


def _line(entry: Entry) -> str:
    kind = next(name for name, made in _KINDS.items() if made is type(entry))
    return json.dumps({"kind": kind, **asdict(entry)}) + "\n"


def _read(path: Path) -> Iterator[Entry]:
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            return
        values: dict[str, Any] = json.loads(line)
        yield _KINDS[values.pop("kind")](**values)
