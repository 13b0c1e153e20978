"""The stage `search`: study, finalists, tournament, and the records that others read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from minipuzzle import progress
from minipuzzle.architecture import SCHEMA_VERSION
from minipuzzle.checkpoint import Checkpoint
from minipuzzle.data.blocks import recipe_blocks
from minipuzzle.distill.stage import settings_of
from minipuzzle.families import parameter_count
from minipuzzle.files import atomic_write_json
from minipuzzle.memory import memory
from minipuzzle.model import Model, load, read_architecture
from minipuzzle.recipe import Recipe
from minipuzzle.runfolder import RunFolder
from minipuzzle.scores import Scores
from minipuzzle.source import resolve
from minipuzzle.units import parse_budget

from .proxies import ProxyEvaluator
from .space import Space, make_space
from .study import Trial, search, sqlite_url
from .tournament import Texts, Tournament, finalists


def run(recipe: Recipe, folder: RunFolder) -> None:
    """See `minipuzzle.search.run`."""
    teacher = resolve(recipe.model, recipe.revision)
    scored = folder.artefact("scores")
    space = recipe_space(recipe, teacher)
    inputs = {
        "teacher": Checkpoint.open(teacher).fingerprint(),
        "scores": folder.fingerprint("scores"),
        "budget_bytes": space.budget_bytes,
        "deployment": recipe.deployment.options(),
        "search": recipe.search.model_dump(mode="json"),
        "distill": recipe.distill.model_dump(mode="json"),
        "ridge": recipe.repair.ridge,
        "data": recipe.data.model_dump(mode="json"),
        "seed": recipe.seed,
    }

    def body(work: Path) -> None:
        model = load(teacher)
        scores = Scores.load(scored)
        scores.check(model.architecture, Checkpoint.open(teacher).fingerprint())
        trials = find_trials(recipe, model, space, scores, work)
        results = hold_tournament(recipe, model, space, scores, finalists_of(recipe, trials), work)
        best = min(results, key=lambda result: (result["kl_distilled"], result["number"]))
        chosen = next(trial for trial in trials if trial.number == best["number"])
        write_results(space, scores, trials, results, chosen, work)

    folder.run_stage("search", "search", inputs, body)


def recipe_space(recipe: Recipe, teacher: Path) -> Space:
    """The search space of a recipe; UserError when its budget is impossible or met already."""
    _, family, architecture = read_architecture(teacher)
    deployment = recipe.deployment.build()
    total = memory(architecture, family, deployment).total
    budget = parse_budget(recipe.budget).of(total)
    return make_space(architecture, family, deployment, budget, recipe.search)


def find_trials(
    recipe: Recipe, model: Model, space: Space, scores: Scores, work: Path
) -> list[Trial]:
    """Run the study, from where an interrupted one stopped."""
    ids = recipe_blocks(recipe, "search", model.tokenizer, recipe.search.blocks)
    evaluate = ProxyEvaluator(model, ids)
    return search(
        space,
        lambda point: evaluate(space.selection(point, scores)),
        trials=recipe.search.trials,
        seed=recipe.seed,
        storage=sqlite_url(work / "study.db"),
    )


def finalists_of(recipe: Recipe, trials: list[Trial]) -> list[Trial]:
    """The recipe's number of finalists."""
    if recipe.search.finalists == 1:
        progress.say("search: one finalist means no tournament; ranks before healing may mislead")
    return finalists(trials, recipe.search.finalists)


def hold_tournament(
    recipe: Recipe,
    model: Model,
    space: Space,
    scores: Scores,
    chosen: list[Trial],
    work: Path,
) -> list[dict[str, Any]]:
    """Repair and distil every finalist for a few steps; one record each."""
    steps = recipe.search.finalist_steps if len(chosen) > 1 else 0
    texts = Texts(
        calibration=recipe_blocks(
            recipe, "calibration", model.tokenizer, recipe.search.finalist_blocks
        ),
        distillation=recipe_blocks(
            recipe, "distillation", model.tokenizer, max(1, steps) * recipe.distill.batch
        ),
        search=recipe_blocks(recipe, "search", model.tokenizer, recipe.search.blocks),
    )
    tournament = Tournament(
        teacher=model,
        space=space,
        scores=scores,
        texts=texts,
        settings=replace(settings_of(recipe), steps=steps, checkpoint_every=0),
        ridge=recipe.repair.ridge,
        work=work,
    )
    with progress.bar("finalists", len(chosen), "models") as bar:
        results = []
        for trial in chosen:
            results.append(tournament.play(trial))
            bar.advance()
    return results


def write_results(
    space: Space,
    scores: Scores,
    trials: list[Trial],
    results: list[dict[str, Any]],
    chosen: Trial,
    work: Path,
) -> None:
    """trials.json, finalists.json, candidates/*.json, best.json."""
    (work / "candidates").mkdir(exist_ok=True)
    played = {result["number"] for result in results}
    for trial in trials:
        if trial.number in played:
            record = candidate(space, scores, trial)
            atomic_write_json(work / "candidates" / f"{trial.number}.json", record)
    atomic_write_json(work / "trials.json", {"trials": [trial.to_json() for trial in trials]})
    atomic_write_json(work / "finalists.json", {"finalists": results})
    for result in results:
        (work / f"finalist-{result['number']}.json").unlink()
    atomic_write_json(work / "best.json", candidate(space, scores, chosen))


def candidate(space: Space, scores: Scores, trial: Trial) -> dict[str, Any]:
    """A candidate whole: what the next stage cuts by."""
    selection = space.selection(trial.point, scores)
    architecture = selection.apply(space.architecture)
    return {
        "schema_version": SCHEMA_VERSION,
        **trial.to_json(),
        "budget_bytes": space.budget_bytes,
        "parameters": parameter_count(architecture, space.family),
        "architecture": architecture.to_json(),
        "selection": selection.to_json(),
    }
