"""Finalists that differ; rounds that all play before any goes on; kills that change nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipuzzle import model
from minipuzzle.data.blocks import recipe_blocks
from minipuzzle.distill.heldout import evaluate
from minipuzzle.distill.stage import settings_of
from minipuzzle.distill.teacher import TeacherStates
from minipuzzle.distill.trainer import train
from minipuzzle.errors import UserError
from minipuzzle.prune.repair import repair
from minipuzzle.prune.score import score
from minipuzzle.prune.slice import slice_checkpoint
from minipuzzle.recipe import Recipe
from minipuzzle.search.finalists import distance, finalists
from minipuzzle.search.proxies import Proxies
from minipuzzle.search.ranges import recipe_space
from minipuzzle.search.space import Point, Space
from minipuzzle.search.standings import rank_table
from minipuzzle.search.tournament import (
    FOLDER,
    Tournament,
    check_tournament,
    hold_tournament,
)
from minipuzzle.search.trials import Trial
from tests.tiny import CONFIG
from tests.tiny_text import TEXT, write_model

ROOT = Path(__file__).parents[1]
RUNGS = [{"steps": 2, "keep": 2}, {"steps": 5, "keep": 1}]


def tiny_recipe(place: Path, **tournament: Any) -> Recipe:
    """A recipe with a tiny teacher and texts in `place`; four finalists, two rungs."""
    if not (place / "teacher").exists():
        write_model(place / "teacher")
    texts = {}
    for name in ("calibration", "distillation", "search", "report"):
        (place / f"{name}.txt").write_text(f"# {name}\n{TEXT}")
        texts[name] = {"source": str(place / f"{name}.txt"), "block": 32}
    rules = {"finalists": 4, "blocks": 8, "rungs": RUNGS, **tournament}
    search = {
        "blocks": 4,
        "max_removed": {"mamba": 1, "attention": 0, "ffn": 2},
        "axes": {"width": {"min": 0.25, "step": 8}},
        "tournament": rules,
    }
    return Recipe.from_mapping(
        {
            "model": str(place / "teacher"),
            "budget": "90%",
            "deployment": {"context": 16},
            "data": texts,
            "search": search,
            "distill": {"batch": 2, "learning_rate": 3e-3, "checkpoint_every": 2},
        }
    )


def trial(space: Space, number: int, point: Point, kl: float, *, screened: bool = False) -> Trial:
    return Trial(
        number=number,
        point=point,
        costs=space.costs(point),
        proxies=Proxies(kl, 0.5, 0.5, 4),
        screened=screened,
    )


def some_trials(space: Space) -> list[Trial]:
    """All points of a space, made-up proxies: the more is removed, the better."""
    points = list(space.points())
    order = sorted(points, key=lambda point: (-len(space.gone(point)), -space.shape(point).hidden))
    return [trial(space, n, point, 0.1 + 0.01 * n) for n, point in enumerate(order)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tournament")


def held(recipe: Recipe, work: Path) -> list[dict[str, Any]]:
    """The tournament of a recipe from `tiny_recipe`."""
    work.mkdir(exist_ok=True)
    teacher = model.load(Path(recipe.model))
    ids = recipe_blocks(recipe, "calibration", teacher.tokenizer, 4)
    scores = score(teacher, ids, {})
    space = recipe_space(recipe, teacher.architecture, teacher.family, scores)
    return hold_tournament(recipe, teacher, space, scores, some_trials(space), work)


@pytest.fixture(scope="module")
def straight(place: Path) -> list[dict[str, Any]]:
    """The records of a tournament that nobody disturbed."""
    return held(tiny_recipe(place), place / "straight")


# --- finalists


@cache
def tiny_space() -> Space:
    from minipuzzle import families

    family, architecture = families.read(CONFIG)
    search = {
        "max_removed": {"mamba": 2, "attention": 0, "ffn": 2},
        "axes": {"width": {"min": 0.25, "step": 8}, "hidden": {"min": 0.5, "step": 8}},
    }
    recipe = Recipe.from_mapping({"model": "demo", "budget": "90%", "search": search})
    return recipe_space(recipe, architecture, family)


points = st.integers(0, 10**6).map(lambda n: (every := list(tiny_space().points()))[n % len(every)])


@given(points, points, points)
def test_the_distance_is_one(a: Point, b: Point, c: Point) -> None:
    space = tiny_space()
    to_b = distance(space, a, b)
    assert to_b == distance(space, b, a) and 0 <= to_b <= 2
    same = space.shape(a) == space.shape(b) and space.gone(a) == space.gone(b)
    assert (to_b == 0) == same
    assert distance(space, a, c) <= to_b + distance(space, b, c) + 1e-12


def test_finalists_differ_in_more_than_a_step_of_the_width() -> None:
    space = tiny_space()
    widths = [point for point in space.points() if point["removed.ffn"] == 0]
    widths = [p for p in widths if p["removed.mamba"] == 1 and p["hidden"] == 24]
    widths = sorted(widths, key=lambda p: p["width"])[-2:]
    other = next(p for p in space.points() if p["removed.ffn"] == 2 and p["removed.mamba"] == 0)
    assert widths[1]["width"] - widths[0]["width"] == 8
    trials = [trial(space, n, point, 0.1 + 0.001 * n) for n, point in enumerate(widths)]
    trials.append(trial(space, 99, other, 0.3))
    assert [t.number for t in finalists(trials, space, 2)] == [0, 99]
    assert {t.number for t in finalists(trials, space, 50)} == {t.number for t in trials}


def test_nobody_plays_for_being_different_alone() -> None:
    space = tiny_space()
    every = sorted(space.points(), key=lambda p: distance(space, p, next(space.points())))
    trials = [trial(space, n, point, 0.1 + n) for n, point in enumerate(every)]
    assert len(trials) > 12
    chosen = finalists(trials, space, 2)
    assert [t.number for t in chosen][0] == 0 and chosen[1].number < 8


def test_who_never_plays() -> None:
    space = tiny_space()
    fits = next(space.points())
    large = space.extreme(smallest=False)
    assert not space.fits(large)
    other = next(p for p in space.points() if distance(space, p, fits) > 0.2)
    trials = [
        trial(space, 0, large, 0.01),
        trial(space, 1, other, 0.02, screened=True),
        trial(space, 2, fits, 0.3),
        trial(space, 3, fits, 0.2),
    ]
    assert [t.number for t in finalists(trials, space, 4)] == [3]


# --- rounds


def test_a_finalist_is_trained_as_if_there_were_no_rungs(
    place: Path, straight: list[dict[str, Any]], tmp_path: Path
) -> None:
    """The winner's record against cut, repair and one training without a stop, written plainly."""
    recipe = tiny_recipe(place)
    teacher = model.load(Path(recipe.model))
    scores = score(teacher, recipe_blocks(recipe, "calibration", teacher.tokenizer, 4), {})
    space = recipe_space(recipe, teacher.architecture, teacher.family, scores)
    winner = straight[0]
    selection = space.selection(Point.from_json(winner["point"]), scores)
    slice_checkpoint(teacher.folder, tmp_path / "cut", selection)
    student = model.load(tmp_path / "cut")
    search = recipe_blocks(recipe, "search", teacher.tokenizer, 4)
    states = TeacherStates(teacher.module, search)
    found = [evaluate(student.module, states, search)]
    calibration = recipe_blocks(recipe, "calibration", teacher.tokenizer, 8)
    repair(teacher, student, selection, calibration, dtype=stored(teacher))
    found.append(evaluate(student.module, states, search))
    blocks = recipe_blocks(recipe, "distillation", teacher.tokenizer, 10)
    settings = dataclasses.replace(settings_of(recipe), steps=5)
    train(student.module, teacher.module, blocks, settings)
    found.append(evaluate(student.module, states, search))
    stations = [winner["cut"], winner["repaired"], winner["rungs"][-1]]
    for ours, theirs in zip(stations, found, strict=True):
        assert ours["kl"] == pytest.approx(theirs.kl, rel=1e-4)
        assert ours["loss"] == pytest.approx(theirs.loss, rel=1e-4)
    assert winner["rungs"][-1]["steps"] == 5


