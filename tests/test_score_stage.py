"""The stage `score`: what it writes, where the model lives, and bad input as one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minipuzzle import residency
from minipuzzle.checkpoint import Checkpoint
from minipuzzle.cli import main
from minipuzzle.memory import memory
from minipuzzle.model import load, save
from minipuzzle.recipe import Recipe
from minipuzzle.scores import Scores

from .tiny_text import TEXT, write_model

RECIPE = """
model: teacher
budget: 80%
data: {calibration: {source: text.txt, block: 32}}
score: {blocks: 3, unit_blocks: 5}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    write_model(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path / "r.yaml"


def score(recipe: Path, *settings: str) -> int:
    options = [word for setting in settings for word in ("--set", f"score.{setting}")]
    return main(["score", str(recipe), "--run", str(recipe.parent / "run"), *options])


def test_what_is_written_says_what_it_is_of(recipe: Path) -> None:
    assert score(recipe, "metrics=[kl]", "unit_metrics=[energy]") == 0
    scores = Scores.load(recipe.parent / "run" / "scores")
    assert scores.layers.keys() == {"kl"} and scores.hidden.keys() == {"energy"}
    assert {metric for _, _, metric in scores.units} == {"energy"}
    fingerprint = Checkpoint.open(recipe.parent / "teacher").fingerprint()
    assert scores.provenance["teacher"] == fingerprint
    assert {"calibration", "score", "data", "seed"} <= scores.provenance.keys()
    record = json.loads((recipe.parent / "run" / "scores" / "scores.json").read_text())
    assert record["schema_version"] == 2 and len(record["layers"]) == 7


def test_layers_go_until_the_budget_is_met(recipe: Path) -> None:
    assert score(recipe, "iterative=budget", "iterative_metric=hidden_mse") == 0
    scores = Scores.load(recipe.parent / "run" / "scores")
    settings = Recipe.load(recipe)
    teacher = load(recipe.parent / "teacher")
    deployment = settings.deployment.build()

    def total(steps: int) -> int:
        gone = {i for layers in scores.removal_order[:steps] for i in layers}
        left = [layer for i, layer in enumerate(teacher.architecture.layers) if i not in gone]
        smaller = replace(teacher.architecture, layers=tuple(left))
        return memory(smaller, teacher.family, deployment).total

    steps = len(scores.removals)
    assert total(steps) <= 0.8 * total(0) < total(steps - 1)


def test_a_budget_that_no_removal_meets_is_one_line(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.write_text(RECIPE.replace("80%", "5%"))
    assert score(recipe, "iterative=budget") == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "may take no other" in told
    assert not (recipe.parent / "run" / "scores").exists()


@pytest.mark.parametrize("forced", ["resident", "streamed"])
def test_where_the_model_lives_is_said_and_changes_nothing(
    recipe: Path, forced: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert score(recipe, f"residency={forced}") == 0
    assert f"free on cpu: {forced}" in capsys.readouterr().out
    first = (recipe.parent / "run" / "scores" / "stage.json").read_text()
    assert score(recipe, "residency=auto") == 0
    assert (recipe.parent / "run" / "scores" / "stage.json").read_text() == first


def test_what_does_not_fit_is_streamed(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, cpu = recipe.parent / "teacher", torch.device("cpu")
    monkeypatch.setattr(residency, "free_bytes", lambda device: 20_000)
    assert residency.open_model(teacher, cpu).store is not None
    assert residency.open_model(teacher, cpu, residency="resident").store is None
    monkeypatch.setattr(residency, "free_bytes", lambda device: 2**40)
    assert residency.open_model(teacher, cpu).store is None
    assert residency.open_model(teacher, cpu, states_bytes=2**40).store is not None
    lines = capsys.readouterr().out.splitlines()
    assert [line.rsplit(": ", 1)[1].split(",")[0] for line in lines] == [
        "streamed from the checkpoint",
        "resident",
        "resident",
        "streamed from the checkpoint",
    ]


def bad_weight(folder: Path) -> str:
    model = load(folder / "teacher")
    model.parameter("backbone.layers.4.mixer.up_proj.weight")[3, 5] = float("nan")
    save(model, folder / "teacher", dtype=torch.float32)
    return "layer 4 (ffn): backbone.layers.4.mixer.up_proj.weight holds NaN or infinite values"


def wild_weight(folder: Path) -> str:
    model = load(folder / "teacher")
    model.parameter("backbone.layers.4.mixer.up_proj.weight").mul_(1e25)
    save(model, folder / "teacher", dtype=torch.float32)
    return "layer 4 (ffn) gives NaN or infinite activations"


def no_text(folder: Path) -> str:
    (folder / "text.txt").write_text("")
    return "text.txt"


def little_text(folder: Path) -> str:
    (folder / "text.txt").write_text("x = 1\n")
    return "ask for fewer blocks or give more text"


def strange_layer(folder: Path) -> str:
    config: dict[str, Any] = json.loads((folder / "teacher" / "config.json").read_text())
    config["hybrid_override_pattern"] = "M-M*-M?"
    (folder / "teacher" / "config.json").write_text(json.dumps(config))
    return "layer 6 is of unknown type '?'"


def missing_tensor(folder: Path) -> str:
    config: dict[str, Any] = json.loads((folder / "teacher" / "config.json").read_text())
    config["use_bias"] = True
    (folder / "teacher" / "config.json").write_text(json.dumps(config))
    return "lacks tensor backbone.layers.0.mixer.in_proj.bias"


BAD = (bad_weight, wild_weight, no_text, little_text, strange_layer, missing_tensor)


@pytest.mark.parametrize("residency", ["resident", "streamed"])
@pytest.mark.parametrize("spoil", BAD, ids=lambda spoil: spoil.__name__)
def test_bad_input_is_one_line_and_nothing_is_written(
    spoil: Callable[[Path], str],
    residency: str,
    recipe: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = spoil(recipe.parent)
    capsys.readouterr()
    assert score(recipe, f"residency={residency}") == 2
    told = capsys.readouterr().err
    assert told.startswith("Error: ") and told.count("\n") == 1 and expected in told, told
    assert not (recipe.parent / "run" / "scores").exists()


def test_scores_of_other_weights_are_not_searched_with(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scored, then the weights change: the search says so."""
    assert score(recipe) == 0
    write_model(recipe.parent / "teacher", seed=5)
    run = str(recipe.parent / "run")
    assert main(["search", str(recipe), "--run", run]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "with other weights" in told
    assert not (recipe.parent / "run" / "search").exists()
