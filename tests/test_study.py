"""The study: what it proposes, when it stops, and its resumption."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipuzzle.errors import UserError
from minipuzzle.recipe import SearchConfig
from minipuzzle.search.costs import Costs
from minipuzzle.search.front import front, values
from minipuzzle.search.propose import distributions
from minipuzzle.search.proxies import Proxies
from minipuzzle.search.space import Parameter, Point
from minipuzzle.search.storage import open_storage, sqlite_url
from minipuzzle.search.study import Judge, Judged, Trial, search
from tests.table_space import PARAMETERS, TableSpace, divergence, judge

pytestmark = pytest.mark.filterwarnings("error")
SPACE = TableSpace()


def run(
    path: Path, judge: Judge = judge, seeds: Sequence[Point] = (), **settings: Any
) -> list[Trial]:
    config = SearchConfig(**{"trials": 20, "batch": 4, **settings})
    return search(SPACE, judge, settings=config, seed=3, storage=sqlite_url(path), seeds=seeds)


def study_of(path: Path) -> optuna.Study:
    return optuna.load_study(study_name="minipuzzle", storage=sqlite_url(path))


@pytest.mark.parametrize("sampler", ["tpe", "random", "gp"])
def test_every_trial_is_a_new_point_within_the_budget(tmp_path: Path, sampler: str) -> None:
    calls: list[int] = []

    def counting(points: Sequence[Point]) -> list[Judged]:
        calls.append(len(points))
        return judge(points)

    trials = run(tmp_path / "s.db", counting, sampler=sampler, trials=14)
    assert len({trial.point.key for trial in trials}) == len(trials) == sum(calls) == 14
    assert calls == [4, 4, 4, 2]
    assert all(SPACE.fitting(trial.point) == trial.point for trial in trials)
    assert [trial.number for trial in trials] == sorted(trial.number for trial in trials)
    assert all(trial.proxies.kl == divergence(trial.point) for trial in trials)
    told = {trial.number: trial for trial in study_of(tmp_path / "s.db").trials}
    for trial in trials:  # what a dashboard shows
        assert told[trial.number].params == trial.point.to_json()
        assert told[trial.number].user_attrs["result"] == trial.to_json()
        assert told[trial.number].value == trial.proxies.kl


def test_seeds_come_first_each_once_and_narrowed_until_they_fit(tmp_path: Path) -> None:
    whole = SPACE.canonical({p.name: p.choices[0] for p in PARAMETERS} | {"width": 672})
    least = SPACE.canonical({p.name: p.choices[-1] for p in PARAMETERS} | {"width": 168})
    tight = SPACE.canonical(
        {"removed.mamba": 2} | {p.name: 1 for p in PARAMETERS[1:3]} | {"width": 672}
    )
    assert SPACE.fitting(tight) != tight
    trials = run(tmp_path / "s.db", seeds=[whole, least, tight, least], trials=6)
    fits = [SPACE.fitting(point) for point in (whole, least, tight)]
    assert [trial.point for trial in trials[:3]] == fits and trials[3].point not in fits


def test_it_stops_when_the_space_is_exhausted(tmp_path: Path) -> None:
    small = TableSpace(parameters=(*(Parameter(p.name, p.choices[-2:]) for p in PARAMETERS),))
    there = set(small.points())
    config = SearchConfig(trials=50, batch=4)
    for sampler in ("tpe", "gp"):
        config = SearchConfig(trials=50, batch=4, sampler=sampler)
        url = sqlite_url(tmp_path / f"{sampler}.db")
        trials = search(small, judge, settings=config, seed=0, storage=url, seeds=())
        assert {trial.point for trial in trials} == there


def test_the_default_sampler_finds_one_of_the_best(tmp_path: Path) -> None:
    ranked = sorted(SPACE.points(), key=divergence)
    best = {point.key for point in ranked[: len(ranked) // 100]}
    assert len(ranked) > 500 and len(best) > 4
    for seed in range(2):
        config = SearchConfig(trials=len(ranked) // 10, batch=8)
        url = sqlite_url(tmp_path / f"{seed}.db")
        trials = search(SPACE, judge, settings=config, seed=seed, storage=url, seeds=())
        assert any(trial.point.key in best for trial in trials)


def test_the_time_limit_ends_it_after_a_batch(tmp_path: Path) -> None:
    assert len(run(tmp_path / "s.db", timeout=1e-6)) == 4


def dying(after: int, then: Callable[[], None] = lambda: None) -> tuple[Judge, list[Point]]:
    """A judge that is interrupted at its call `after`, and what it has judged."""
    seen: list[Point] = []
    calls = 0

    def judge_or_die(points: Sequence[Point]) -> list[Judged]:
        nonlocal calls
        calls += 1
        if calls == after:
            raise KeyboardInterrupt
        seen.extend(points)
        return judge(points)

    return judge_or_die, seen


@pytest.mark.parametrize(("sampler", "trials"), [("tpe", 20), ("gp", 14)])
def test_a_killed_study_goes_on_to_the_same_trials(
    tmp_path: Path, sampler: str, trials: int
) -> None:
    options: dict[str, Any] = {"sampler": sampler, "trials": trials}
    whole = run(tmp_path / "a.db", **options)
    path = tmp_path / "b.db"
    judges: list[Point] = []
    for after in (1, 2, 3):
        dies, seen = dying(after)
        with pytest.raises(KeyboardInterrupt):
            run(path, dies, **options)
        judges += seen
        assert not all(trial.state.is_finished() for trial in study_of(path).trials)
    last, seen = dying(0)
    assert run(path, last, **options) == whole == run(path, last, **options)
    judges += seen
    assert len(judges) == len(set(judges)) == len(whole)  # nothing was judged twice
    assert all(trial.state.is_finished() for trial in study_of(path).trials)


@pytest.mark.parametrize("stop", range(0, 60, 7))
def test_killed_between_two_writes_it_goes_on_to_the_same_trials(
    tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every trial is written in several steps; `stop` of them are done before the kill."""
    whole = run(tmp_path / "a.db", trials=9)
    left = stop
    real = optuna.storages.RDBStorage.set_trial_state_values

    def dies(*arguments: Any, **named: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    path = tmp_path / "b.db"
    judged: list[Point] = []

    def judging(points: Sequence[Point]) -> list[Judged]:
        judged.extend(points)
        return judge(points)

    with monkeypatch.context() as patch:
        patch.setattr(optuna.storages.RDBStorage, "set_trial_state_values", dies)
        while True:
            try:
                run(path, judging, trials=9)
                break
            except KeyboardInterrupt:
                stop = left = stop + 2
    assert run(path, judging, trials=9) == whole
    assert len(judged) == len(set(judged)) == 9


def test_a_study_whose_dropping_was_interrupted_starts_anew_with_what_it_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path / "a.db")
    path = tmp_path / "b.db"
    dies, _ = dying(3)
    with pytest.raises(KeyboardInterrupt):
        run(path, dies)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "add_trial", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(path)
    last, seen = dying(0)
    assert run(path, last) == whole
    assert len(seen) == 12  # the first two batches were known


