"""The stage `search`: study, tournament, and the records that others read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from minipuzzle.architecture import SCHEMA_VERSION
from minipuzzle.checkpoint import Checkpoint
from minipuzzle.errors import UserError
from minipuzzle.files import atomic_write_json
from minipuzzle.model import Model, load, read_architecture
from minipuzzle.recipe import Recipe
from minipuzzle.residency import computing_dtype
from minipuzzle.runfolder import RunFolder
from minipuzzle.scores import Scores
from minipuzzle.source import resolve

from .finalists import POOL
from .front import front
from .judge import Judge, study_seeds
from .latencies import recipe_latency, wants_latency
from .ranges import recipe_space
from .space import Space
from .storage import sqlite_url
from .study import Trial, search
from .tournament import check_tournament, hold_tournament

WORKER = "worker"  # folder of a process that only helps with a study
UNIMPORTANT = {"storage", "heartbeat", "timeout"}  # settings that change no result


def run(recipe: Recipe, folder: RunFolder) -> None:
    """See `minipuzzle.search.run`."""
    check_tournament(recipe)
    teacher = resolve(recipe.model, recipe.revision)
    scored = folder.artefact("scores")
    if not wants_latency(recipe):  # impossible budgets are refused before any work
        _, family, architecture = read_architecture(teacher)
        recipe_space(recipe, architecture, family)

    def body(work: Path) -> None:
        model, space, scores = _open(recipe, teacher, scored, work)
        trials = find_trials(recipe, model, space, scores, work)
        results = hold_tournament(recipe, model, space, scores, trials, work)
        write_results(recipe, space, scores, trials, results, work)

    folder.run_stage("search", "search", _inputs(recipe, folder, teacher), body)


def work_along(recipe: Recipe, folder: RunFolder) -> None:
    """Evaluate candidates of the study in the recipe's storage until it is complete.

    For more workers, on this machine or others; one of them runs the stage.

    Raises:
        UserError: when the recipe names no storage, or the budget is impossible.
    """
    if recipe.search.storage is None:
        raise UserError(
            "workers share a storage; set search.storage to an Optuna URL like "
            "postgresql+psycopg://user@host/database"
        )
    teacher = resolve(recipe.model, recipe.revision)
    scored = folder.artefact("scores")
    work = folder.path / WORKER
    work.mkdir(parents=True, exist_ok=True)
    model, space, scores = _open(recipe, teacher, scored, work)
    _study(recipe, space, scores, Judge(recipe, model, space, scores), work)


def _open(recipe: Recipe, teacher: Path, scored: Path, work: Path) -> tuple[Model, Space, Scores]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load(teacher, dtype=computing_dtype(teacher, device), device=str(device))
    scores = Scores.load(scored)
    scores.check(model.architecture, Checkpoint.open(teacher).fingerprint())
    latency = recipe_latency(recipe, model, work) if wants_latency(recipe) else None
    space = recipe_space(recipe, model.architecture, model.family, scores, latency)
    return model, space, scores


def find_trials(
    recipe: Recipe, model: Model, space: Space, scores: Scores, work: Path
) -> list[Trial]:
    """Run the study, from where an interrupted one stopped; `work` is this process' folder.

    Those that may become finalists are judged on all sequences.
    """
    judge = Judge(recipe, model, space, scores)
    trials = _study(recipe, space, scores, judge, work)
    return judge.completed(trials, POOL * recipe.search.tournament.finalists)


def _study(recipe: Recipe, space: Space, scores: Scores, judge: Judge, work: Path) -> list[Trial]:
    settings = recipe.search
    return search(
        space,
        judge,
        settings=settings,
        seed=recipe.seed,
        storage=settings.storage or sqlite_url(work / "study.db"),
        seeds=study_seeds(space, scores, judge, work / "seeds.json") if settings.seeded else (),
        identity={
            "model": scores.provenance.get("teacher"),
            "scores": scores.provenance,
            # a share of a latency is of this machine's, and so no part of what others agree on
            "budget": [space.limits.memory_bytes, settings.limits.model_dump(mode="json")],
            "deployment": recipe.deployment.options(),
            "search text": recipe.data.search.model_dump(mode="json"),
        },
        remind=judge.remind,
    )


def write_results(
    recipe: Recipe,
    space: Space,
    scores: Scores,
    trials: Sequence[Trial],
    results: Sequence[dict[str, Any]],
    work: Path,
) -> None:
    """trials.json, front.json, finalists.json, candidates/*.json, best.json."""
    (work / "candidates").mkdir(exist_ok=True)
    by_number = {trial.number: trial for trial in trials}
    best_ones = front(trials, recipe.search.objectives)
    for number in {t.number for t in best_ones} | {int(r["number"]) for r in results}:
        record = candidate(space, scores, by_number[number])
        atomic_write_json(work / "candidates" / f"{number}.json", record)
    atomic_write_json(work / "trials.json", {"trials": [trial.to_json() for trial in trials]})
    atomic_write_json(
        work / "front.json",
        {"objectives": list(recipe.search.objectives), "numbers": [t.number for t in best_ones]},
    )
    atomic_write_json(work / "finalists.json", {"finalists": list(results)})
    chosen = by_number[int(results[0]["number"])]
    atomic_write_json(work / "best.json", candidate(space, scores, chosen))


def candidate(space: Space, scores: Scores, trial: Trial) -> dict[str, Any]:
    """A candidate whole: what the next stage cuts by, and the model that it is for."""
    selection = space.selection(trial.point, scores)
    architecture = selection.apply(space.architecture)
    return {
        "schema_version": SCHEMA_VERSION,
        **trial.to_json(),
        "teacher": scores.provenance.get("teacher"),
        "budget_bytes": space.limits.memory_bytes,
        "architecture": architecture.to_json(),
        "selection": selection.to_json(),
    }


def _inputs(recipe: Recipe, folder: RunFolder, teacher: Path) -> dict[str, Any]:
    """Everything that the result depends on."""
    return {
        "teacher": Checkpoint.open(teacher).fingerprint(),
        "scores": folder.fingerprint("scores"),
        "budget": recipe.budget,
        "deployment": recipe.deployment.options(),
        "search": recipe.search.model_dump(mode="json", exclude=UNIMPORTANT),
        "distill": recipe.distill.model_dump(mode="json"),
        "repair": recipe.repair.model_dump(mode="json"),
        "data": recipe.data.model_dump(mode="json"),
        "seed": recipe.seed,
    }
