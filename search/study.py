"""The study: Optuna proposes points of the space, the judge says what they are worth.

Batches of trials are asked for, claimed (claims.py), judged together and told (worker.py). A study
in the run folder belongs to one process and is resumable to the same result: a batch that a kill
left unfinished is dropped and proposed again, and what was judged already is known from the claims.
In a storage that several workers share, the trials of a dead worker are queued again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from minipuzzle.errors import UserError
from minipuzzle.recipe import SearchConfig

from .claims import Claims
from .propose import LISTED, Proposer, SearchSpace
from .space import Point
from .storage import open_storage, quiet, storage_errors
from .trials import Judge, Judged, Trial
from .watch import Watch
from .worker import BATCH, Worker

__all__ = ["Judge", "Judged", "Trial", "search"]

NAME = "minipuzzle"
METRICS = {"kl": "KL (nats/token)", "memory": "memory (bytes)", "latency": "latency (s)"}
MADE_FOR, WHOLE = "made_for", "whole"  # user attributes of the study


def search(
    space: SearchSpace,
    judge: Judge,
    *,
    settings: SearchConfig,
    seed: int,
    storage: str,
    seeds: Sequence[Point],
    identity: Mapping[str, Any] | None = None,
    remind: Callable[[Point], None] | None = None,
) -> list[Trial]:
    """Evaluate up to `settings.trials` distinct points, in the order they were proposed.

    Args:
        space: where to look.
        judge: evaluates points, a batch at a time.
        settings: trials, timeout, batch, objectives, sampler, storage (None: `storage` is this
            process' alone) and heartbeat.
        seed: of the run; trial n is proposed with a sampler seeded by (seed, n).
        storage: an Optuna storage URL.
        seeds: points that are evaluated first.
        identity: name -> what values depend on beside the space ("model", "budget", ...); a study
            that was made for another is refused.
        remind: told before every batch which point is the best so far of those not screened, for
            judges that compare with it; after a resumption they have not seen it themselves.

    Raises:
        UserError: when the storage cannot be used or holds a study of something else.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    made_for = _made_for(space, settings, identity or {})
    own = settings.storage is None
    with storage_errors(storage):
        database = open_storage(storage, sync=not own)
        study = _open(database, settings, made_for)
        claims = Claims(database.engine, f"{NAME} {_digest(made_for)}")
        if own:
            study = _drop_unfinished(database, study, claims)
        watch = None if own else Watch(storage, NAME, settings.heartbeat)
        wanted = _wanted(space, settings.trials)
        worker = Worker(space, judge, settings, wanted, study, claims, watch, remind)
        study.sampler = Proposer(space, settings.sampler, seed, seeds, worker.tried)
        worker.run()
        found = worker.finished()
        database.engine.dispose()
        return found


def _wanted(space: SearchSpace, trials: int) -> int:
    """The wanted number of trials, or of the points of the space if they are fewer."""
    if space.cardinality > LISTED:
        return trials
    return sum(1 for _ in islice(space.points(), trials))


def _made_for(
    space: SearchSpace, settings: SearchConfig, identity: Mapping[str, Any]
) -> dict[str, str]:
    """Name -> hash of what the values of a study depend on."""
    parts = {
        "search space": [[p.name, *p.choices] for p in space.parameters],
        "objectives": settings.objectives,
        "proxies": [settings.blocks, settings.screen, settings.proxy],
        **identity,
    }
    return {name: _digest(part) for name, part in parts.items()}


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _open(storage: BaseStorage, settings: SearchConfig, made_for: dict[str, str]) -> optuna.Study:
    """The study of a storage, new or as it is.

    Raises:
        UserError: when it was made for something else.
    """
    study = optuna.create_study(
        storage=storage,
        study_name=NAME,
        directions=["minimize"] * len(settings.objectives),
        load_if_exists=True,
    )
    there = study.user_attrs.get(MADE_FOR)
    if there is None:
        with quiet():
            study.set_metric_names([METRICS[name] for name in settings.objectives])
        study.set_user_attr(MADE_FOR, made_for)
    elif there != made_for:
        names = {*there, *made_for}
        other = sorted(name for name in names if there.get(name) != made_for.get(name))
        raise UserError(
            f"the storage holds a study made with another {' and '.join(other)}; "
            "name another database with search.storage, or take the recipe it was made with"
        )
    return study


def _drop_unfinished(storage: BaseStorage, study: optuna.Study, claims: Claims) -> optuna.Study:
    """The study without the batch that a killed process left unfinished."""
    trials = study.get_trials()
    keep = _whole_batches(trials) if study.user_attrs.get(WHOLE) else 0
    claims.give_back(keep)
    if keep < len(trials):
        study = _first_trials(storage, study, keep)
    study.set_user_attr(WHOLE, True)
    return study


def _first_trials(storage: BaseStorage, study: optuna.Study, keep: int) -> optuna.Study:
    """The study anew with its first `keep` trials: Optuna deletes only whole studies."""
    trials, attributes = study.get_trials()[:keep], study.user_attrs
    names, directions = study.metric_names, study.directions
    optuna.delete_study(study_name=NAME, storage=storage)
    study = optuna.create_study(storage=storage, study_name=NAME, directions=directions)
    with quiet():
        study.set_metric_names(names)
    study.set_user_attr(MADE_FOR, attributes[MADE_FOR])
    for trial in trials:
        study.add_trial(trial)
    return study


def _whole_batches(trials: Sequence[FrozenTrial]) -> int:
    """Number of trials before the first batch with one that is not finished."""
    for trial in trials:
        if not trial.state.is_finished():
            first: int = trial.user_attrs.get(BATCH, trial.number)
            return first
    return len(trials)
