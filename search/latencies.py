"""The latency table of a recipe's space, where its limits or objectives ask for one."""

from __future__ import annotations

from pathlib import Path

from minipuzzle import progress
from minipuzzle.latency import LatencyTable, fingerprint
from minipuzzle.model import Model
from minipuzzle.recipe import Recipe
from minipuzzle.residency import computing_dtype

from .ranges import axis_sizes

FILE = "latency.json"
SECONDS = 60.0  # that the measurement may take


def wants_latency(recipe: Recipe) -> bool:
    """Whether candidates are held to a latency or judged by it."""
    return recipe.search.limits.latency is not None or "latency" in recipe.search.objectives


def recipe_latency(recipe: Recipe, model: Model, work: Path) -> LatencyTable:
    """The table for the model's device, measured once and kept in `work`.

    Raises:
        UserError: when the probes do not fit the device.
    """
    sizes = axis_sizes(model.architecture, recipe.search)
    deployment, path = recipe.deployment.build(), work / FILE
    where = (model.device, computing_dtype(model.folder, model.device))
    now = fingerprint(model.architecture, model.family, deployment, sizes, *where)
    if path.exists() and (table := LatencyTable.load(path)).fingerprint == now:
        return table
    progress.say(f"latency: measuring layers on {model.device}")
    table = LatencyTable.measure(
        model.architecture, model.family, model.config, deployment, sizes, *where, limit=SECONDS
    )
    table.save(path)
    return table
