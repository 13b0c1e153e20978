"""One process that works on a study: asks for trials, claims their points, evaluates and tells."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from minipuzzle import progress
from minipuzzle.recipe import SearchConfig

from .claims import Claims, Standing
from .front import values
from .propose import SearchSpace, Tried, distributions
from .proxies import Proxies
from .space import Point
from .trials import Judge, Judged, Trial
from .watch import Watch

BATCH, RESULT = "batch", "result"  # user attributes of a trial: first one of its batch; its record
FREE_PROPOSALS = 8  # per trial of a batch: points that other workers are at
POLL_SECONDS = 0.5  # between looks at what the others do


@dataclass
class Worker:
    """Works on a study until `wanted` points are evaluated.

    `watch` is None where nobody else works on the study; `remind`: see `study.search`.
    """

    space: SearchSpace
    judge: Judge
    settings: SearchConfig
    wanted: int
    study: optuna.Study
    claims: Claims
    watch: Watch | None
    remind: Callable[[Point], None] | None
    running: dict[int, optuna.Trial] = field(default_factory=dict)  # asked and not told yet
    pending: dict[int, Point] = field(default_factory=dict)  # trial -> what others evaluate
    started: float = field(default_factory=time.monotonic)

    def run(self) -> None:
        """Work until nothing is left to do."""
        watching: AbstractContextManager[Any] = self.watch or nullcontext()
        with watching, progress.bar("search", self.wanted, "trials") as bar:
            shown = 0
            while True:
                if self.watch is not None:
                    self.watch.sweep()
                late = self._late()
                batch = {} if late else self._gather()
                if batch:
                    self._evaluate(batch)
                found = self.finished()
                bar.advance(len(found) - shown)
                shown = len(found)
                bar.note(_best_note(found))
                if not batch:
                    if late or not self._must_wait():
                        break
                    time.sleep(min(POLL_SECONDS, self.settings.heartbeat))
            for number in list(self.pending):
                self._tell(number, TrialState.FAIL)

    def finished(self) -> list[Trial]:
        """All points with a value, of all workers, by the number of their trial."""
        found = [
            _trial(self.space, claim.owner, claim.point, claim.value)
            for claim in self.claims.all()
            if claim.value is not None
        ]
        usable = [trial for trial in found if math.isfinite(trial.proxies.kl)]
        return sorted(usable, key=lambda trial: trial.number)

    def tried(self) -> Tried:
        """What the sampler should know."""
        claims = self.claims.all()
        told = {trial.number for trial in _trials(self.study, TrialState.COMPLETE)}
        known = [(c.value["kl"], c.point) for c in claims if c.value and c.owner in told]
        good = [point for _, point in sorted(known, key=lambda pair: (pair[0], pair[1].key))]
        return Tried({claim.point.key for claim in claims}, good)

    def _late(self) -> bool:
        limit = self.settings.timeout
        if limit is None or time.monotonic() - self.started < limit:
            return False
        return any(claim.value is not None for claim in self.claims.all())

    def _gather(self) -> dict[int, Point]:
        """Trial -> point: new points whose claims are this worker's, to be evaluated next."""
        batch: dict[int, Point] = {}
        for number, point in list(self.pending.items()):
            self._sort_out(number, point, Standing.PENDING, batch)
        first = None
        for _ in range(FREE_PROPOSALS * self.settings.batch):
            if len(batch) == self.settings.batch or not self._more():
                break
            with suppress(UpdateFinishedTrialError):  # by others, who took this worker for dead
                trial = self._ask()
                first = trial.number if first is None else first
                trial.set_user_attr(BATCH, first)
                self._claim(trial, batch)
        return batch

    def _ask(self) -> optuna.Trial:
        trial = self.study.ask(fixed_distributions=distributions(self.space))
        self.running[trial.number] = trial
        if self.watch is not None:
            self.watch.begin(trial.number)
        return trial

    def _more(self) -> bool:
        """Whether there is something to ask for: a new point, or one that was queued again."""
        if self.claims.count() < self.wanted:
            return True
        return self.watch is not None and bool(_trials(self.study, TrialState.WAITING))

    def _claim(self, trial: optuna.Trial, batch: dict[int, Point]) -> None:
        point = self.space.fitting(self.space.canonical(trial.params))
        if point is None:  # half of it comes from a worker that died while it proposed
            self._tell(trial.number, TrialState.PRUNED)
            return
        standing = self.claims.take(point, trial.number, self.wanted)
        self._sort_out(trial.number, point, standing, batch)

    def _sort_out(
        self, number: int, point: Point, standing: Standing, batch: dict[int, Point]
    ) -> None:
        """Evaluate, tell or wait for what a trial proposes."""
        self.pending.pop(number, None)
        if standing is Standing.WON:
            batch[number] = point
        elif standing is Standing.FULL:
            self._tell(number, TrialState.PRUNED)
        elif (value := self.claims.value(point)) is not None:
            self._tell_value(number, point, value)
        elif self._take_over(number, point):
            batch[number] = point
        else:
            self.pending[number] = point

    def _take_over(self, number: int, point: Point) -> bool:
        """Make the trial the owner of a claim whose own trial is over without a value."""
        owner = self.claims.owner(point)
        trials = {trial.number: trial for trial in _trials(self.study)}
        if owner is None or owner not in trials or not trials[owner].state.is_finished():
            return False
        return self.claims.take_over(point, owner, number)

    def _evaluate(self, batch: dict[int, Point]) -> None:
        """Judge a batch; after an interruption its values may be there already."""
        new = [point for point in batch.values() if self.claims.value(point) is None]
        if new:
            self._remind()
            judged = self.judge(new)
            self.claims.settle([(p, _value(j)) for p, j in zip(new, judged, strict=True)])
        for number, point in batch.items():
            value = self.claims.value(point)
            assert value is not None
            self._tell_value(number, point, value)

    def _remind(self) -> None:
        whole = [trial for trial in self.finished() if not trial.screened]
        if self.remind is not None and whole:
            self.remind(min(whole, key=lambda t: (t.proxies.kl, t.number)).point)

    def _tell_value(self, number: int, point: Point, value: Mapping[str, Any]) -> None:
        trial = _trial(self.space, number, point, value)
        if not math.isfinite(trial.proxies.kl):
            self._tell(number, TrialState.FAIL)
            return
        with suppress(UpdateFinishedTrialError):
            self.running[number].set_user_attr(RESULT, trial.to_json())
        self._tell(number, TrialState.COMPLETE, values(trial, self.settings.objectives))

    def _tell(self, number: int, state: TrialState, found: Sequence[float] | None = None) -> None:
        """End a trial; one that others gave up as dead stays what they made of it."""
        self.pending.pop(number, None)
        with suppress(UpdateFinishedTrialError):
            self.study.tell(self.running.pop(number), found, state=state, skip_if_finished=True)
        if self.watch is not None:
            self.watch.end(number)

    def _must_wait(self) -> bool:
        """Whether others are at something that may come to this worker yet."""
        if self.watch is None:
            return bool(self.pending)
        unsettled = [claim for claim in self.claims.all() if claim.value is None]
        trials = _trials(self.study)
        over = {trial.number for trial in trials if trial.state.is_finished()}
        queued = [self.space.canonical(t.params) for t in trials if _is_queued(t)]
        for claim in unsettled:
            if claim.owner in over and claim.point not in queued:
                self._queue(claim.point)
        return bool(unsettled or self.pending) or self.watch.others_open()

    def _queue(self, point: Point) -> None:
        """Queue a point whose trial is dead, and whose retry was lost with the next worker."""
        trial = optuna.create_trial(
            state=TrialState.WAITING,
            params=point.to_json(),
            distributions=distributions(self.space),
        )
        self.study.add_trial(trial)


def _is_queued(trial: FrozenTrial) -> bool:
    return trial.state is TrialState.WAITING and bool(trial.params)


def _trials(study: optuna.Study, *states: TrialState) -> list[FrozenTrial]:
    found: list[FrozenTrial] = study.get_trials(deepcopy=False, states=states or None)
    return found


def _value(judged: Judged) -> dict[str, Any]:
    return {**asdict(judged.proxies), "screened": judged.screened}


def _trial(space: SearchSpace, number: int, point: Point, value: Mapping[str, Any]) -> Trial:
    proxies = Proxies(value["kl"], value["accuracy"], value["agreement"], value["blocks"])
    return Trial(number, point, space.costs(point), proxies, value["screened"])


def _best_note(trials: Sequence[Trial]) -> str:
    best = min((trial.proxies.kl for trial in trials), default=None)
    return "" if best is None else f"KL {best:.4f}"
