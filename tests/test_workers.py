"""Several workers on one study: nothing twice, nothing lost, whoever is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from sqlalchemy import create_engine, text

from minipuzzle.errors import UserError
from minipuzzle.recipe import SearchConfig
from minipuzzle.search.claims import Claims, Standing
from minipuzzle.search.propose import distributions
from minipuzzle.search.space import Point
from minipuzzle.search.storage import open_storage, sqlite_url
from minipuzzle.search.study import Judged, search
from tests.postgres import PASSWORD, server
from tests.table_space import TableSpace, judge, slow_judge

pytestmark = pytest.mark.filterwarnings("error")
SPACE = TableSpace()
TRIALS, BATCH = 18, 3
QUICK, CALM = 1, 20  # seconds between signs of life: where somebody is killed, and where not
PATIENCE = 300  # seconds, for a machine that is busy with other things
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    with server() as url:
        yield url


@pytest.fixture
def database(postgres: str) -> Iterator[str]:
    """A fresh database: the URL."""
    name = f"study{time.monotonic_ns()}"
    engine = create_engine(open_url(postgres), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"create database {name}"))
    engine.dispose()
    yield f"{postgres.rpartition('/')[0]}/{name}"


def open_url(url: str) -> str:
    return url.replace("postgresql:", "postgresql+psycopg:")


def settings(url: str, **changes: Any) -> SearchConfig:
    options = {"trials": TRIALS, "batch": BATCH, "storage": url, "heartbeat": QUICK}
    return SearchConfig(**{**options, **changes})


def work(url: str, log: Path, seconds: float, heartbeat: int, results: Any) -> None:
    """What a worker process does; `seconds`: of each evaluation."""
    warnings.simplefilter("error")
    try:
        options = settings(url, heartbeat=heartbeat)
        trials = search(
            SPACE, slow_judge(log, seconds), settings=options, seed=0, storage=url, seeds=()
        )
        results.put([trial.to_json() for trial in trials])
    except BaseException as error:
        results.put(repr(error))
        raise


class Crew:
    """Worker processes, each with its log of evaluations."""

    def __init__(self, url: str, folder: Path) -> None:
        # a server process imports everything once; workers are forks of it
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["minipuzzle.search.study"])
        self.results = self.context.Queue()
        self.url, self.folder = url, folder
        self.processes: list[BaseProcess] = []

    def start(self, seconds: float, heartbeat: int = CALM) -> int:
        """Start a worker; its number."""
        number = len(self.processes)
        arguments = (self.url, self.log(number), seconds, heartbeat, self.results)
        process = self.context.Process(target=work, args=arguments, daemon=True)
        process.start()
        self.processes.append(process)
        return number

    def log(self, number: int) -> Path:
        return self.folder / f"{number}.log"

    def lines(self, word: str, *numbers: int) -> list[str]:
        """Architectures that workers (of these numbers, or all) have `begun` or `done`."""
        logs = [self.log(n) for n in numbers or range(len(self.processes))]
        lines = [line for log in logs if log.exists() for line in log.read_text().splitlines()]
        return [line.partition(" ")[2] for line in lines if line.startswith(word)]

    def kill(self, number: int) -> None:
        process = self.processes[number]
        assert process.pid is not None and process.is_alive()
        os.kill(process.pid, signal.SIGKILL)
        process.join()

    def finish(self, count: int) -> list[dict[str, Any]]:
        """What all `count` workers return, which must be the same."""
        found = [self.results.get(timeout=PATIENCE) for _ in range(count)]
        for process in self.processes:
            process.join(timeout=PATIENCE)
        assert all(isinstance(each, list) and each == found[0] for each in found), found
        trials: list[dict[str, Any]] = found[0]
        return trials


@pytest.fixture
def crew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Crew]]:
    monkeypatch.syspath_prepend(str(ROOT))  # for the processes
    crews: list[Crew] = []

    def make(url: str) -> Crew:
        crews.append(Crew(url, tmp_path))
        return crews[-1]

    yield make
    for made in crews:
        for process in made.processes:
            process.kill()


def wait_until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


@contextmanager
def study_of(url: str) -> Iterator[optuna.Study]:
    storage = open_storage(url)
    yield optuna.load_study(study_name="minipuzzle", storage=storage)
    storage.engine.dispose()


def check(url: str, crew: Crew, trials: list[dict[str, Any]]) -> None:
    """Every architecture has one claim, one finished evaluation and one value."""
    done = Counter(crew.lines("done"))
    assert len(done) == len(trials) == TRIALS
    assert set(done.values()) == {1}
    assert {key(trial) for trial in trials} == set(done)
    engine = create_engine(open_url(url))
    with engine.connect() as connection:
        rows = connection.execute(text("select slot, owner, value from minipuzzle_claims")).all()
    engine.dispose()
    assert sorted(row.slot for row in rows) == list(range(TRIALS))
    assert all(row.value is not None for row in rows)
    with study_of(url) as study:
        told = {trial.number: trial for trial in study.trials}
    assert all(trial.state.is_finished() for trial in told.values())
    assert all(told[row.owner].state is TrialState.COMPLETE for row in rows)


def key(trial: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in trial["point"].items())


def test_four_workers_share_a_study(database: str, crew: Callable[[str], Crew]) -> None:
    ours = crew(database)
    for _ in range(4):
        ours.start(seconds=0.1)
    check(database, ours, ours.finish(4))
    assert sum(bool(ours.lines("done", number)) for number in range(4)) > 1


@pytest.mark.parametrize("last", [False, True], ids=["midway", "the last to run"])
def test_what_a_killed_worker_leaves_is_done_by_another(
    database: str, crew: Callable[[str], Crew], last: bool
) -> None:
    ours = crew(database)
    victim = ours.start(seconds=PATIENCE, heartbeat=QUICK)
    wait_until(lambda: bool(ours.lines("begun", victim)))
    lost = ours.lines("begun", victim)
    other = ours.start(seconds=0.05, heartbeat=QUICK)
    wanted = TRIALS - len(lost) if last else 1
    wait_until(lambda: len(ours.lines("done", other)) >= wanted)
    ours.kill(victim)
    check(database, ours, ours.finish(1))
    assert set(lost) <= set(ours.lines("done", other))
    with study_of(database) as study:
        failed = study.get_trials(states=[TrialState.FAIL])
    assert {" ".join(f"{n}={v}" for n, v in t.params.items()) for t in failed} == set(lost)


def test_two_workers_share_a_file(tmp_path: Path, crew: Callable[[str], Crew]) -> None:
    url = sqlite_url(tmp_path / "s.db")
    ours = crew(url)
    for _ in range(2):
        ours.start(seconds=0.01)
    check(url, ours, ours.finish(2))


def test_trials_of_workers_that_died_between_two_steps_are_settled(tmp_path: Path) -> None:
    """One died before its first sign of life, one after failing another's trial."""
    url = sqlite_url(tmp_path / "s.db")
    few = settings(url, trials=4)
    search(SPACE, judge, settings=few, seed=0, storage=url, seeds=())
    engine = create_engine(url)
    with engine.connect() as connection:
        name = connection.execute(text("select distinct study from minipuzzle_claims")).scalar()
    claims = Claims(engine, str(name))
    point = next(p for p in SPACE.points() if claims.owner(p) is None)
    with study_of(url) as study:
        silent = study.ask(fixed_distributions=distributions(SPACE)).number
        failed = study.ask(fixed_distributions=distributions(SPACE)).number
        assert claims.take(point, failed, 5) is Standing.WON
        study.tell(failed, state=TrialState.FAIL)
    engine.dispose()

    more = settings(url, trials=5)
    trials = search(SPACE, judge, settings=more, seed=0, storage=url, seeds=())
    assert len(trials) == 5 and trials[-1].point == point
    assert trials[-1].number > failed
    with study_of(url) as study:
        states = {trial.number: trial.state for trial in study.trials}
    assert states[silent] is TrialState.FAIL
    assert all(state.is_finished() for state in states.values())


