"""Numbers that are none, memory and disks that are full, checkpoints that are damaged."""

import dataclasses
import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from minipuzzle.distill import resume, trainer
from minipuzzle.distill.faults import NotFinite, is_out_of_memory
from minipuzzle.distill.history import HISTORY_FILE, Halving, History, Step, read_history
from minipuzzle.distill.resume import BEFORE_FILE, CHECKPOINT_FILE
from minipuzzle.distill.teacher import OnlineTeacher, head_weight
from minipuzzle.distill.trainer import batch_rows, train
from minipuzzle.errors import UserError
from tests.distill_models import SETTINGS, assert_same_bits, bits, blocks, tiny

NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
]


class Poisoned(OnlineTeacher):
    """A teacher whose states of one block are infinite: the last that a first pass reads."""

    block = int(batch_rows(7, 7, SETTINGS.seed, 0)[6])

    def hidden(self, rows: Tensor) -> Tensor:
        states = super().hidden(rows)
        states[rows == self.block] = float("inf")
        return states


@pytest.mark.parametrize("every", [0, 1, 3])
def test_a_loss_that_is_no_number_stops_with_the_state_before(every: int, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, checkpoint_every=every, micro=1)
    bad = 2  # of 3 blocks a step, the 7th is in the third
    teacher = Poisoned(tiny(1), blocks())
    where = rf"at step {bad} \(blocks {Poisoned.block}\).* {bad} steps is kept"
    with pytest.raises(NotFinite, match=where) as told:
        train(tiny(2), teacher, blocks(), settings, work=tmp_path)
    assert "\n" not in str(told.value)
    good = tiny(2)
    train(good, tiny(1), blocks(), settings, until=bad)
    kept = tiny(2).requires_grad_(True)
    note = resume.load_training(tmp_path, kept, trainer.make_optimizer(kept, settings))
    assert note is not None and note["done"] == bad
    assert_same_bits(bits(kept), bits(good))
    # The cause removed, the same training goes on from there.
    student, whole = tiny(2), tiny(2)
    train(student, tiny(1), blocks(), settings, work=tmp_path)
    train(whole, tiny(1), blocks(), settings)
    assert_same_bits(bits(student), bits(whole))


def test_a_student_that_is_no_number_is_not_kept(tmp_path: Path) -> None:
    student = tiny(2)
    with torch.no_grad():
        head_weight(student).fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        train(student, tiny(1), blocks(), SETTINGS, work=tmp_path)
    assert not (tmp_path / CHECKPOINT_FILE).exists()


