"""The stage: from repaired (or pruned) to student, resumable, recorded."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from minipuzzle import model
from minipuzzle.checkpoint import Checkpoint
from minipuzzle.distill import run, stage
from minipuzzle.distill.heldout import evaluate
from minipuzzle.distill.history import HISTORY_FILE, Evaluation, Step, read_history
from minipuzzle.errors import UserError
from minipuzzle.recipe import DistillConfig, Recipe
from minipuzzle.runfolder import RunFolder
from tests.tiny_text import tiny_run, write_model

DISTILL = {"steps": 6, "batch": 2, "learning_rate": 1e-3, "checkpoint_every": 2}


class Killed(Exception):
    pass


def _run(place: Path, made: tuple[str, ...] = ("repaired",), **changes: Any) -> Any:
    """A recipe and a run folder with bf16 models named in `made`."""
    recipe, folder = tiny_run(place, distill={**DISTILL, **changes})
    shutil.rmtree(folder.path / "student")  # what tiny_run made for other tests
    return recipe, _filled(folder, made)


def _filled(folder: RunFolder, made: tuple[str, ...]) -> RunFolder:
    for seed, name in enumerate(made):

        def body(work: Path, seed: int = seed) -> None:
            changes: dict[str, Any] = {"hybrid_override_pattern": "M-M*-"}
            write_model(work, seed=seed, dtype=torch.bfloat16, **changes)

        folder.run_stage("repair", name, {}, body)
    return folder


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.tensor(name) for name in checkpoint.names}


def _same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, RunFolder, Path]:
    recipe, folder = _run(tmp_path_factory.mktemp("done"), ("repaired", "pruned"))
    return recipe, folder, run(recipe, folder)


def test_the_student_is_a_trained_checkpoint(done: tuple[Recipe, RunFolder, Path]) -> None:
    recipe, folder, student = done
    teacher, start = Path(recipe.model), folder.artefact("repaired")
    loaded = model.load(student)
    assert loaded.architecture == model.read_architecture(start)[2]
    assert loaded.tokenizer.eos_token_id == model.load_tokenizer(teacher).eos_token_id
    stored = {tensor.dtype for tensor in _tensors(student).values()}
    assert stored == {model.stored_dtype(Checkpoint.open(teacher))}
    moved = {n: t.float() for n, t in _tensors(student).items()}
    before = {n: t.float() for n, t in _tensors(start).items()}
    assert all(not torch.equal(moved[name], before[name]) for name in before)
    assert not list(student.rglob("training*"))


def test_what_is_recorded(done: tuple[Recipe, RunFolder, Path]) -> None:
    _, _, student = done
    result = json.loads((student / "distill.json").read_text())
    assert (result["start"], result["steps"], result["tokens"]) == ("repaired", 6, 6 * 2 * 32)
    assert (result["before"]["step"], result["after"]["step"]) == (0, 6)
    assert result["before"]["kl"] != result["after"]["kl"]
    assert [step.step for step in read_history(student / HISTORY_FILE).steps] == list(range(6))


def test_the_gap_is_recorded(done: tuple[Recipe, RunFolder, Path]) -> None:
    result = json.loads((done[2] / "distill.json").read_text())
    assert result["teacher"]["kl"] == 0 and result["teacher"]["agreement"] == 1
    assert [entry["step"] for entry in result["curve"]] == [0, 6]
    assert [entry["tokens"] for entry in result["curve"]] == [0, 6 * 2 * 32]
    pruned = result["pruned"]["kl"]
    assert pruned != result["before"]["kl"]  # the two starts are different models here
    for entry in result["curve"]:
        assert entry["gap_recovered"]["kl"] == pytest.approx(1 - entry["kl"] / pruned)
    assert result["after"] in ({**result["before"]}, {**result["last"]})


def test_a_training_that_only_harms_gives_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, folder = _run(tmp_path, ("repaired",), steps=3)

    def worse(*arguments: Any, step: int = 0) -> Evaluation:
        found = evaluate(*arguments, step=step)
        return dataclasses.replace(found, kl=found.kl + 10 * step)

    monkeypatch.setattr("minipuzzle.distill.trainer.evaluate", worse)
    student = run(recipe, folder)
    result = json.loads((student / "distill.json").read_text())
    assert result["last"]["kl"] > result["before"]["kl"]
    assert result["after"] == result["before"] and result["pruned"] is None
    assert "no step brought the student nearer" in capsys.readouterr().out
    start = _tensors(folder.artefact("repaired"))
    assert _same(_tensors(student), start)


def test_auto_writes_what_it_found(tmp_path: Path) -> None:
    recipe, folder = _run(tmp_path, ("repaired",), learning_rate="auto", steps=3)
    student = run(recipe, folder)
    found = json.loads((student / "distill.json").read_text())["range_test"]
    assert found["steps"] == 3 and found["trials"]
    rates = read_history(student / HISTORY_FILE).learning_rates
    assert max(rates) == pytest.approx(found["learning_rate"])


def test_a_second_run_does_nothing(
    done: tuple[Recipe, RunFolder, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, folder, student = done
    monkeypatch.setattr(stage, "_make", None)
    assert run(recipe, folder) == student
    other = recipe.model_copy(
        update={"distill": recipe.distill.model_copy(update={"checkpoint_every": 5})}
    )
    assert run(other, folder) == student


@pytest.mark.parametrize("moment", ["training", "saving", "recording", "clearing"])
def test_killed_and_started_again(
    moment: str,
    done: tuple[Recipe, RunFolder, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An exception at some moment stands for a kill: nothing of ours cleans up after it."""
    recipe, _, whole = done
    folder = _filled(RunFolder(tmp_path / "run"), ("repaired", "pruned"))

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    def dying_bar(_: Any) -> Any:
        def on_step(entry: Step) -> None:
            if entry.step == 4:
                raise Killed

        return on_step

    with monkeypatch.context() as patch:
        if moment == "training":
            patch.setattr(stage, "_shown", dying_bar)
        elif moment == "saving":
            patch.setattr(stage, "save", die)
        elif moment == "recording":
            patch.setattr(stage, "atomic_write_json", die)
        else:
            patch.setattr(stage, "_clear", die)
        with pytest.raises(Killed):
            run(recipe, folder)
    with pytest.raises(UserError):
        folder.artefact("student")
    student = run(recipe, folder)
    assert _same(_tensors(student), _tensors(whole))
    for name in (HISTORY_FILE, "distill.json"):
        assert (student / name).read_bytes() == (whole / name).read_bytes()


