"""The stage: what a recipe asks for, trained and written as a checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from minipuzzle import progress
from minipuzzle.checkpoint import Checkpoint
from minipuzzle.data.blocks import recipe_blocks
from minipuzzle.errors import UserError
from minipuzzle.files import atomic_write_json
from minipuzzle.model import Model, load, save, stored_dtype
from minipuzzle.recipe import Recipe
from minipuzzle.runfolder import RunFolder
from minipuzzle.source import resolve

from .best import best_of, restore_best
from .cache import CachedTeacher, identity, write_cache
from .config import Settings
from .heldout import evaluate
from .history import HISTORY_FILE, Evaluation, History, Step
from .outcome import SCHEMA_VERSION, outcome
from .range_test import FIRST, choose_rate, growth
from .teacher import OnlineTeacher, Targets, Teacher, TeacherStates
from .trainer import train

PRUNED = "pruned"
STARTS = ("repaired", PRUNED)
RESULT_FILE = "distill.json"
TRAINING = "training"  # the folder of checkpoints, gone when the student is written
HELD_OUT_BLOCKS = 8
CACHE = "teacher-cache"  # an artefact of its own, read by every student of the same blocks
CACHE_FIELDS = {"teacher", "cache_draws", "cache_top"}


def run(recipe: Recipe, folder: RunFolder) -> Path:
    """See `minipuzzle.distill.run`."""
    start = starting_point(folder)
    teacher = resolve(recipe.model, recipe.revision)
    inputs = {
        "schema_version": SCHEMA_VERSION,
        "teacher": Checkpoint.open(teacher).fingerprint(),
        "start": folder.fingerprint(start),
        "pruned": folder.fingerprint(PRUNED) if folder.stage(PRUNED) else None,
        "settings": recipe.distill.model_dump(mode="json", exclude={"checkpoint_every"}),
        "sources": recipe.data.model_dump(mode="json"),
        "seed": recipe.seed,
    }

    def body(work: Path) -> None:
        # A kill may fall between the last file and the rename of the folder.
        if not (work / RESULT_FILE).exists():
            _make(recipe, folder, teacher, folder.artefact(start), work)
        _clear(work / TRAINING)

    return folder.run_stage("distill", "student", inputs, body)


def _clear(training: Path) -> None:
    shutil.rmtree(training, ignore_errors=True)


def starting_point(folder: RunFolder) -> str:
    """The artefact a student starts from: `repaired`, or `pruned` where nothing was repaired."""
    for artefact in STARTS:
        if folder.stage(artefact) is not None:
            return artefact
    raise UserError(
        f"{folder.path} holds neither repaired nor pruned; run `minipuzzle repair` first"
    )


def settings_of(recipe: Recipe) -> Settings:
    """The trainer's settings: the recipe's section less the cache, with the same names.

    Where the rate is to be found by trials, which only the stage holds, a guess stands for it.
    """
    values = recipe.distill.model_dump(exclude=CACHE_FIELDS)
    if values["learning_rate"] == "auto":
        values["learning_rate"] = FIRST * growth(recipe.distill.steps)
    return Settings(**values, seed=recipe.seed)


def _make(recipe: Recipe, folder: RunFolder, teacher_folder: Path, start: Path, work: Path) -> None:
    settings = settings_of(recipe)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = stored_dtype(Checkpoint.open(teacher_folder))
    # The master weights are fp32; a teacher on a GPU runs as stored, where it may be large.
    teacher = load(
        teacher_folder, dtype=dtype if device == "cuda" else torch.float32, device=device
    )
    needed = settings.steps * settings.batch
    blocks = recipe_blocks(recipe, "distillation", teacher.tokenizer, needed + HELD_OUT_BLOCKS)
    held_out, used = blocks[:HELD_OUT_BLOCKS], blocks[HELD_OUT_BLOCKS:]
    judge = TeacherStates(teacher.module, held_out)
    goal = evaluate(teacher.module, judge, held_out)
    targets = _targets(recipe, folder, teacher, used)
    del teacher  # online the targets hold it; cached its memory is free from here on
    pruned = _pruned(folder, judge, held_out, device)
    student = load(start, device=device)
    training = work / TRAINING
    training.mkdir(exist_ok=True)
    found = None
    if recipe.distill.learning_rate == "auto" and settings.steps:
        found = choose_rate(student.module, targets, used, settings, held_out, judge, training)
        settings = replace(settings, learning_rate=found["learning_rate"])
    history = _train(student, targets, judge, blocks, settings, training)
    student = _best(student, history, start, training)
    save(student, work, dtype=dtype)
    # Copied, not moved: a run killed here resumes from the folder as it is.
    shutil.copyfile(training / HISTORY_FILE, work / HISTORY_FILE)
    result = outcome(
        history,
        start=start.name,
        tokens_per_step=settings.batch * blocks.shape[1],
        held_out_tokens=held_out.numel(),
        pruned=pruned,
        teacher=goal,
        range_test=found,
    )
    atomic_write_json(work / RESULT_FILE, result)


def _pruned(
    folder: RunFolder, judge: Teacher, held_out: torch.Tensor, device: str
) -> Evaluation | None:
    """The cut model on the held-out text: where the gap begins."""
    if folder.stage(PRUNED) is None:
        return None
    return evaluate(load(folder.artefact(PRUNED), device=device).module, judge, held_out)


def _best(student: Model, history: History, start: Path, training: Path) -> Model:
    """The best of the states that were evaluated; the start, where no step improved on it."""
    best, last = best_of(history), history.evaluations[-1]
    if best is last:
        return student
    if best.step == 0:
        progress.say(
            f"distill: no step brought the student nearer to its teacher (KL {best.kl:.4f} before, "
            f"{last.kl:.4f} after); the student is what it started from, {start.name}"
        )
        return load(start, device=str(student.device))
    progress.say(
        f"distill: the student is that of step {best.step}, KL {best.kl:.4f}; "
        f"{last.kl:.4f} at the end"
    )
    restore_best(training, student.module, best.step)
    return student


def _targets(
    recipe: Recipe, folder: RunFolder, teacher: Model, blocks: torch.Tensor
) -> Teacher | Targets:
    """What the student learns from: the teacher itself, or its cache, written where it is not."""
    settings, online = recipe.distill, OnlineTeacher(teacher.module, blocks)
    if settings.teacher == "online" or not len(blocks):
        return online
    if settings.temperature != 1:
        raise UserError(
            f"distill.teacher {settings.teacher} knows the teacher at temperature 1 only; "
            f"set distill.temperature to 1 or distill.teacher to online"
        )
    made_of = identity(
        settings.teacher,
        settings.cache_draws if settings.teacher == "sampled" else settings.cache_top,
        Checkpoint.open(teacher.folder).fingerprint(),
        len(online.head),
        blocks,
        recipe.seed,
    )

    def body(work: Path) -> None:
        write_cache(work, online, blocks, made_of)

    return CachedTeacher(folder.run_stage("cache", CACHE, made_of, body), blocks, made_of)


def _train(
    student: Model,
    targets: Teacher | Targets,
    judge: Teacher,
    blocks: torch.Tensor,
    settings: Settings,
    work: Path,
) -> History:
    held_out, used = blocks[:HELD_OUT_BLOCKS], blocks[HELD_OUT_BLOCKS:]
    with progress.bar("distill", settings.steps, "steps") as bar:
        return train(
            student.module,
            targets,
            used,
            settings,
            work=work,
            held_out=held_out,
            held_out_teacher=judge,
            on_step=_shown(bar),
        )


def _shown(bar: progress.Bar) -> Callable[[Step], None]:
    """Moves the bar to the step just done; after a resume the first call makes up for the rest."""
    shown = 0

    def on_step(entry: Step) -> None:
        nonlocal shown
        bar.advance(entry.step + 1 - shown)
        bar.note(f"KL {entry.loss:.4f}")
        shown = entry.step + 1

    return on_step