def test_a_worker_that_was_taken_for_dead_keeps_its_values(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path / "s.db")
    calls = 0

    def slow(points: Sequence[Point]) -> list[Judged]:
        nonlocal calls
        calls += 1
        with study_of(url) as study:
            for trial in study.get_trials(states=[TrialState.RUNNING])[:calls]:
                study.tell(trial.number, state=TrialState.FAIL)
        return judge(points)

    few = settings(url, trials=6)
    trials = search(SPACE, slow, settings=few, seed=0, storage=url, seeds=())
    assert len(trials) == 6 and calls == 6 / BATCH


def test_claims_are_unique_and_limited(tmp_path: Path) -> None:
    engine = create_engine(sqlite_url(tmp_path / "c.db"))
    claims, points = Claims(engine, "a"), list(SPACE.points())[:4]
    assert [claims.take(point, n, 3) for n, point in enumerate(points)] == [
        *[Standing.WON] * 3,
        Standing.FULL,
    ]
    assert claims.take(points[0], 7, 3) is Standing.PENDING
    claims.settle([(points[0], {"kl": 1.0}), (points[1], {"kl": 2.0})])
    claims.settle([(points[0], {"kl": 9.0})])
    assert claims.value(points[0]) == {"kl": 1.0}
    assert claims.take(points[0], 7, 3) is Standing.KNOWN
    assert not claims.take_over(points[0], 0, 7) and not claims.take_over(points[2], 0, 7)
    assert claims.take_over(points[2], 2, 7) and claims.owner(points[2]) == 7
    claims.give_back(1)
    assert [claim.point for claim in claims.all()] == points[:1]
    assert claims.take(points[1], 1, 3) is Standing.WON and claims.value(points[1]) == {"kl": 2.0}
    assert claims.take(points[2], 2, 3) is Standing.WON and claims.value(points[2]) is None
    assert Claims(engine, "b").count() == 0 and claims.count() == 3
    engine.dispose()


def test_databases_that_refuse_are_errors_in_one_line(database: str) -> None:
    for url, words in (
        (database.replace(PASSWORD, "wrong-one"), "password authentication failed"),
        (database + "x", "does not exist"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            open_storage(url)
        assert not any(word in str(caught.value) for word in ("\n", PASSWORD, "wrong-one"))
