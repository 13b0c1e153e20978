"""Best states, early ends, the gap, and the range test that chooses a rate."""

import dataclasses
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minipuzzle.distill import range_test
from minipuzzle.distill.best import BEST_PATTERN, best_of, out_of_patience, restore_best
from minipuzzle.distill.config import Settings
from minipuzzle.distill.heldout import evaluate
from minipuzzle.distill.history import Evaluation, History, Step
from minipuzzle.distill.outcome import gap_recovered
from minipuzzle.distill.range_test import choose_rate, find_lowest, growth, trial_steps
from minipuzzle.distill.teacher import OnlineTeacher, TeacherStates, head_weight
from minipuzzle.distill.trainer import train
from minipuzzle.errors import UserError
from tests.distill_models import SETTINGS, assert_same_bits, bits, blocks, tiny


def _history(kls: list[float]) -> History:
    history = History()
    for number, kl in enumerate(kls):
        history.add(Evaluation(step=2 * number, kl=kl, agreement=0.5, loss=1.0))
    return history


@pytest.mark.parametrize(
    ("kls", "best", "over"),
    [
        ([3.0], 0, False),
        ([3.0, 2.0], 2, False),
        ([3.0, 3.0, 4.0], 0, True),
        ([3.0, 2.0, 2.5, 2.0], 2, True),
        ([3.0, 2.0, 2.5, 1.9], 6, False),
    ],
)
def test_best_and_patience(kls: list[float], best: int, over: bool) -> None:
    history = _history(kls)
    assert best_of(history).step == best
    assert out_of_patience(history, 2) == over
    assert not out_of_patience(history, 0)


def _overshooting() -> dict[str, Any]:
    """A training that gains first and then loses: a rate that is far too high, without a fall."""
    student = tiny(1)
    with torch.no_grad():
        head_weight(student).mul_(0.5)
    settings = dataclasses.replace(
        SETTINGS, steps=12, learning_rate=2e-2, warmup=1.0, evaluate_every=1, checkpoint_every=5
    )
    return {"student": student, "teacher": tiny(1), "blocks": blocks(), "settings": settings}


def test_best_and_early_end(tmp_path: Path) -> None:
    held_out = blocks(3, seed=9)
    full = train(**_overshooting(), held_out=held_out)
    best, last = best_of(full), full.evaluations[-1]
    assert 0 < best.step < last.step, "the training of this test no longer overshoots"
    options = _overshooting()
    options["settings"] = dataclasses.replace(options["settings"], patience=2)
    history = train(**options, held_out=held_out, work=tmp_path)
    assert history.evaluations == full.evaluations[: len(history.evaluations)]
    assert len(history.steps) == history.evaluations[-1].step < 12
    assert out_of_patience(history, 2)
    mine = best_of(history)
    student = options["student"]
    restore_best(tmp_path, student, mine.step)
    judge = OnlineTeacher(tiny(1), held_out)
    assert evaluate(student, judge, held_out, step=mine.step) == mine


@pytest.mark.parametrize("stop", [2, 5, 8])
def test_the_best_survives_a_resume(stop: int, tmp_path: Path) -> None:
    held_out = blocks(3, seed=9)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    stopped.mkdir()

    def killer(entry: Step) -> None:
        if entry.step == stop:
            raise KeyboardInterrupt

    full = train(**_overshooting(), held_out=held_out, work=whole)
    with pytest.raises(KeyboardInterrupt):
        train(**_overshooting(), held_out=held_out, work=stopped, on_step=killer)
    again = train(**_overshooting(), held_out=held_out, work=stopped)
    assert again.evaluations == full.evaluations
    left, right = tiny(2), tiny(3)
    restore_best(whole, left, best_of(full).step)
    restore_best(stopped, right, best_of(again).step)
    assert_same_bits(bits(left), bits(right))


