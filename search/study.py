"""The study: Optuna proposes points of the space, the proxies judge them.

Resumable to the same result: a trial's seed comes from its number, the sampler is made anew for
each trial, and a trial that a kill left unfinished is dropped and proposed again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna

from minipuzzle import progress
from minipuzzle.architecture import KINDS

from .proxies import Proxies
from .space import Point, Space

NAME = "minipuzzle"
PROPOSALS_PER_TRIAL = 8  # proposals that repeat a point or do not fit are free, up to this many
SEEDED_SHARE = 0.6  # of the trials go to the frontier's points with the fewest removed layers


@dataclass(frozen=True)
class Trial:
    """A point that was evaluated."""

    number: int
    point: Point
    memory_bytes: int
    proxies: Proxies

    def to_json(self) -> dict[str, Any]:
        """A flat record for trials.json."""
        return {
            "number": self.number,
            "removed": dict(self.point.removed),
            "width": self.point.width,
            "memory_bytes": self.memory_bytes,
            **asdict(self.proxies),
        }


def search(
    space: Space,
    judge: Callable[[Point], Proxies],
    *,
    trials: int,
    seed: int,
    storage: str,
) -> list[Trial]:
    """Evaluate up to `trials` distinct points under the budget, in the order they were proposed.

    Args:
        space: where to look.
        judge: evaluates a point; the study minimises its KL.
        trials: distinct points to evaluate.
        seed: of the run; trial n is proposed with a sampler seeded by (seed, n).
        storage: an Optuna storage URL.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = reopen(storage)
    frontier = list(space.frontier())
    seeds = frontier[: max(1, round(trials * SEEDED_SHARE))]
    done = {trial.point: trial for trial in finished(study)}
    wanted = min(trials, _size(space))
    with progress.bar("search", wanted, "trials") as bar:
        bar.advance(len(done))
        while len(done) < wanted and len(study.trials) < PROPOSALS_PER_TRIAL * trials:
            known = len(done)
            _one_trial(study, space, judge, done, seeds, seed)
            bar.advance(len(done) - known)
            best = min(done.values(), key=lambda t: t.proxies.kl, default=None)
            bar.note(f"KL {best.proxies.kl:.4f}" if best else "")
    return list(done.values())


def _one_trial(
    study: optuna.Study,
    space: Space,
    judge: Callable[[Point], Proxies],
    done: dict[Point, Trial],
    seeds: list[Point],
    seed: int,
) -> None:
    number = len(study.trials)
    study.sampler = optuna.samplers.TPESampler(seed=seed * 100_003 + number)
    if number < len(seeds):
        study.enqueue_trial(dict(seeds[number].removed) | {"narrower": 0})
    trial = study.ask()
    point = propose(trial, space)
    if point is None:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        return
    if point not in done:
        done[point] = Trial(number, point, space.memory_bytes(point), judge(point))
    found = done[point]
    # one attribute, one commit: SQLite waits for the disk at every one
    trial.set_user_attr("result", {"point": asdict(point), **found.to_json()})
    study.tell(trial, found.proxies.kl)


def propose(trial: optuna.Trial, space: Space) -> Point | None:
    """A point under the budget, or None when no width fits what the trial removes."""
    mamba, attention, ffn = (trial.suggest_int(k, 0, space.limits[k]) for k in KINDS)
    widths = space.fitting_widths(mamba, attention, ffn)
    if not widths:
        return None
    # The range depends on the removals: it holds the widths just under the budget.
    index = trial.suggest_int("narrower", 0, len(widths) - 1)
    return Point(mamba, attention, ffn, widths[-1 - index])


def _size(space: Space) -> int:
    """Number of distinct points that can be proposed."""
    return sum(
        len(space.fitting_widths(point.mamba, point.attention, point.ffn))
        for point in space.frontier()
    )


def finished(study: optuna.Study) -> list[Trial]:
    """Distinct evaluated points of a study, in order."""
    trials: dict[Point, Trial] = {}
    for frozen in study.get_trials(states=[optuna.trial.TrialState.COMPLETE]):
        result = frozen.user_attrs["result"]
        point = Point(**result["point"])
        proxies = Proxies(result["kl"], result["accuracy"], result["agreement"])
        trials.setdefault(point, Trial(result["number"], point, result["memory_bytes"], proxies))
    return list(trials.values())


def reopen(storage: str) -> optuna.Study:
    """The study of a storage, without trials that a killed process left unfinished."""
    over = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    study = optuna.create_study(storage=storage, study_name=NAME, load_if_exists=True)
    trials = study.get_trials()
    if all(trial.state in over for trial in trials):
        return study
    optuna.delete_study(study_name=NAME, storage=storage)
    study = optuna.create_study(storage=storage, study_name=NAME)
    for trial in trials:
        if trial.state not in over:
            break
        study.add_trial(trial)
    return study


def sqlite_url(path: Path) -> str:
    """The storage URL of a database file."""
    return f"sqlite:///{path.absolute()}"
