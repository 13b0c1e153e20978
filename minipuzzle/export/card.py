"""The model card of an exported folder: where it came from, what was cut, how good it is."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2
import yaml

from minipuzzle.checkpoint import Checkpoint
from minipuzzle.data.sources import FILE_SUFFIXES
from minipuzzle.families import parameter_count
from minipuzzle.files import read_json
from minipuzzle.memory import memory
from minipuzzle.model import read_architecture, stored_dtype
from minipuzzle.recipe import Recipe
from minipuzzle.recipe_io import portable_model
from minipuzzle.units import format_bytes, format_count, parse_budget

from .changes import describe_cut

TEMPLATE = "model_card.md"
MARKUP = {ord(character): f"\\{character}" for character in "|<>`*_[]"}
MODELS = ("teacher", "pruned", "repaired", "student")


def model_card(
    recipe: Recipe, *, teacher: Path, student: Path, evaluation: Mapping[str, Any] | None
) -> str:
    """The text of README.md for a student cut from `teacher`.

    Args:
        recipe: the run's settings.
        teacher: folder of the parent; its licence is read from its own README.md, if stated there.
        student: folder of the model the card is about.
        evaluation: contents of evaluation.json, or None when nothing was measured.
    """
    _, family, before = read_architecture(teacher)
    _, _, after = read_architecture(student)
    deployment = recipe.deployment.build()
    sizes = [memory(shape, family, deployment).total for shape in (before, after)]
    parameters = [parameter_count(shape, family) for shape in (before, after)]
    training = read_json(student / "distill.json") or {}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["line"] = _line
    return environment.get_template(TEMPLATE).render(
        parent=parent_name(recipe),
        revision=recipe.revision,
        hub_id=_hub_id(recipe),
        license=parent_license(teacher),
        before=before,
        after=after,
        changes=describe_cut(before, after),
        parameters=parameters,
        short=[format_count(count) for count in parameters],
        sizes=[format_bytes(size) for size in sizes],
        share=sizes[1] / sizes[0],
        budget=format_bytes(parse_budget(recipe.budget).of(sizes[0])),
        deployment=recipe.deployment.options(),
        dtype=str(stored_dtype(Checkpoint.open(student))).removeprefix("torch."),
        sources={split: _source_name(source.source) for split, source in recipe.data},
        distillation_tokens=training.get("tokens"),
        columns=_columns(evaluation),
        retained=_retained(evaluation),
        seed=recipe.seed,
        versions={name: version(name) for name in ("minipuzzle", "torch", "transformers")},
    )


def parent_name(recipe: Recipe) -> str:
    """What the teacher is called: a hub id, or the name of its folder (never its path)."""
    return _hub_id(recipe) or Path(portable_model(recipe.model)).name


def _hub_id(recipe: Recipe) -> str | None:
    """The teacher's hub id when it came from there."""
    return None if Path(recipe.model).expanduser().is_dir() else recipe.model


def parent_license(teacher: Path) -> str | None:
    """The licence that the teacher's own README.md states in its header, or None."""
    try:
        text = (teacher / "README.md").read_text(encoding="utf-8")
        header = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else None
    except (OSError, UnicodeDecodeError, IndexError, yaml.YAMLError):
        return None
    license = header.get("license") if isinstance(header, dict) else None
    return license if isinstance(license, str) else None


def _source_name(source: str) -> str:
    """A source without the folder of a text file: paths of this machine are nobody's business."""
    return Path(source).name if source.endswith(FILE_SUFFIXES) else source


def _columns(evaluation: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """One per model of the evaluation: its name, its record, its mean accuracy or None."""
    models = (evaluation or {}).get("models", {})
    return [
        {
            "name": name,
            "mean": fmean(task["acc"] for task in models[name]["tasks"].values())
            if models[name]["tasks"]
            else None,
            **models[name],
        }
        for name in MODELS
        if name in models
    ]


def _retained(evaluation: Mapping[str, Any] | None) -> Mapping[str, float] | None:
    """The student's share of the teacher's mean accuracy, with its interval."""
    against = (evaluation or {}).get("against_teacher", {})
    retained: Mapping[str, float] | None = against.get("student", {}).get("retained")
    return retained


def _line(text: object) -> str:
    """Text of others as one line of Markdown without markup of its own."""
    return " ".join(str(text).split()).translate(MARKUP)