def test_a_best_that_is_gone_is_told(tmp_path: Path) -> None:
    train(**_overshooting(), held_out=blocks(3, seed=9), work=tmp_path)
    for path in tmp_path.glob(BEST_PATTERN):
        path.write_bytes(b"x")
        with pytest.raises(UserError, match="cannot be read"):
            restore_best(tmp_path, tiny(2), int(path.stem.removeprefix("best-")))
    with pytest.raises(UserError, match="cannot be read"):
        restore_best(tmp_path, tiny(2), 99)


def test_gap() -> None:
    pruned, teacher = Evaluation(0, 0.2, 0.8, 2.6), Evaluation(0, 0.0, 1.0, 2.4)
    half = gap_recovered(Evaluation(4, 0.05, 0.9, 2.5), pruned, teacher)
    assert half == {
        "kl": pytest.approx(0.75),
        "agreement": pytest.approx(0.5),
        "loss": pytest.approx(0.5),
    }
    assert gap_recovered(pruned, pruned, teacher) == {"kl": 0, "agreement": 0, "loss": 0}
    assert gap_recovered(teacher, teacher, teacher) == dict.fromkeys(("kl", "agreement", "loss"))


@given(where=st.integers(-6, 6), shift=st.floats(-0.4, 0.4))
def test_the_lowest_is_found_from_either_side(where: int, shift: float) -> None:
    tried: list[float] = []

    def measure(rate: float) -> float:
        tried.append(rate)
        return (math.log2(rate / 1e-4) - where - shift) ** 2

    found = find_lowest(measure, 1e-4)
    assert len(tried) <= range_test.MOST_TRIALS
    if -5 <= where <= 6:
        assert found == pytest.approx(1e-4 * 2.0**where)
    else:
        assert found == min(tried)


def test_rates_that_break_the_model_are_not_chosen() -> None:
    assert find_lowest(lambda rate: math.inf if rate > 3e-4 else 1 / rate, 1e-4) == 2e-4


def test_the_rule_gives_the_rates_it_was_made_from() -> None:
    assert 5e-5 * growth(115) / growth(34) == pytest.approx(1e-4, rel=0.1)
    assert growth(4) == growth(24) == 1
    assert [trial_steps(n) for n in (1, 24, 64, 1000)] == [1, 4, 4, 63]


def test_a_rate_is_chosen_and_no_trial_is_run_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, held_out, teacher = blocks(), blocks(3, seed=9), tiny(1)
    student = tiny(1)
    with torch.no_grad():
        head_weight(student).mul_(0.9)
    before = bits(student)
    settings = Settings(steps=8, batch=2, evaluate_every=1, checkpoint_every=1)
    judge = TeacherStates(teacher, held_out)
    lessons = OnlineTeacher(teacher, data)
    choose = partial(choose_rate, student, lessons, data, settings, held_out, judge, tmp_path)
    found = choose()
    assert_same_bits(bits(student), before)
    trials = {trial["learning_rate"]: trial["kl"] for trial in found["trials"]}
    assert len(trials) >= 2 and found["steps"] == 4
    assert found["tokens"] == len(trials) * 4 * 2 * 24
    # one trial, done by hand
    rate = min(trials)
    train(student, teacher, data, Settings(steps=4, batch=2, learning_rate=rate))
    assert trials[rate] == evaluate(student, judge, held_out).kl
    assert trials[found["learning_rate"]] == min(trials.values())
    # killed after the first trial, and started again
    path = tmp_path / range_test.RANGE_FILE
    cut = {"steps": 4, "kl": found["kl"], "trials": found["trials"][:1]}
    path.write_text(json.dumps(cut))
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.copy_(before[name])
    runs = 0

    def counted(*arguments: Any, **options: Any) -> History:
        nonlocal runs
        runs += 1
        return train(*arguments, **options)

    monkeypatch.setattr(range_test, "train", counted)
    assert choose() == found
    assert runs == len(trials) - 1
    assert choose() == found
    assert runs == len(trials) - 1
