"""The space, the study and its resumption."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
import torch

from minipuzzle import families, model
from minipuzzle.errors import UserError
from minipuzzle.memory import Deployment, memory
from minipuzzle.prune import score
from minipuzzle.prune.slice import slice_checkpoint
from minipuzzle.recipe import MaxRemoved, SearchConfig
from minipuzzle.scores import Scores
from minipuzzle.search.proxies import Proxies, ProxyEvaluator
from minipuzzle.search.space import Point, Space, make_space
from minipuzzle.search.study import reopen, search, sqlite_url
from minipuzzle.search.tournament import finalists
from tests.tiny import CONFIG, write_tiny

IDS = torch.randint(0, 97, (4, 24), generator=torch.Generator().manual_seed(6))
SETTINGS = SearchConfig(width_step=8, max_removed=MaxRemoved(mamba=1, attention=0, ffn=2))


def space_at(share: float, settings: SearchConfig = SETTINGS) -> Space:
    family, architecture = families.read(CONFIG)
    at = Deployment(context=16)
    budget = int(share * memory(architecture, family, at).total)
    return make_space(architecture, family, at, budget, settings)


def test_memory_of_a_point_is_that_of_the_model_cut_by_it(tmp_path: Path) -> None:
    teacher = model.load(write_tiny(tmp_path / "tiny"))
    scores = score.score(teacher, IDS, {})
    space = space_at(0.85)
    for point in space.frontier():
        cut = space.selection(point, scores).apply(teacher.architecture)
        real = memory(cut, teacher.family, space.deployment).total
        assert space.memory_bytes(point) == real <= space.budget_bytes
        wider = [w for w in space.widths if w > point.width]
        if wider:
            next_one = Point(point.mamba, point.attention, point.ffn, wider[0])
            assert space.memory_bytes(next_one) > space.budget_bytes


def test_impossible_and_needless_budgets_are_refused() -> None:
    with pytest.raises(UserError, match="cannot be reached: the smallest"):
        space_at(0.2)
    with pytest.raises(UserError, match="lower the budget"):
        space_at(1.0)


def judge(point: Point) -> Proxies:
    """A made-up landscape whose best point is not among the seeds."""
    kl = abs(point.mamba - 1) + 0.3 * abs(point.ffn - 2) + point.width / 1000
    return Proxies(kl=kl, accuracy=0.5, agreement=0.5)


def test_a_killed_study_goes_on_to_the_same_trials(tmp_path: Path) -> None:
    space = space_at(0.7)
    whole = search(space, judge, trials=8, seed=3, storage=sqlite_url(tmp_path / "a.db"))
    assert len({trial.point for trial in whole}) == len(whole) > 4
    assert all(trial.memory_bytes <= space.budget_bytes for trial in whole)

    calls = 0

    def dies(point: Point) -> Proxies:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return judge(point)

    url = sqlite_url(tmp_path / "b.db")
    with pytest.raises(KeyboardInterrupt):
        search(space, dies, trials=8, seed=3, storage=url)
    left = [trial.state for trial in optuna.load_study(study_name="minipuzzle", storage=url).trials]
    assert optuna.trial.TrialState.RUNNING in left
    assert search(space, judge, trials=8, seed=3, storage=url) == whole
    assert search(space, judge, trials=8, seed=3, storage=url) == whole
    assert all(trial.state.is_finished() for trial in reopen(url).trials)


def test_proxies_are_those_of_the_cut_checkpoint(tmp_path: Path) -> None:
    teacher = model.load(write_tiny(tmp_path / "tiny"))
    scores: Scores = score.score(teacher, IDS, {})
    evaluate = ProxyEvaluator(teacher, IDS)
    space = space_at(0.7)
    selection = space.selection(next(space.frontier()), scores)
    slice_checkpoint(teacher.folder, tmp_path / "cut", selection)
    with torch.no_grad():
        ours = model.load(tmp_path / "cut").module(IDS, use_cache=False).logits.log_softmax(-1)
        theirs = teacher.module(IDS, use_cache=False).logits.log_softmax(-1)
    found = evaluate(selection)
    kl = float((theirs.exp() * (theirs - ours)).sum(-1).mean())
    assert found.kl == pytest.approx(kl, rel=1e-3)
    right = (ours[:, :-1].argmax(-1) == IDS[:, 1:]).float().mean()
    assert found.accuracy == pytest.approx(float(right), abs=1e-6)
    same = (ours.argmax(-1) == theirs.argmax(-1)).float().mean()
    assert found.agreement == pytest.approx(float(same), abs=0.011)
    whole = evaluate(type(selection).identity(teacher.architecture))
    assert whole.kl == pytest.approx(0, abs=1e-6) and whole.agreement == 1


def test_finalists_differ_in_layers(tmp_path: Path) -> None:
    space = space_at(0.7)
    trials = search(space, judge, trials=12, seed=0, storage=sqlite_url(tmp_path / "s.db"))
    chosen = finalists(trials, 3)
    assert len({tuple(trial.point.removed.items()) for trial in chosen}) == len(chosen) > 1
    assert chosen[0].proxies.kl == min(trial.proxies.kl for trial in trials)
