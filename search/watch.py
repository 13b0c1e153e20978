"""Signs of life of the workers that share a study.

Optuna sends heartbeats only from `Study.optimize`, which evaluates one trial at a time. Ours are
asked for in batches, so they are sent here, through the same interface of the storage.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Self

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import fail_stale_trials
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

from .storage import grace_seconds, open_storage, quiet


class Watch:
    """Signs of life of this worker's trials, and an eye on those of the others.

    It has a storage of its own: the study's has no heartbeat, since `ask` warns where it sees one.
    """

    def __init__(self, url: str, study: str, heartbeat: int) -> None:
        self._heartbeat, self._grace = heartbeat, grace_seconds(heartbeat)
        self._storage = open_storage(url, heartbeat)
        self._study = optuna.load_study(study_name=study, storage=self._storage)
        self._id = self._storage.get_study_id_from_name(study)
        self._mine: set[int] = set()  # numbers of trials
        self._first_seen: dict[int, float] = {}  # others' running trials
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._storage.engine.dispose()

    def begin(self, number: int) -> None:
        """Send signs of life of a trial from now on, the first at once."""
        self._mine.add(number)
        self._record(number)

    def end(self, number: int) -> None:
        """Send no more: the trial is over."""
        self._mine.discard(number)

    def sweep(self) -> None:
        """Fail the trials of workers that are dead; each is queued again."""
        for number in sorted(self._mine):  # should this process have slept, it is no less alive
            self._record(number)
        with quiet():
            fail_stale_trials(self._study)
        self._adopt()

    def others_open(self) -> bool:
        """Whether trials that are not this worker's are running or wait to be run."""
        states = (TrialState.RUNNING, TrialState.WAITING)
        trials = self._study.get_trials(deepcopy=False, states=states)
        return any(trial.number not in self._mine for trial in trials)

    def _adopt(self) -> None:
        """Send one sign of life for trials of others that may never have had any.

        A worker that dies between asking for a trial and its first heartbeat leaves one that would
        never go stale. Whoever was seen running for longer than the grace period is alive, or is
        such a one; a heartbeat does no harm to the first and starts the clock of the second.
        """
        now = time.monotonic()
        running = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        others = {trial.number for trial in running} - self._mine
        self._first_seen = {n: self._first_seen.get(n, now) for n in others}
        for number, since in self._first_seen.items():
            if now - since > self._grace:
                self._record(number)
                self._first_seen[number] = float("inf")

    def _record(self, number: int) -> None:
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._id, number)
        self._storage.record_heartbeat(trial_id)

    def _beat(self) -> None:
        while not self._stop.wait(self._heartbeat):
            for number in sorted(self._mine.copy()):
                # a database that is away for a moment; the worker itself will notice if it stays so
                with suppress(SQLAlchemyError, StorageInternalError):
                    self._record(number)