def stored(teacher: model.Model) -> Any:
    from minipuzzle.checkpoint import Checkpoint

    return model.stored_dtype(Checkpoint.open(teacher.folder))


def test_all_reach_a_rung_before_any_goes_on(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    distil = Tournament.distil

    def watched(self: Tournament, player: Any, steps: int) -> None:
        seen.append((steps, player.number))
        distil(self, player, steps)

    monkeypatch.setattr(Tournament, "distil", watched)
    records = held(tiny_recipe(place), tmp_path / "work")
    assert [steps for steps, _ in seen] == [2, 2, 2, 2, 5, 5]
    first = sorted(records, key=lambda r: float(r["rungs"][0]["kl"]))
    assert [number for steps, number in seen if steps == 5] == [r["number"] for r in first[:2]]


def test_records(straight: list[dict[str, Any]], place: Path) -> None:
    assert [len(record["rungs"]) for record in straight] == [2, 2, 1, 1]
    assert [record["ranks"].get("step 5") for record in straight] == [1, 2, None, None]
    assert [list(record["ranks"]) for record in straight][0] == [
        "proxy",
        "repair",
        "step 2",
        "step 5",
    ]
    for column, kl in (
        ("proxy", lambda r: r["kl"]),
        ("repair", lambda r: r["repaired"]["kl"]),
        ("step 2", lambda r: r["rungs"][0]["kl"]),
    ):
        ranked = sorted(straight, key=kl)
        assert [record["ranks"][column] for record in ranked] == [1, 2, 3, 4]
    for record in straight:
        teacher = model.read_architecture(place / "teacher")[2]
        assert len(record["layers"]) == len(teacher.layers)
        assert record["layers"].count(None) == sum(
            record["point"][f"removed.{kind}"] for kind in ("mamba", "ffn")
        )
    json.dumps(straight, allow_nan=False)
    left = sorted((place / "straight" / FOLDER).iterdir())
    assert [path.name for path in left] == sorted(f"{r['number']}.json" for r in straight)


# --- kills


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    ("name", "call"), [("measure", 3), ("student", 1), ("student", 4), ("student", 6), ("clear", 1)]
)
def test_a_tournament_goes_on(
    name: str,
    call: int,
    place: Path,
    tmp_path: Path,
    straight: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = 0
    whole: Callable[..., Any] = getattr(Tournament, name)

    def dies(self: Tournament, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        result = whole(self, *arguments)
        if calls == call:
            raise Killed
        return result

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Tournament, name, dies)
        held(tiny_recipe(place), tmp_path / "work")
    assert held(tiny_recipe(place), tmp_path / "work") == straight


def test_kill_9_in_the_middle_of_a_training(
    place: Path, tmp_path: Path, straight: list[dict[str, Any]]
) -> None:
    """A real process, killed in the second rung of a finalist between two checkpoints."""
    command = [sys.executable, "-m", "tests.test_tournament", str(place), str(tmp_path / "work")]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    records = [json.loads(p.read_text()) for p in (tmp_path / "work" / FOLDER).glob("*.json")]
    assert sorted(len(record["rungs"]) for record in records) == [1, 1, 1, 1]
    assert held(tiny_recipe(place), tmp_path / "work") == straight


def die_in_training(place: Path, work: Path) -> None:
    """Hold the tournament until step 3 of 5, then kill this process."""
    from minipuzzle.distill import trainer

    step = trainer.train_step

    def fatal(*arguments: Any) -> Any:
        if arguments[-1] == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*arguments)

    with mock.patch.object(trainer, "train_step", fatal):
        held(tiny_recipe(place), work)


