"""The training loop: it learns, it follows its schedule, and stopping it changes no bit."""

import dataclasses
import itertools
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from minipuzzle.distill.config import Settings
from minipuzzle.distill.heldout import evaluate
from minipuzzle.distill.history import HISTORY_FILE, Step, read_history
from minipuzzle.distill.resume import CHECKPOINT_FILE
from minipuzzle.distill.teacher import OnlineTeacher, TeacherStates, final_hidden, head_weight
from minipuzzle.distill.trainer import batch_rows, make_optimizer, train, train_step
from minipuzzle.errors import UserError
from tests.distill_models import SETTINGS, assert_same_bits, bits, blocks, run, tiny

ROOT = Path(__file__).parents[1]


class Killed(Exception):
    pass


def _killer(at: int) -> Any:
    def on_step(entry: Step) -> None:
        if entry.step == at:
            raise Killed

    return on_step


def test_distillation_brings_a_student_to_its_teacher() -> None:
    student, teacher = tiny(1), tiny(1)
    with torch.no_grad():
        head_weight(student).mul_(0.5)
    before = bits(teacher)
    history = train(
        student,
        teacher,
        blocks(24),
        Settings(steps=40, batch=4, learning_rate=3e-3, evaluate_every=20),
        held_out=blocks(4, seed=3),
    )
    first, middle, last = history.evaluations
    assert (first.step, middle.step, last.step) == (0, 20, 40)
    assert last.kl < 0.5 * first.kl
    assert last.loss != first.loss
    assert history.losses[-1] < 0.5 * history.losses[0]
    assert_same_bits(bits(teacher), before)


def test_one_step_equals_a_step_written_down_plainly() -> None:
    """Whole logits, torch's own KL, clipping and AdamW in one tensor at a time."""
    settings = Settings(steps=3, batch=4, learning_rate=1e-2, clip=0.05, temperature=2.0, warmup=1)
    data, teacher = blocks(4), tiny(1)
    student, plain = tiny(2).requires_grad_(True), tiny(2).requires_grad_(True)
    step = train_step(
        student, OnlineTeacher(teacher, data), data, make_optimizer(student, settings), settings, 0
    )
    rate = 1e-2 / 3
    optimizer = torch.optim.AdamW(
        plain.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0, foreach=False
    )
    batch = data[batch_rows(4, 4, settings.seed, 0)]
    with torch.no_grad():
        target = torch.softmax(teacher(batch).logits / 2, -1)
    loss = 4 * torch.nn.functional.kl_div(
        torch.log_softmax(plain(batch).logits / 2, -1).flatten(0, 1),
        target.flatten(0, 1),
        reduction="batchmean",
    )
    torch.autograd.backward(loss)
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
    optimizer.step()
    assert step.loss == pytest.approx(loss.item(), rel=1e-4)
    assert step.gradient_norm == pytest.approx(norm.item(), rel=1e-3)
    assert step.gradient_norm > 0.05 and step.learning_rate == rate
    # AdamW's first step is the rate times the gradient's sign: rounding may flip tiny ones.
    close = total = 0
    for name, parameter in student.named_parameters():
        reference = plain.get_parameter(name)
        close += int(torch.isclose(parameter, reference, atol=2e-4).sum())
        total += parameter.numel()
    assert close > 0.995 * total