def test_a_full_disk_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = 0

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        nonlocal written
        written += 1
        save_file(tensors, path, metadata=metadata)
        if written == 3:
            content = path.read_bytes()
            path.write_bytes(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(resume, "save_file", full)
        with pytest.raises(UserError, match="disk is full") as told:
            train(tiny(2), tiny(1), blocks(), SETTINGS, work=tmp_path)
    assert "\n" not in str(told.value)
    assert {p.name for p in tmp_path.iterdir()} == {CHECKPOINT_FILE, BEFORE_FILE, HISTORY_FILE}
    seen: list[Step] = []
    student, whole = tiny(2), tiny(2)
    train(student, tiny(1), blocks(), SETTINGS, work=tmp_path, on_step=seen.append)
    train(whole, tiny(1), blocks(), SETTINGS)
    assert seen[0].step == 6
    assert_same_bits(bits(student), bits(whole))


def _damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        content[len(content) // 2] ^= 16
        path.write_bytes(content)
    elif how == "text":
        path.write_text("not a checkpoint")
    elif how == "gone":
        path.unlink()
    else:
        save_file({"a": torch.zeros(2)}, path, metadata={"note": json.dumps({"done": 3})})


@pytest.mark.parametrize("how", ["cut", "flipped", "text", "foreign", "gone"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny(2), tiny(1), blocks(), SETTINGS, work=tmp_path, until=7)
    _damage(tmp_path / CHECKPOINT_FILE, how)
    seen: list[Step] = []
    student, whole = tiny(2), tiny(2)
    train(student, tiny(1), blocks(), SETTINGS, work=tmp_path, on_step=seen.append, until=8)
    said = capsys.readouterr().out
    assert ("damaged" in said and "step 6" in said) or how == "gone"
    assert [entry.step for entry in seen] == [6, 7]
    # The good one is still the one before: it was not replaced by the damaged one.
    _damage(tmp_path / CHECKPOINT_FILE, "cut")
    train(student := tiny(2), tiny(1), blocks(), SETTINGS, work=tmp_path)
    train(whole, tiny(1), blocks(), SETTINGS)
    assert_same_bits(bits(student), bits(whole))


def test_two_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    train(tiny(2), tiny(1), blocks(), SETTINGS, work=tmp_path)
    for name in (CHECKPOINT_FILE, BEFORE_FILE):
        _damage(tmp_path / name, "cut")
    with pytest.raises(UserError, match=f"remove {CHECKPOINT_FILE} and {BEFORE_FILE}") as told:
        train(tiny(2), tiny(1), blocks(), SETTINGS, work=tmp_path)
    assert "\n" not in str(told.value)


def _small(monkeypatch: Any, fits: int, error: Exception, *, free: bool = False) -> None:
    """Let more than `fits` blocks at a time raise `error` (where memory is not `free`)."""
    accumulate = trainer.accumulate

    def limited(student: Any, teacher: Any, data: Any, rows: Tensor, *rest: Any) -> float:
        loss = accumulate(student, teacher, data, rows, *rest)  # half of the work is done by then
        if len(rows) > fits and not free:
            raise error
        return loss

    monkeypatch.setattr(trainer, "accumulate", limited)


@pytest.mark.parametrize("error", NO_MEMORY)
def test_out_of_memory_halves_the_micro_batch(
    error: Exception,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = dataclasses.replace(SETTINGS, steps=4, batch=6, checkpoint_every=2)
    small, student = tiny(2), tiny(2)
    train(small, tiny(1), blocks(), dataclasses.replace(settings, micro=1))
    with monkeypatch.context() as patch:
        _small(patch, 1, error)
        history = train(student, tiny(1), blocks(), settings, work=tmp_path)
    assert_same_bits(bits(student), bits(small))
    assert history.halvings == [Halving(0, 3), Halving(0, 1)]
    assert read_history(tmp_path / HISTORY_FILE).halvings == history.halvings
    assert "3 instead of 6 sequences at a time, the batch stays 6" in capsys.readouterr().out


def test_halvings_hold_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after memory ran out at step 3, resumed at 2 where memory is free: the same bits."""
    settings = dataclasses.replace(SETTINGS, steps=5, batch=6, checkpoint_every=2)
    whole, student = tiny(2), tiny(2)
    accumulate = trainer.accumulate
    calls = 0

    def limited(student: Any, teacher: Any, data: Any, rows: Tensor, *rest: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise NO_MEMORY[0]
        return accumulate(student, teacher, data, rows, *rest)

    def killer(entry: Step) -> None:
        if entry.step == 3 and not (tmp_path / "again").exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "accumulate", limited)
        expected = train(whole, tiny(1), blocks(), settings)
        calls = 0
        with pytest.raises(KeyboardInterrupt):
            train(tiny(2), tiny(1), blocks(), settings, work=tmp_path, on_step=killer)
    (tmp_path / CHECKPOINT_FILE).unlink()  # step 4; the one before is of step 2
    history = train(student, tiny(1), blocks(), settings, work=tmp_path)
    assert_same_bits(bits(student), bits(whole))
    assert history.halvings == expected.halvings == [Halving(3, 3)]
    assert history.steps == expected.steps


def test_out_of_memory_with_one_block_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dataclasses.replace(SETTINGS, batch=2)
    _small(monkeypatch, 0, NO_MEMORY[0])
    with pytest.raises(UserError, match="at step 0 with one sequence at a time"):
        train(tiny(2), tiny(1), blocks(), settings)


def test_other_errors_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    _small(monkeypatch, 0, RuntimeError("shapes"))
    with pytest.raises(RuntimeError, match="shapes"):
        train(tiny(2), tiny(1), blocks(), SETTINGS)
    assert is_out_of_memory(MemoryError()) and not is_out_of_memory(ValueError("memory"))


def test_a_full_disk_under_the_history(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    with pytest.raises(UserError, match="disk is full"):
        History(path=full).add(Step(0, 1.0, 1.0, 1.0))
