"""The stages in order, each imported when it runs, and what a whole run leaves beside them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minipuzzle import progress
from minipuzzle.files import atomic_write_json, atomic_write_text, read_json, require_disk
from minipuzzle.processes import started_as_follower
from minipuzzle.recipe_io import portable_model
from minipuzzle.runfolder import RunFolder
from minipuzzle.units import parse_budget

if TYPE_CHECKING:
    from minipuzzle.recipe import Recipe

RECIPE_FILE = "recipe.yaml"
SUMMARY_FILE = "summary.json"
SUMMARY_SCHEMA = 1
MODELS = ("teacher", "pruned", "repaired", "student")
MODEL_KEYS = (
    "path",
    "parameters",
    "memory_bytes",
    "bits_per_byte",
    "tasks",
    "decode_tokens_per_second",
)


@dataclass(frozen=True)
class Stage:
    """A stage: its command, the folder it makes, and the module whose `run` does it."""

    name: str
    artefact: str
    module: str


STAGES = (
    Stage("score", "scores", "minipuzzle.prune.score"),
    Stage("search", "search", "minipuzzle.search"),
    Stage("prune", "pruned", "minipuzzle.prune"),
    Stage("repair", "repaired", "minipuzzle.prune.repair"),
    Stage("distill", "student", "minipuzzle.distill"),
    Stage("eval", "evaluation", "minipuzzle.eval"),
    Stage("export", "export", "minipuzzle.export"),
    Stage("report", "report", "minipuzzle.report"),
)
SHARED = ("score",)  # stages in which several processes share the work


def run(recipe: Recipe, folder: RunFolder) -> None:
    """Run every stage that is not done, write summary.json, print the results.

    UserError from any stage; the run folder then holds what was finished, and the same call goes
    on from there.
    """
    from minipuzzle import results

    if started_as_follower():
        for stage in STAGES:
            run_stage(stage.name, recipe, folder)
        return
    name = Path(portable_model(recipe.model)).name
    progress.say(f"{name} -> {folder.path}, budget {recipe.budget}")
    with folder.locked():
        _require_disk(recipe, folder)
        for stage in STAGES:
            run_stage(stage.name, recipe, folder)
        summary = write_summary(recipe, folder)
    progress.say(results.render(summary, folder.path))


def run_stage(name: str, recipe: Recipe, folder: RunFolder) -> None:
    """Run one stage from the files of those before it, unless it is done.

    Notes the recipe in the run folder, and the summary once the models are evaluated.
    """
    (stage,) = (stage for stage in STAGES if stage.name == name)
    if started_as_follower():  # the first process holds the lock and writes
        if name in SHARED:
            importlib.import_module(stage.module).run(recipe, folder)
        return
    with folder.locked():
        _write_recipe(recipe, folder.path)
        importlib.import_module(stage.module).run(recipe, folder)
        if folder.stage("evaluation") is not None:
            write_summary(recipe, folder)


def dry_run(recipe: Recipe, folder: RunFolder) -> None:
    """Print roughly what each stage will need; writes nothing."""
    from minipuzzle import estimate

    machine = estimate.this_machine()
    needs = estimate.estimate(recipe, machine)
    progress.say(estimate.render(needs, _done(folder), machine.free))


def _require_disk(recipe: Recipe, folder: RunFolder) -> None:
    """UserError unless the disk has room for all that is still to be written."""
    from minipuzzle import estimate

    open_stages = {stage.name for stage in STAGES} - _done(folder)
    require_disk(folder.path, estimate.disk_bytes(recipe, open_stages))


def _done(folder: RunFolder) -> set[str]:
    """Stages whose artefacts are there, of this recipe or of another."""
    return {stage.name for stage in STAGES if folder.stage(stage.artefact) is not None}


def write_summary(recipe: Recipe, folder: RunFolder) -> dict[str, Any]:
    """Make summary.json from the evaluation and the stage records, and return what is in it.

    Per model its path (relative to the run folder), parameters, memory at the deployment, bits per
    byte, tasks, decode speed; the budget, the deployment as options of `plan`, and the seconds of
    every stage when it was made. UserError when there is no evaluation.
    """
    evaluation = read_json(folder.artefact("evaluation") / "evaluation.json")
    assert evaluation is not None, "the eval stage writes evaluation.json"
    measured = evaluation["models"]
    summary = {
        "schema_version": SUMMARY_SCHEMA,
        "budget_bytes": parse_budget(recipe.budget).of(measured["teacher"]["memory_bytes"]),
        "deployment": recipe.deployment.options(),
        **{
            model: {key: measured[model][key] for key in MODEL_KEYS}
            for model in MODELS
            if model in measured
        },
        "seconds": _seconds(folder),
    }
    path = folder.path / SUMMARY_FILE
    if read_json(path) != summary:
        atomic_write_json(path, summary)
    return summary


def _seconds(folder: RunFolder) -> dict[str, float]:
    records = {stage.name: folder.stage(stage.artefact) for stage in STAGES}
    return {name: record["seconds"] for name, record in records.items() if record is not None}


def _write_recipe(recipe: Recipe, folder: Path) -> None:
    """Keep the settings in the run folder, so that it can be given to commands in their place."""
    path, text = folder / RECIPE_FILE, recipe.dump()
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        atomic_write_text(path, text)