def test_no_steps_give_the_starting_point(tmp_path: Path) -> None:
    recipe, folder = _run(tmp_path, ("pruned",), steps=0)
    student = run(recipe, folder)
    exact = {name: tensor.float() for name, tensor in _tensors(folder.artefact("pruned")).items()}
    assert _same({n: t.float() for n, t in _tensors(student).items()}, exact)
    result = json.loads((student / "distill.json").read_text())
    assert result["start"] == "pruned" and result["before"] == result["after"]


def test_every_setting_of_the_recipe_reaches_the_trainer(tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "steps": 3,
        "batch": 5,
        "learning_rate": 2e-3,
        "warmup": 0.3,
        "temperature": 2.0,
        "weight_decay": 0.1,
        "betas": (0.5, 0.6),
        "floor": 0.25,
        "clip": 0.5,
        "micro": 2,
        "checkpoint_every": 4,
        "evaluate_every": 7,
        "schedule": "wsd",
        "decay": 0.4,
        "patience": 3,
    }
    assert set(given) == set(DistillConfig.model_fields) - stage.CACHE_FIELDS
    recipe = Recipe.from_mapping({"model": str(tmp_path), "seed": 11, "distill": given})
    assert dataclasses.asdict(stage.settings_of(recipe)) == {**given, "seed": 11}


def test_nothing_to_distill(tmp_path: Path) -> None:
    recipe, folder = _run(tmp_path, ())
    with pytest.raises(UserError, match="neither repaired nor pruned"):
        run(recipe, folder)
