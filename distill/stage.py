"""The stage: what a recipe asks for, trained and written as a checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

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

from .cache import CachedTeacher, identity, write_cache
from .config import Settings
from .history import HISTORY_FILE, History, Step
from .teacher import OnlineTeacher, Targets, Teacher, TeacherStates
from .trainer import train

SCHEMA_VERSION = 1
STARTS = ("repaired", "pruned")
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
    """The trainer's settings: the recipe's section less the cache, with the same names."""
    return Settings(**recipe.distill.model_dump(exclude=CACHE_FIELDS), seed=recipe.seed)


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
    judge = TeacherStates(teacher.module, blocks[:HELD_OUT_BLOCKS])
    targets = _targets(recipe, folder, teacher, blocks[HELD_OUT_BLOCKS:])
    del teacher  # online the targets hold it; cached its memory is free from here on
    student = load(start, device=device)
    history = _train(student, targets, judge, blocks, settings, work / TRAINING)
    save(student, work, dtype=dtype)
    # Copied, not moved: a run killed here resumes from the folder as it is.
    shutil.copyfile(work / TRAINING / HISTORY_FILE, work / HISTORY_FILE)
    atomic_write_json(work / RESULT_FILE, _result(history, settings, blocks, start.name))


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
    work.mkdir(exist_ok=True)
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


def _result(
    history: History, settings: Settings, blocks: torch.Tensor, start: str
) -> dict[str, Any]:
    """What distill.json says: held-out measures at both ends, whichever is better."""
    before, after = history.evaluations[0], history.evaluations[-1]
    return {
        "schema_version": SCHEMA_VERSION,
        "start": start,
        "steps": settings.steps,
        "tokens": settings.steps * settings.batch * blocks.shape[1],
        "held_out_tokens": HELD_OUT_BLOCKS * blocks.shape[1],
        "before": asdict(before),
        "after": asdict(after),
    }
