"""Who stands where in a tournament: the record of every finalist, on disk, and their ranks."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from minipuzzle import progress
from minipuzzle.files import atomic_write_json, read_json
from minipuzzle.selection import Selection

if TYPE_CHECKING:
    from .trials import Trial

Record = dict[str, Any]


def start_record(trial: Trial, selection: Selection) -> Record:
    """What is known of a finalist before it plays."""
    layers = [
        None if axes is None else {axis: len(kept) for axis, kept in axes.items()}
        for axes in selection.layers
    ]
    record = {**trial.to_json(), "layers": layers, "rungs": [], "ranks": {"proxy": 1}}
    if selection.hidden is not None:
        record["hidden"] = len(selection.hidden)
    return record


@dataclass
class Finalist:
    """A candidate that plays: what is cut for it, its models and its record, both on disk."""

    trial: Trial
    selection: Selection
    work: Path
    record: Record = field(init=False)

    def __post_init__(self) -> None:
        fresh = start_record(self.trial, self.selection)
        found = read_json(self.path) or {}
        if found.get("layers") == fresh["layers"]:
            self.record = found | {"ranks": {}}  # given anew, for others may play this time
        else:
            self.record = fresh
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def number(self) -> int:
        """That of the trial."""
        return self.trial.number

    @property
    def path(self) -> Path:
        """Of the record."""
        return self.work / f"{self.number}.json"

    @property
    def folder(self) -> Path:
        """Of its models and its training."""
        return self.work / str(self.number)

    def note(self, **values: Any) -> None:
        """Add to the record."""
        self.record |= values
        atomic_write_json(self.path, self.record)

    def after(self, steps: int) -> Record | None:
        """What it was after a rung; None where it did not get so far."""
        return next((rung for rung in self.record["rungs"] if rung["steps"] == steps), None)


def value_after(player: Finalist, steps: int) -> float:
    """The KL after a rung."""
    found = player.after(steps)
    assert found is not None
    return float(found["kl"])


def task_mean(record: Record) -> float:
    """Accuracy over tasks, all counting the same."""
    return fmean(record["tasks"].values())


def note_ranks(ranked: Sequence[Finalist], column: str) -> None:
    """Write the places, the best is 1, into the records of finalists in their order."""
    for place, player in enumerate(ranked, 1):
        player.note(ranks={**player.record["ranks"], column: place})


def rank_table(records: Sequence[Record]) -> str:
    """Ranks from the proxy to the last round, the best finalist first."""
    columns = max((list(record["ranks"]) for record in records), key=len)
    tasks = any("tasks" in record for record in records)
    rows = []
    for record in records:
        last = record["rungs"][-1]["kl"] if record["rungs"] else record["repaired"]["kl"]
        row = [f"#{record['number']}", *(str(record["ranks"].get(c, "-")) for c in columns)]
        row.append(f"{last:.4f}")
        if tasks:
            row.append(f"{100 * task_mean(record):.1f} %" if "tasks" in record else "-")
        rows.append(row)
    headers = ["finalist", *columns, "last KL"] + (["accuracy"] if tasks else [])
    return progress.table(headers, rows)
