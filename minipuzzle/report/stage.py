"""The stage: gather, draw, fill the template, write one file."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from minipuzzle.errors import UserError
from minipuzzle.export.card import parent_name
from minipuzzle.files import atomic_write_text
from minipuzzle.recipe import Recipe
from minipuzzle.runfolder import RunFolder
from minipuzzle.units import format_bytes, format_seconds

from . import charts, contest, lineup, view
from .gather import ARTEFACTS, Findings, gather
from .plot import Chart
from .words import tournament_words

SCHEMA_VERSION = 1
HERE = Path(__file__).parent
PAGE, STYLE, FILE = "page.html", "style.css", "report.html"


def run(recipe: Recipe, folder: RunFolder) -> Path:
    """See `minipuzzle.report.run`."""
    made = [name for name in ARTEFACTS if folder.stage(name) is not None]
    if not made:
        raise UserError(
            f"{folder.path} holds no finished stage; run `minipuzzle run` or a stage first"
        )
    inputs = {
        "schema_version": SCHEMA_VERSION,
        "recipe": recipe.to_mapping(),
        "artefacts": {name: folder.fingerprint(name) for name in made},
    }

    def body(work: Path) -> None:
        atomic_write_text(work / FILE, render(recipe, folder, gather(recipe, folder)))

    return folder.run_stage("report", "report", inputs, body)


def render(recipe: Recipe, folder: RunFolder, findings: Findings) -> str:
    """The page. Every text in it is escaped: names of models, tasks and sources are others'."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    layers = view.layers(findings)
    return environment.get_template(PAGE).render(
        title=recipe.report.title,
        style=Markup((HERE / STYLE).read_text(encoding="utf-8")),
        parent=parent_name(recipe),
        teacher=findings.teacher,
        student=findings.student,
        shape=view.shape,
        headline=view.headline(findings),
        changes=view.changes(findings),
        layers=layers,
        scored=any(layer["mse"] for layer in layers),
        removed=sum(not layer["kept"] for layer in layers),
        narrowed=any(layer["share"] < 1 for layer in layers),
        searched="search" in findings.stages,
        missing=findings.missing,
        trials=len(findings.trials),
        screened=sum(bool(trial.get("screened")) for trial in findings.trials),
        objectives=findings.front.get("objectives", ()),
        finalists=lineup.rows(findings),
        strips=lineup.strips(findings, layers),
        tournament=tournament_words(findings.finalists),
        distillation=findings.distillation,
        models=view.model_names(findings),
        quality=view.quality_rows(findings),
        tasks=bool(findings.evaluation.get("against_teacher")),
        memory=view.memory_rows(findings),
        charts=_charts(findings, layers),
        recipe=recipe,
        settings=recipe.dump(),
        plan=_plan_command(recipe),
        run=str(folder.path),
        proof=findings.proof,
        stages=_stages(findings),
        total=format_seconds(sum(stage["seconds"] for stage in findings.stages.values())),
        versions=_versions(findings),
        machine=f"{platform.system()} {platform.machine()}",
        bytes=format_bytes,
    )


def _charts(findings: Findings, layers: list[dict[str, Any]]) -> dict[str, list[Chart]]:
    """Name -> the drawing for a wide page and the one for a phone."""
    finalists, best = findings.finalists, findings.best
    searched = findings.trials, finalists, findings.front, best
    against = findings.evaluation.get("against_teacher", {}).get("student", {})
    draw: dict[str, Callable[[float], Chart | None]] = {
        "importance": lambda width: charts.importance(layers, width),
        "search": lambda width: contest.candidates(*searched, width),
        "latency": lambda width: contest.candidates(*searched, width, "latency"),
        "ranks": lambda width: contest.ranks(finalists, best, width),
        "divergences": lambda width: contest.divergences(finalists, best, width),
        "distillation": lambda width: charts.distillation(findings.history, width),
        "memory": lambda width: charts.memory(findings.models, width),
        "differences": lambda width: charts.differences(against, width),
    }
    drawn = {
        name: [draw_it(width) for width in (charts.WIDE, charts.NARROW)]
        for name, draw_it in draw.items()
    }
    return {name: [chart for chart in pair if chart is not None] for name, pair in drawn.items()}


def _stages(findings: Findings) -> list[dict[str, Any]]:
    """Name, seconds and share of the longest, for bars of time."""
    longest = max(stage["seconds"] for stage in findings.stages.values())
    return [
        {
            "name": ARTEFACTS[name],
            "seconds": format_seconds(stage["seconds"]),
            "share": round(100 * stage["seconds"] / max(longest, 1e-9), 1),
            "started": str(stage.get("started", "")).replace("T", " ")[:16],
        }
        for name, stage in findings.stages.items()
    ]


def _versions(findings: Findings) -> Mapping[str, str]:
    """The versions noted by the stage that ran last."""
    last = max(findings.stages.values(), key=lambda stage: str(stage.get("started", "")))
    versions: Mapping[str, str] = last.get("versions", {})
    return versions


def _plan_command(recipe: Recipe) -> str:
    options = {"budget": recipe.budget, **recipe.deployment.options()}
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    return shlex.join(["minipuzzle", "plan", parent_name(recipe), *words])
