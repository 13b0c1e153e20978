"""What the study tries next: an Optuna sampler that proposes only new points within the limits.

Limits are known functions, so nothing has to be learned about them: whatever the inner sampler
draws is snapped to the choices and narrowed until it fits, and drawn again if it was tried before.
Trials therefore hold the parameters of what was really evaluated.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, Protocol

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from .costs import Costs
from .space import Parameter, Point

DRAWS = {"tpe": 16, "random": 16, "gp": 2}  # before a neighbour of a good point is taken
RANDOM_DRAWS = 256  # when good points have no new neighbour, in a space too large to go through
LISTED = 20_000  # combinations of a space that is gone through
AUTO = "tpe"  # what `auto` means
STARTUP = 10  # random points before a model is fitted


class SearchSpace(Protocol):
    """What the study asks of a `Space`."""

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """All decisions."""

    @property
    def cardinality(self) -> int:
        """Number of combinations, whether they fit or not."""

    def canonical(self, values: Mapping[str, int]) -> Point:
        """The point of these values."""

    def fitting(self, point: Point) -> Point | None:
        """The point, narrowed until it fits."""

    def costs(self, point: Point) -> Costs:
        """What a point costs."""

    def points(self) -> Iterator[Point]:
        """All distinct points that fit."""


def distributions(space: SearchSpace) -> dict[str, BaseDistribution]:
    """Parameter -> the grid that holds its choices."""
    found = {}
    for parameter in space.parameters:
        low, high = parameter.choices[0], parameter.choices[-1]
        step = math.gcd(*(choice - low for choice in parameter.choices)) or 1
        found[parameter.name] = IntDistribution(low, high, step=step)
    return found


@dataclass
class Tried:
    """What the study knows when it proposes: keys of points, and good points, the best first."""

    keys: AbstractSet[str] = frozenset()
    good: Sequence[Point] = field(default_factory=list)


class Proposer(BaseSampler):  # type: ignore[misc]  # optuna is not type-checked here
    """Proposes seeds, then what an inner sampler draws; the same for the same trial and history.

    The inner sampler is made anew for every trial with a seed from the trial's number, so that it
    does not matter in which process, and after how many interruptions, the trial is proposed.
    """

    def __init__(
        self,
        space: SearchSpace,
        kind: str,
        seed: int,
        seeds: Sequence[Point],
        tried: Callable[[], Tried],
    ) -> None:
        self._space, self._seed = space, seed
        self._kind = AUTO if kind == "auto" else kind
        self._seeds = list(_fitting(space, seeds))
        self._tried = tried
        self._grid = distributions(space)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """All parameters, from the first trial on."""
        return self._grid

    def sample_relative(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        """The parameters of a new point; of a known one where the space has no other left."""
        if trial.params.keys() >= search_space.keys():  # queued: what a dead worker left
            return {name: trial.params[name] for name in search_space}
        tried = self._tried()
        for point in self._seeds:
            if point.key not in tried.keys:
                return point.to_json()
        return self._propose(study, trial, tried).to_json()

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Never called: all parameters are sampled together."""
        raise AssertionError(param_name)

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Nothing: there is no state."""

    def _propose(self, study: optuna.Study, trial: FrozenTrial, tried: Tried) -> Point:
        seed = self._seed * 100_003 + trial.number
        rng = random.Random(seed)
        inner, copy = _inner(self._kind, seed), _copy(study, self._grid)
        number = copy.ask().number
        copied = copy.get_trials(deepcopy=False)[number]
        for _ in range(DRAWS[self._kind]):
            values = inner.sample_relative(copy, copied, self._grid)
            drawn = self._snapped(values) if values else self._random(rng)
            fits = self._space.fitting(drawn)
            if fits is not None and fits.key not in tried.keys:
                return fits
        found = self._neighbour(tried, rng) or self._elsewhere(tried, rng)
        return found or self._random(rng)

    def _snapped(self, values: Mapping[str, Any]) -> Point:
        """The nearest choices."""
        return self._space.canonical(
            {
                p.name: min(p.choices, key=lambda choice: abs(choice - values[p.name]))
                for p in self._space.parameters
            }
        )

    def _random(self, rng: random.Random) -> Point:
        return self._space.canonical(
            {p.name: rng.choice(p.choices) for p in self._space.parameters}
        )

    def _neighbour(self, tried: Tried, rng: random.Random) -> Point | None:
        """A new point one step away from a good one, the best first."""
        for point in tried.good:
            near = [p for p in self._around(point) if p.key not in tried.keys]
            if near:
                return rng.choice(near)
        return None

    def _around(self, point: Point) -> Iterator[Point]:
        values = point.to_json()
        for parameter in self._space.parameters:
            at = parameter.choices.index(values[parameter.name])
            for beside in (at - 1, at + 1):
                if 0 <= beside < len(parameter.choices):
                    moved = {**values, parameter.name: parameter.choices[beside]}
                    fits = self._space.fitting(self._space.canonical(moved))
                    if fits is not None:
                        yield fits

    def _elsewhere(self, tried: Tried, rng: random.Random) -> Point | None:
        """Any new point."""
        if self._space.cardinality <= LISTED:
            left = [point for point in self._space.points() if point.key not in tried.keys]
            return rng.choice(left) if left else None
        for _ in range(RANDOM_DRAWS):
            fits = self._space.fitting(self._random(rng))
            if fits is not None and fits.key not in tried.keys:
                return fits
        return None


def _copy(study: optuna.Study, grid: Mapping[str, BaseDistribution]) -> optuna.Study:
    """The study in memory: samplers write down and read again all that they draw."""
    copy = optuna.create_study(directions=study.directions)
    states = TrialState.COMPLETE, TrialState.RUNNING
    for trial in study.get_trials(deepcopy=False, states=states):
        if trial.params.keys() >= grid.keys():
            copy.add_trial(trial)
    return copy


def _fitting(space: SearchSpace, seeds: Sequence[Point]) -> Iterator[Point]:
    for point in seeds:
        fits = space.fitting(space.canonical(point.to_json()))
        if fits is not None:
            yield fits


def _inner(kind: str, seed: int) -> BaseSampler:
    if kind == "random":
        return RandomSampler(seed=seed)
    if kind == "gp":
        return GPSampler(seed=seed, n_startup_trials=STARTUP)
    return TPESampler(seed=seed, n_startup_trials=STARTUP, multivariate=True)