def test_more_trials_go_on_with_the_same_study(tmp_path: Path) -> None:
    few = run(tmp_path / "s.db", trials=8)
    assert run(tmp_path / "s.db", trials=12)[:8] == few


def test_a_judge_is_reminded_of_the_best_whole_candidate(tmp_path: Path) -> None:
    reminders: list[Point] = []

    def first_is_screened(points: Sequence[Point]) -> list[Judged]:
        proxies = [Proxies(divergence(p), 0.5, 0.5, 1) for p in points]
        return [Judged(each, screened=i == 0) for i, each in enumerate(proxies)]

    settings = SearchConfig(trials=12, batch=4)
    trials = search(
        SPACE,
        first_is_screened,
        settings=settings,
        seed=0,
        storage=sqlite_url(tmp_path / "s.db"),
        seeds=(),
        remind=reminders.append,
    )
    for end, reminder in zip((4, 8), reminders, strict=True):
        best = min((t for t in trials[:end] if not t.screened), key=lambda t: t.proxies.kl)
        assert reminder == best.point


def test_a_study_of_something_else_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "s.db", trials=4)
    url = sqlite_url(tmp_path / "s.db")
    settings = SearchConfig(trials=4, objectives=("kl", "memory"))
    with pytest.raises(UserError, match="made with another model and objectives"):
        search(
            SPACE, judge, settings=settings, seed=0, storage=url, seeds=(), identity={"model": "b"}
        )


