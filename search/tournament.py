"""The tournament: finalists are repaired and distilled in rounds, and ranked by what they are then.

Ranks before healing do not predict ranks after it (Nemotron-H, arXiv 2504.03624, table 6). Rounds
are synchronous: all finalists reach the steps of a rung before any goes on (successive halving,
arXiv 1502.07943). A finalist that goes on continues one training: the learning rate follows a
schedule over the steps of the *last* rung, so earlier rungs judge all finalists in the middle of
it, at the same high rate, and nothing is trained twice. Those who reach the end of the last rung
are ranked by tasks, or by KL where no tasks are named; its `keep` therefore counts for nothing.

Everything that is done is on disk: a tournament that was killed goes on to the same result.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import torch

from minipuzzle import progress
from minipuzzle.checkpoint import Checkpoint
from minipuzzle.data.blocks import recipe_blocks
from minipuzzle.data.sources import source_items
from minipuzzle.distill.heldout import evaluate
from minipuzzle.distill.stage import settings_of
from minipuzzle.distill.teacher import Teacher, TeacherStates
from minipuzzle.distill.trainer import train
from minipuzzle.errors import UserError
from minipuzzle.files import require_disk
from minipuzzle.model import Model, load, save, stored_dtype
from minipuzzle.prune.repair import repair
from minipuzzle.prune.slice import slice_checkpoint
from minipuzzle.recipe import Recipe
from minipuzzle.scores import Scores

from .finalists import finalists
from .space import Space
from .standings import (
    Finalist,
    Record,
    note_ranks,
    rank_table,
    start_record,
    task_mean,
    value_after,
)

if TYPE_CHECKING:
    from minipuzzle.eval.harness import Tasks

    from .trials import Trial

FOLDER = "tournament"  # of records and, while it is held, of models
STATES_BYTES = {"cpu": 2**30, "cuda": 8 * 2**30}  # of the teacher's answers, kept for all finalists
CHECKPOINT_BYTES = 12  # of a parameter in a training's checkpoint: itself and two moments


def hold_tournament(
    recipe: Recipe,
    model: Model,
    space: Space,
    scores: Scores,
    trials: Sequence[Trial],
    work: Path,
) -> list[Record]:
    """Choose the finalists of a study and let them play: one record each, the best first.

    A record is that of the trial and: `layers` (per layer of the teacher None or the units kept
    along its cut axes), `cut` and `repaired` (`kl` to the teacher, `agreement` and next-token
    `loss` on search text), `rungs` (the same after each, with `steps`), `tasks` (accuracies) and
    `ranks` among those who got so far, from `proxy` on.

    Args:
        recipe: its `search.tournament`, `repair`, `distill` and `data` sections.
        model: the teacher, resident.
        space: what the trials are points of.
        scores: of the teacher.
        trials: all of the study.
        work: folder that the tournament goes on from; the records stay in it, models do not.

    Raises:
        UserError: for a recipe that `check_tournament` refuses, too little text or disk, and
            activations or losses that are not finite.
    """
    check_tournament(recipe)
    chosen = finalists(trials, space, recipe.search.tournament.finalists)
    assert chosen, "no trial fits"
    if len(chosen) == 1:
        progress.say(
            "search: one finalist, so no tournament is held; it is the best before healing,\n"
            "although ranks often change with repair and distillation"
        )
        return [start_record(chosen[0], space.selection(chosen[0].point, scores))]
    tournament = Tournament(recipe, model, work / FOLDER)
    records = tournament.play(
        [Finalist(trial, space.selection(trial.point, scores), work / FOLDER) for trial in chosen]
    )
    progress.say("ranks of the finalists:\n" + rank_table(records))
    tournament.clear()
    return records


def check_tournament(recipe: Recipe) -> None:
    """UserError for rungs out of order and for tasks that look at text kept for the report."""
    settings = recipe.search.tournament
    steps = [rung.steps for rung in settings.rungs]
    if any(b <= a for a, b in zip(steps, steps[1:], strict=False)):
        raise UserError(
            f"search.tournament.rungs must have more and more steps, got {steps}; "
            f"steps are counted from the beginning"
        )
    if not settings.tasks:
        return
    from minipuzzle.eval.questions import MADE_FROM  # lm-eval takes seconds to import

    for name in settings.tasks:
        if MADE_FROM.get(name) == "report":
            raise UserError(
                f"search.tournament.tasks: the questions of {name!r} are made from the report "
                f"split, which no choice may see; name demo_search instead"
            )
        both = source_items(recipe.data.search.source) & source_items(recipe.data.report.source)
        if name in MADE_FROM and both:
            raise UserError(
                f"search.tournament.tasks: the questions of {name!r} would be made from texts that "
                f"data.report names too; name others in data.search"
            )


class Tournament:
    """What all finalists share: the teacher with its answers, the texts, the settings."""

    def __init__(self, recipe: Recipe, teacher: Model, work: Path) -> None:
        self.recipe, self.teacher, self.work = recipe, teacher, work
        self.rules = recipe.search.tournament
        self.steps = self.rules.rungs[-1].steps
        self.settings = replace(settings_of(recipe), steps=self.steps, evaluate_every=0)
        self.dtype = stored_dtype(Checkpoint.open(teacher.folder))
        work.mkdir(parents=True, exist_ok=True)

    def play(self, players: Sequence[Finalist]) -> list[Record]:
        """Repair, all rungs, tasks; the records, the best first."""
        self._require_disk(players)
        with progress.bar("repair", len(players), "finalists") as bar:
            for player in players:
                self.prepare(player)
                bar.advance()
        note_ranks(sorted(players, key=lambda p: (p.trial.proxies.kl, p.number)), "proxy")
        note_ranks(sorted(players, key=lambda p: (p.record["repaired"]["kl"], p.number)), "repair")
        beaten: list[Finalist] = []
        alive = list(players)
        for rung in self.rules.rungs:
            alive = self._rung(alive, rung.steps)
            if rung.steps < self.steps:
                alive, out = alive[: rung.keep], alive[rung.keep :]
                beaten = out + beaten
        return [player.record for player in self._by_tasks(alive) + beaten]

    def _rung(self, alive: Sequence[Finalist], steps: int) -> list[Finalist]:
        """All of them distilled up to `steps`, the best first."""
        with progress.bar(f"to step {steps}", len(alive), "finalists") as bar:
            for player in alive:
                self.distil(player, steps)
                bar.advance()
        ranked = sorted(alive, key=lambda p: (value_after(p, steps), p.number))
        note_ranks(ranked, f"step {steps}")
        progress.say(
            f"  step {steps}: {len(alive)} finalists, #{ranked[0].number} leads, "
            f"KL {value_after(ranked[0], steps):.4f}"
        )
        return ranked

    def prepare(self, player: Finalist) -> None:
        """Cut and repair a finalist, once; measure it after both."""
        if "repaired" in player.record:
            return
        cut, repaired = player.folder / "cut", player.folder / "repaired"
        shutil.rmtree(player.folder, ignore_errors=True)
        slice_checkpoint(self.teacher.folder, cut, player.selection, sync=False)
        before = self.measure(self._load(cut))
        student = self._load(cut, next(self.teacher.module.parameters()).dtype)
        repair(
            self.teacher,
            student,
            player.selection,
            self.calibration,
            **self.recipe.repair.model_dump(exclude={"blocks"}),
            dtype=self.dtype,
            label=f"#{player.number}: repair",
        )
        save(student, repaired, dtype=self.dtype)
        shutil.rmtree(cut)
        player.note(cut=before, repaired=self.measure(self._load(repaired)))

    def distil(self, player: Finalist, steps: int) -> None:
        """Train a finalist on to `steps` in all, and measure it then."""
        if player.after(steps) is None:
            found = {"steps": steps, **self.measure(self.student(player, steps))}
            player.note(rungs=[*player.record["rungs"], found])

    def student(self, player: Finalist, steps: int) -> Model:
        """A finalist after `steps` of training, from where its checkpoint is (not beyond)."""
        student = self._load(player.folder / "repaired")
        training = player.folder / "training"
        training.mkdir(exist_ok=True)
        with progress.bar(f"#{player.number}: distill", steps, "steps") as bar:
            train(
                student.module,
                self.answers,
                self.distillation,
                self.settings,
                work=training,
                on_step=lambda entry: bar.advance(),
                until=steps,
            )
        return student

    def measure(self, student: Model) -> Record:
        """KL to the teacher, agreement with it and next-token loss on search text."""
        found = evaluate(student.module, self.judge, self.search)
        return {"kl": found.kl, "agreement": found.agreement, "loss": found.loss}

    def _by_tasks(self, alive: Sequence[Finalist]) -> list[Finalist]:
        """Those who got to the end, by mean accuracy where tasks are named; ties by KL."""
        if not self.rules.tasks:
            return list(alive)
        for player in alive:
            if "tasks" not in player.record:
                module = self.student(player, self.steps).module
                answers = self.tasks.answers(
                    module, self.teacher.tokenizer, label=f"#{player.number}: tasks"
                )
                player.note(tasks={name: fmean(a.values()) for name, a in answers.items()})
        ranked = sorted(
            alive, key=lambda p: (-task_mean(p.record), value_after(p, self.steps), p.number)
        )
        note_ranks(ranked, "tasks")
        return ranked

    def clear(self) -> None:
        """Remove all models and trainings; the records stay."""
        for path in self.work.iterdir():
            if path.is_dir():
                shutil.rmtree(path)

    @cached_property
    def search(self) -> torch.Tensor:
        """Text that finalists are measured on, (B, T)."""
        return recipe_blocks(
            self.recipe, "search", self.teacher.tokenizer, self.recipe.search.blocks
        )

    @cached_property
    def calibration(self) -> torch.Tensor:
        """Text that finalists are repaired on, (B, T)."""
        return recipe_blocks(self.recipe, "calibration", self.teacher.tokenizer, self.rules.blocks)

    @cached_property
    def distillation(self) -> torch.Tensor:
        """Text that finalists are trained on, (B, T): each block once."""
        needed = max(1, self.steps * self.settings.batch)
        return recipe_blocks(self.recipe, "distillation", self.teacher.tokenizer, needed)

    @cached_property
    def judge(self) -> TeacherStates:
        """The teacher on the search text."""
        return TeacherStates(self.teacher.module, self.search)

    @cached_property
    def answers(self) -> torch.nn.Module | Teacher:
        """The teacher on the distillation text, computed once where there is room."""
        itemsize = next(self.teacher.module.parameters()).element_size()
        needed = self.distillation.numel() * self.teacher.architecture.hidden * itemsize
        if needed > STATES_BYTES.get(self.teacher.device.type, STATES_BYTES["cpu"]):
            return self.teacher.module
        return TeacherStates(self.teacher.module, self.distillation)

    @cached_property
    def tasks(self) -> Tasks:
        """The questions, of the search split where they are made here."""
        from minipuzzle.eval.questions import prepare  # lm-eval takes seconds to import

        return prepare(
            self.rules.tasks,
            {split: source.source for split, source in self.recipe.data},
            self.teacher.tokenizer,
            self.work / "tasks",
            limit=self.rules.limit,
            seed=self.recipe.seed,
        )

    def _load(self, folder: Path, dtype: torch.dtype = torch.float32) -> Model:
        return load(folder, dtype=dtype, device=str(self.teacher.device))

    def _require_disk(self, players: Sequence[Finalist]) -> None:
        """UserError unless all finalists can be stored at the same time, with their trainings."""
        each = 2 * CHECKPOINT_BYTES + self.dtype.itemsize  # the last two are kept
        sizes = [p.trial.costs.parameters for p in players if not p.folder.exists()]
        # one more training: a checkpoint is whole before it replaces the one before it
        require_disk(self.work, sum(sizes) * each + max(sizes, default=0) * CHECKPOINT_BYTES)