@pytest.mark.parametrize("stop", [0, 2, 3, 7, 11])
def test_stopped_and_started_again_ends_with_the_same_bits(stop: int, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    stopped.mkdir()
    settings = dataclasses.replace(SETTINGS, evaluate_every=4)
    student, expected = tiny(2), tiny(2)
    options: dict[str, Any] = {"held_out": blocks(2, seed=9)}
    full = train(expected, tiny(1), blocks(), settings, work=whole, **options)
    with pytest.raises(Killed):
        train(student, tiny(1), blocks(), settings, work=stopped, on_step=_killer(stop), **options)
    # What a kill in the middle of a line leaves behind.
    with (stopped / HISTORY_FILE).open("a") as file:
        file.write('{"kind": "step", "st')
    seen: list[int] = []
    student = tiny(2)
    history = train(
        student,
        tiny(1),
        blocks(),
        settings,
        work=stopped,
        on_step=lambda entry: seen.append(entry.step),
        **options,
    )
    assert_same_bits(bits(student), bits(expected))
    assert seen == list(range((stop + 1) // 3 * 3, 12))
    assert history.steps == full.steps and history.evaluations == full.evaluations
    assert (stopped / HISTORY_FILE).read_bytes() == (whole / HISTORY_FILE).read_bytes()
    assert read_history(stopped / HISTORY_FILE).steps == full.steps


@pytest.mark.parametrize("every", [0, 3])
def test_stopping_at_rungs_changes_no_bit(every: int, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, checkpoint_every=every)
    expected = tiny(2)
    full = train(expected, tiny(1), blocks(), settings)
    for until in (0, 4, 4, 7, 12, 12, 99):  # the second 4: nothing is left to do
        student = tiny(2)
        history = train(student, tiny(1), blocks(), settings, work=tmp_path, until=until)
        assert history.steps == full.steps[:until]
    assert_same_bits(bits(student), bits(expected))


def test_kill_9_at_a_random_moment(tmp_path: Path) -> None:
    """A real process, killed at some step; another one finishes its work."""
    alone, work = tmp_path / "alone", tmp_path / "killed"
    alone.mkdir()
    work.mkdir()
    expected = run(alone)
    command = [sys.executable, "-m", "tests.distill_models", str(work)]
    here: dict[str, Any] = {
        "cwd": ROOT,
        "env": {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    }
    process = subprocess.Popen([*command, "0.02"], stdout=subprocess.PIPE, text=True, **here)
    assert process.stdout is not None
    for _ in range(random.randint(2, 8)):
        assert process.stdout.readline()
    time.sleep(random.uniform(0, 0.04))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    subprocess.run([*command, "0"], check=True, stdout=subprocess.DEVNULL, **here)
    assert_same_bits(load_file(work / "student.safetensors"), expected)
    assert (work / HISTORY_FILE).read_bytes() == (alone / HISTORY_FILE).read_bytes()


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    train(tiny(2), tiny(1), blocks(), SETTINGS, work=tmp_path)
    other = dataclasses.replace(SETTINGS, learning_rate=1e-3)
    with pytest.raises(UserError, match="other learning_rate"):
        train(tiny(2), tiny(1), blocks(), other, work=tmp_path)
    with pytest.raises(UserError, match="other blocks"):
        train(tiny(2), tiny(1), blocks(seed=4), SETTINGS, work=tmp_path)


def test_a_tied_head_is_stored_and_trained_once(tmp_path: Path) -> None:
    student = tiny(2, tied=True)
    before = bits(student)
    train(student, tiny(1), blocks(), SETTINGS, work=tmp_path)
    assert head_weight(student) is student.get_parameter("model.embeddings.weight")
    with safe_open(tmp_path / CHECKPOINT_FILE, framework="pt") as file:
        names = [n for n in file.keys() if n.startswith("parameter.")]  # noqa: SIM118
    assert sorted(names) == sorted(f"parameter.{name}" for name in before)


def test_no_steps_change_nothing(tmp_path: Path) -> None:
    student = tiny(2)
    before = bits(student)
    history = train(
        student, tiny(1), blocks(), Settings(steps=0), work=tmp_path, held_out=blocks(2)
    )
    assert_same_bits(bits(student), before)
    assert history.steps == [] and [e.step for e in history.evaluations] == [0]


def test_teacher_states_in_memory_equal_the_teacher_online() -> None:
    teacher, data = tiny(1), blocks(7)
    states, online = TeacherStates(teacher, data, batch=7), OnlineTeacher(teacher, data)
    rows = torch.arange(7)
    assert torch.equal(states.hidden(rows), online.hidden(rows))
    rows = torch.tensor([5, 0, 6])
    torch.testing.assert_close(states.hidden(rows), online.hidden(rows))
    left, right = tiny(2), tiny(2)
    settings = dataclasses.replace(SETTINGS, batch=7)
    first = train(left, states, data, settings)
    second = train(right, teacher, data, settings)
    assert first.losses == pytest.approx(second.losses, rel=1e-3)


def test_micro_batches_change_rounding_only() -> None:
    settings = Settings(steps=2, batch=5, learning_rate=1e-3)
    whole = train(tiny(2), tiny(1), blocks(), settings)
    parts = train(tiny(2), tiny(1), blocks(), dataclasses.replace(settings, micro=2))
    assert parts.losses == pytest.approx(whole.losses, rel=1e-4)
    norms = [[step.gradient_norm for step in history.steps] for history in (parts, whole)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_evaluation_equals_its_plain_form() -> None:
    student, teacher, data = tiny(2), tiny(1), blocks(5)
    got = evaluate(student, OnlineTeacher(teacher, data), data, step=3, batch=2, chunk=7)
    mine = student(data).logits.double().log_softmax(-1)
    its = teacher(data).logits.double().log_softmax(-1)
    assert got.step == 3
    assert got.kl == pytest.approx((its.exp() * (its - mine)).sum(-1).mean().item(), rel=1e-4)
    assert got.agreement == (mine.argmax(-1) == its.argmax(-1)).double().mean().item()
    loss = -mine[:, :-1].gather(-1, data[:, 1:, None]).mean()
    assert got.loss == pytest.approx(loss.item(), rel=1e-5)


def test_final_hidden_is_what_the_head_reads() -> None:
    module, data = tiny(1), blocks(2)
    logits = final_hidden(module, data) @ head_weight(module).T
    torch.testing.assert_close(logits, module(data).logits)


@given(
    count=st.integers(1, 9),
    batch=st.integers(1, 12),
    seed=st.integers(0, 10**9),
    passes=st.integers(1, 3),
)
@hypothesis_settings(max_examples=40, deadline=None)
def test_every_pass_reads_every_block_once(count: int, batch: int, seed: int, passes: int) -> None:
    steps = math.ceil(passes * count / batch)
    order = [row for step in range(steps) for row in batch_rows(count, batch, seed, step).tolist()]
    for number in range(passes):
        assert Counter(order[number * count : (number + 1) * count]) == Counter(range(count))
    assert torch.equal(batch_rows(count, batch, seed, 1), batch_rows(count, batch, seed, 1))


def test_orders_differ_between_passes_and_seeds() -> None:
    first = batch_rows(64, 64, 0, 0)
    assert not torch.equal(first, batch_rows(64, 64, 0, 1))
    assert not torch.equal(first, batch_rows(64, 64, 1, 0))


@given(
    steps=st.integers(1, 300),
    warmup=st.floats(0, 1),
    floor=st.floats(0, 1),
)
@hypothesis_settings(max_examples=60, deadline=None)
def test_schedule_rises_then_falls(steps: int, warmup: float, floor: float) -> None:
    settings = Settings(steps=steps, learning_rate=2.0, warmup=warmup, floor=floor)
    rates = [settings.learning_rate_at(step) for step in range(steps)]
    rising = math.ceil(warmup * steps)
    assert all(a < b for a, b in zip(rates[:rising], rates[1:rising], strict=False))
    assert all(a >= b for a, b in zip(rates[rising:], rates[rising + 1 :], strict=False))
    assert max(rates) <= 2.0 and min(rates) > 0
    if 0 < rising:
        assert rates[rising - 1] == 2.0


@given(steps=st.integers(1, 300), warmup=st.floats(0, 1), decay=st.floats(0, 1))
@hypothesis_settings(max_examples=60, deadline=None)
def test_wsd_is_three_straight_lines(steps: int, warmup: float, decay: float) -> None:
    settings = Settings(
        steps=steps, learning_rate=2.0, warmup=warmup, decay=decay, schedule="wsd", floor=0.1
    )
    rates = [settings.learning_rate_at(step) for step in range(steps)]
    rising, falling = math.ceil(warmup * steps), math.ceil(decay * steps)
    assert rates[rising : steps - falling] == [2.0] * max(0, steps - falling - rising)
    down = [a - b for a, b in itertools.pairwise(rates[max(rising, steps - falling) :])]
    assert down == pytest.approx([1.8 / (falling + 1)] * len(down))
    if rising < steps and falling:
        assert rates[-1] == pytest.approx(0.2 + 1.8 / (falling + 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": -1}, "steps must be at least 0"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"learning_rate": math.inf}, "learning_rate must be above 0"),
        ({"warmup": 1.5}, "warmup must be between 0 and 1"),
        ({"temperature": math.nan}, "temperature must be above 0"),
        ({"schedule": "linear"}, "schedule must be cosine or wsd"),
        ({"decay": 1.1}, "decay must be between 0 and 1"),
        ({"betas": (0.9, 1.0)}, "betas must be at least 0"),
    ],
)
def test_settings_refuse(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Settings(**{"steps": 1, **change})


def test_bf16_students_and_empty_data_are_refused() -> None:
    with pytest.raises(ValueError, match="train in fp32"):
        train(tiny(2).bfloat16(), tiny(1), blocks(), SETTINGS)
    with pytest.raises(UserError, match="no blocks"):
        train(tiny(2), tiny(1), blocks(0), SETTINGS)