def test_a_candidate_without_a_divergence_counts_and_is_left_out(tmp_path: Path) -> None:
    def breaks(points: Sequence[Point]) -> list[Judged]:
        found = judge(points)
        return [Judged(Proxies(float("nan"), 0, 0, 4), screened=False), *found[1:]]

    assert len(run(tmp_path / "s.db", breaks, trials=8)) == 6
    assert len(run(tmp_path / "s.db", breaks, trials=8)) == 6


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_several_objectives_give_the_front_that_optuna_finds(tmp_path: Path, sampler: str) -> None:
    objectives = ("kl", "memory", "latency")
    trials = run(tmp_path / "s.db", objectives=objectives, sampler=sampler, trials=14)
    ours = {trial.number for trial in front(trials, objectives)}
    study = study_of(tmp_path / "s.db")
    assert ours == {trial.number for trial in study.best_trials}
    assert 1 < len(ours) < 14
    assert study.metric_names == ["KL (nats/token)", "memory (bytes)", "latency (s)"]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_dominates(pairs: list[tuple[int, int]]) -> None:
    trials = [
        Trial(n, Point(()), Costs(m, 1), Proxies(float(k), 0, 0, 1), screened=False)
        for n, (k, m) in enumerate(pairs)
    ]
    study = optuna.create_study(directions=["minimize"] * 2)
    for pair in pairs:
        study.add_trial(optuna.create_trial(values=[float(value) for value in pair]))
    best = {trial.number for trial in study.best_trials}
    assert {trial.number for trial in front(trials, ("kl", "memory"))} == best
    lowest = min(k for k, _ in pairs)
    assert all(values(t, ("kl",)) == (lowest,) for t in front(trials, ("kl",)))


def test_grids_hold_all_choices() -> None:
    uneven = TableSpace(parameters=(*PARAMETERS[:-1], Parameter("width", (64, 128, 160))))
    grid = distributions(uneven)["width"]
    assert grid == optuna.distributions.IntDistribution(64, 160, step=32)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("study.db", "no storage URL"),
        ("nosuch://host/database", "not known here"),
        ("mysql+nosuchdriver://host/database", "not known here"),
        ("sqlite:////nosuchfolder/study.db", "unable to open database file"),
        ("postgresql://user:geheim@127.0.0.1:9/db", "refused"),
    ],
)
def test_storages_that_cannot_be_used(url: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        open_storage(url)
    assert "\n" not in str(caught.value) and "geheim" not in str(caught.value)


def test_a_storage_that_goes_away_is_an_error_in_one_line(tmp_path: Path) -> None:
    def pulls_the_table_away(points: Sequence[Point]) -> list[Judged]:
        with sqlite3.connect(tmp_path / "s.db") as connection:
            connection.execute("drop table minipuzzle_claims")
        connection.close()
        return judge(points)

    with pytest.raises(UserError, match="no such table") as caught:
        run(tmp_path / "s.db", pulls_the_table_away)
    assert "\n" not in str(caught.value)


def test_errors_of_the_judge_are_left_alone(tmp_path: Path) -> None:
    def broken(points: Sequence[Point]) -> list[Judged]:
        raise ImportError("something else")

    with pytest.raises(ImportError, match="something else"):
        run(tmp_path / "s.db", broken)


def test_a_missing_driver_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "psycopg", None)
    with pytest.raises(UserError, match=r"minipuzzle\[postgres\]"):
        open_storage("postgresql://localhost/db")


def test_a_database_that_may_not_be_written(tmp_path: Path) -> None:
    run(tmp_path / "s.db", trials=4)
    (tmp_path / "s.db").chmod(0o444)
    text = tmp_path / "other.db"
    text.write_text("no database")
    with pytest.raises(UserError, match="not a database"):
        open_storage(sqlite_url(text))
    if not _can_write(tmp_path / "s.db"):  # root can
        with pytest.raises(UserError, match="may not be written"):
            open_storage(sqlite_url(tmp_path / "s.db"))


def _can_write(path: Path) -> bool:
    try:
        with sqlite3.connect(path) as connection:
            connection.execute("create table t (x)")
    except sqlite3.OperationalError:
        return False
    return True