# --- tasks, rules, words


def test_tasks_rank_the_last(
    place: Path, tmp_path: Path, straight: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two who reach the end are ranked by accuracy, equal ones by KL."""
    given: list[dict[int, float]] = [{0: 0.0, 1: 1.0}, {0: 1.0, 1: 1.0}]

    def ranks(*answers: dict[int, float]) -> list[int]:
        left = list(answers)
        stub = SimpleNamespace(answers=lambda *_, **__: {"a": left.pop(0), "b": {0: 1.0}})
        monkeypatch.setattr(Tournament, "tasks", stub)
        recipe = tiny_recipe(place, tasks=["demo_search"])
        monkeypatch.setattr("minipuzzle.search.tournament.check_tournament", lambda recipe: None)
        records = held(recipe, tmp_path / str(len(list(tmp_path.iterdir()))))
        assert left == [] and [("tasks" in r) for r in records] == [True, True, False, False]
        assert [r["ranks"].get("tasks") for r in records] == [1, 2, None, None]
        return [r["number"] for r in records]

    order = [r["number"] for r in straight]
    assert ranks(*given) == [order[1], order[0], *order[2:]]
    assert ranks(given[0], given[0]) == order


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rungs": [{"steps": 4}, {"steps": 4}]}, "more and more steps"),
        ({"tasks": ["demo"]}, "name demo_search instead"),
    ],
)
def test_rules_that_are_refused(
    changes: dict[str, Any], message: str, place: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        held(tiny_recipe(place, **changes), tmp_path / "work")


def test_questions_made_from_report_text_are_refused(place: Path) -> None:
    recipe = tiny_recipe(place, tasks=["demo_search"])
    check_tournament(recipe)
    mapping = recipe.to_mapping()
    mapping["data"]["search"]["source"] = mapping["data"]["report"]["source"]
    with pytest.raises(UserError, match="data.report names too"):
        check_tournament(Recipe.from_mapping(mapping))


def test_one_finalist_plays_nobody(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = held(tiny_recipe(place, finalists=1), tmp_path / "work")
    assert len(records) == 1 and records[0]["number"] == 0 and records[0]["rungs"] == []
    out = capsys.readouterr().out
    assert "no tournament is held" in out and max(map(len, out.splitlines())) <= 80


def test_the_table_of_ranks(straight: list[dict[str, Any]]) -> None:
    lines = rank_table(straight).splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) == 6
    assert lines[0].split("  ")[0] == "finalist" and "step 5" in lines[0]
    assert lines[2].startswith(f"#{straight[0]['number']}")
    assert lines[-1].split()[-2] == "-"  # did not play the last rung


if __name__ == "__main__":
    die_in_training(Path(sys.argv[1]), Path(sys.argv[2]))
