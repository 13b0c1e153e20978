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

from .config import Settings
from .history import HISTORY_FILE, History, Step
from .trainer import train

SCHEMA_VERSION = 1
STARTS = ("repaired", "pruned")
RESULT_FILE = "distill.json"
TRAINING = "training"  # the folder of checkpoints, gone when the student is written
HELD_OUT_BLOCKS = 8


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
            _make(recipe, teacher, folder.artefact(start), work)
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
    """The trainer's settings: all of the recipe's section, which has the same names."""
    return Settings(**recipe.distill.model_dump(), seed=recipe.seed)


def _make(recipe: Recipe, teacher_folder: Path, start: Path, work: Path) -> None:
    settings = settings_of(recipe)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = stored_dtype(Checkpoint.open(teacher_folder))
    # The master weights are fp32; a teacher on a GPU runs as stored, where it may be large.
    teacher = load(
        teacher_folder, dtype=dtype if device == "cuda" else torch.float32, device=device
    )
    student = load(start, device=device)
    needed = settings.steps * settings.batch
    blocks = recipe_blocks(recipe, "distillation", teacher.tokenizer, needed + HELD_OUT_BLOCKS)
    history = _train(student, teacher, blocks, settings, work / TRAINING)
    save(student, work, dtype=dtype)
    # Copied, not moved: a run killed here resumes from the folder as it is.
    shutil.copyfile(work / TRAINING / HISTORY_FILE, work / HISTORY_FILE)
    atomic_write_json(work / RESULT_FILE, _result(history, settings, blocks, start.name))


def _train(
    student: Model, teacher: Model, blocks: torch.Tensor, settings: Settings, work: Path
) -> History:
    held_out, used = blocks[:HELD_OUT_BLOCKS], blocks[HELD_OUT_BLOCKS:]
    work.mkdir(exist_ok=True)
    with progress.bar("distill", settings.steps, "steps") as bar:
        return train(
            student.module,
            teacher.module,
            used,
            settings,
            work=work,
            held_out=held_out,
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
