"""The stage: models one after another, each result kept as it comes, then all against the clock."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from minipuzzle import model, progress
from minipuzzle.checkpoint import Checkpoint
from minipuzzle.data.blocks import recipe_blocks
from minipuzzle.data.packing import byte_lengths
from minipuzzle.families import parameter_count
from minipuzzle.memory import memory
from minipuzzle.model import Model
from minipuzzle.recipe import Recipe
from minipuzzle.runfolder import RunFolder, atomic_write_json, atomic_write_text
from minipuzzle.source import resolve

from .bpb import bits_per_byte
from .compare import Answers, accuracy, comparison
from .harness import Tasks
from .questions import keep_questions_only, prepare
from .speed import measure

SCHEMA_VERSION = 1
STUDENTS = ("pruned", "repaired", "student")


def run(recipe: Recipe, folder: RunFolder) -> Path:
    """See `minipuzzle.eval.run`."""
    folders = model_folders(recipe, folder)
    inputs = {
        "schema_version": SCHEMA_VERSION,
        "settings": recipe.eval.model_dump(mode="json"),
        "deployment": recipe.deployment.options(),
        "sources": recipe.data.model_dump(mode="json"),
        "seed": recipe.seed,
        "models": {name: Checkpoint.open(path).fingerprint() for name, path in folders.items()},
    }
    return folder.run_stage(
        "eval",
        "evaluation",
        inputs,
        lambda work: _Evaluator(recipe, folder.path, folders, work).fill(),
    )


def model_folders(recipe: Recipe, folder: RunFolder) -> dict[str, Path]:
    """The models of a run that exist: teacher first, then in the order they were made."""
    made = {name: folder.path / name for name in STUDENTS if folder.stage(name) is not None}
    return {"teacher": resolve(recipe.model, recipe.revision), **made}


def load_for_measuring(folder: Path) -> Model:
    """fp32 on the CPU; as stored on a GPU, where real models would not fit in fp32."""
    if not torch.cuda.is_available():
        return model.load(folder)
    dtype = model.stored_dtype(Checkpoint.open(folder))
    return model.load(folder, dtype=dtype, device="cuda")


@dataclass(frozen=True)
class _Evaluator:
    recipe: Recipe
    run: Path
    folders: Mapping[str, Path]
    work: Path

    def fill(self) -> None:
        """Fill the stage's folder; models evaluated by an interrupted attempt are not repeated."""
        records = {name: self._record(name) for name in self.folders}
        for name, speed in self._speeds().items():
            records[name] |= speed
        evaluation = {"schema_version": SCHEMA_VERSION, "models": records}
        if self.recipe.eval.tasks and len(records) > 1:
            answers = {name: read_answers(self._answers_file(name)) for name in records}
            teacher = answers.pop("teacher")
            evaluation["against_teacher"] = {
                name: comparison(teacher, other) for name, other in answers.items()
            }
        keep_questions_only(self.work / "tasks")
        atomic_write_json(self.work / "evaluation.json", evaluation)

    @cached_property
    def _blocks(self) -> torch.Tensor:
        """Report text as token ids, (N, T): the same for all models, they share a tokenizer."""
        tokenizer = model.load_tokenizer(self.folders["teacher"])
        return recipe_blocks(self.recipe, "report", tokenizer, self.recipe.eval.blocks)

    @cached_property
    def _tasks(self) -> Tasks | None:
        settings = self.recipe.eval
        if not settings.tasks:
            return None
        return prepare(
            settings.tasks,
            {split: source.source for split, source in self.recipe.data},
            model.load_tokenizer(self.folders["teacher"]),
            self.work / "tasks",
            limit=settings.limit,
            seed=self.recipe.seed,
        )

    def _record(self, name: str) -> dict[str, Any]:
        """Everything about one model but its speed."""
        done = self.work / "models" / f"{name}.json"
        if not done.exists():
            record = self._measure(name)
            done.parent.mkdir(exist_ok=True)
            atomic_write_json(done, record)
        record = json.loads(done.read_text(encoding="utf-8"))
        assert isinstance(record, dict)
        return record

    def _measure(self, name: str) -> dict[str, Any]:
        loaded = load_for_measuring(self.folders[name])
        sizes = memory(loaded.architecture, loaded.family, self.recipe.deployment.build()).to_json()
        lengths = byte_lengths(loaded.tokenizer, loaded.architecture.vocabulary)
        with progress.bar(f"{name}: bits per byte", len(self._blocks), "blocks") as bar:
            loss = bits_per_byte(loaded.module, self._blocks, lengths, bar=bar)
        answers: Answers = {}
        if self._tasks is not None:
            label = f"{name}: tasks"
            answers = self._tasks.answers(loaded.module, loaded.tokenizer, label=label)
        write_answers(self._answers_file(name), answers)
        return {
            "path": os.path.relpath(self.folders[name], self.run),
            "parameters": parameter_count(loaded.architecture, loaded.family),
            "memory_bytes": sizes.pop("total"),
            "memory": sizes,
            "bits_per_byte": loss.value,
            "bits_per_byte_tokens": loss.tokens,
            "tasks": {task: _accuracy_record(given) for task, given in answers.items()},
        }

    def _answers_file(self, name: str) -> Path:
        return self.work / f"samples_{name}.jsonl"

    def _speeds(self) -> dict[str, dict[str, float]]:
        """Prefill and decode of all models, in turns where they fit in memory together."""
        settings = self.recipe.eval.speed
        tokens = self._blocks.flatten()
        size = settings.batch * settings.prompt
        prompt = tokens.repeat(-(-size // len(tokens)))[:size].view(settings.batch, -1)
        groups = [list(self.folders)] if self._fit_together() else [[n] for n in self.folders]
        speeds: dict[str, dict[str, float]] = {}
        with progress.bar("speed", len(self.folders) * settings.repeats, "runs") as bar:
            for names in groups:
                modules = {name: load_for_measuring(self.folders[name]).module for name in names}
                measured = measure(
                    modules, prompt, tokens=settings.tokens, repeats=settings.repeats, bar=bar
                )
                speeds |= {name: asdict(speed) for name, speed in measured.items()}
        return speeds

    def _fit_together(self) -> bool:
        """Whether all models take less than half of the free memory."""
        if torch.cuda.is_available():
            free, scale = torch.cuda.mem_get_info()[0], 1.0
        else:  # loaded in fp32
            free, scale = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), 2.0
        stored = sum(Checkpoint.open(path).total_bytes for path in self.folders.values())
        return stored * scale < free / 2


def _accuracy_record(answers: Mapping[int, float]) -> dict[str, Any]:
    mean, stderr = accuracy(answers)
    return {"acc": mean, "acc_stderr": stderr, "n": len(answers)}


def write_answers(path: Path, answers: Answers) -> None:
    """One JSON object per question: task, number, 1.0 right or 0.0 wrong."""
    rows = (
        json.dumps({"task": task, "question": question, "acc": value})
        for task, given in answers.items()
        for question, value in given.items()
    )
    atomic_write_text(path, "".join(f"{row}\n" for row in rows))


def read_answers(path: Path) -> Answers:
    """What `write_answers` wrote."""
    answers: dict[str, dict[int, float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        answers.setdefault(row["task"], {})[row["question"]] = row["acc"]
    return answers
