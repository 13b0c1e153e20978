"""The stage `search` from recipe to records, and the stage `prune` on what it leaves."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from minipuzzle.cli import main
from minipuzzle.errors import UserError
from minipuzzle.jsonfile import read_json
from minipuzzle.model import read_architecture
from minipuzzle.pipeline import run_stage
from minipuzzle.recipe import Recipe
from minipuzzle.runfolder import RunFolder
from minipuzzle.search import latencies
from minipuzzle.selection import Selection

from .test_resume import RECIPE
from .tiny_text import TEXT, write_model


@pytest.fixture
def home(tmp_path: Path) -> Path:
    write_model(tmp_path / "teacher")
    for name in ("calibration", "distillation", "search", "report"):
        (tmp_path / f"{name}.txt").write_text(f"# {name}\n{TEXT}")
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path


def searched(home: Path, run: str, *overrides: str) -> tuple[Recipe, RunFolder]:
    recipe = Recipe.load(home / "r.yaml", overrides)
    folder = RunFolder(home / run)
    for stage in ("score", "search"):
        run_stage(stage, recipe, folder)
    return recipe, folder


def records(folder: RunFolder) -> dict[str, Any]:
    search = folder.artefact("search")
    return {path.stem: read_json(path) for path in search.glob("*.json")}


def test_records_of_a_search_agree_with_each_other(home: Path) -> None:
    _, folder = searched(home, "run")
    found = records(folder)
    trials = {trial["number"]: trial for trial in found["trials"]["trials"]}
    best, finalists = found["best"], found["finalists"]["finalists"]
    assert len(trials) == 6 == len({json.dumps(t["point"]) for t in trials.values()})
    assert all(trial["memory_bytes"] <= best["budget_bytes"] for trial in trials.values())
    assert best["number"] == finalists[0]["number"] and len(finalists) == 2
    for number in {*found["front"]["numbers"], *(f["number"] for f in finalists)}:
        candidate = read_json(folder.artefact("search") / "candidates" / f"{number}.json")
        assert {key: candidate[key] for key in trials[number]} == trials[number]
        cut = Selection.from_json(candidate["selection"])
        architecture = cut.apply(read_architecture(home / "teacher")[2])
        assert architecture.to_json() == candidate["architecture"]


def test_memory_as_second_objective_gives_a_front(home: Path) -> None:
    _, folder = searched(
        home, "run", "search.objectives=[kl, memory]", "search.trials=10", "search.screen=false"
    )
    found = records(folder)
    trials = {trial["number"]: trial for trial in found["trials"]["trials"]}
    front = [trials[number] for number in found["front"]["numbers"]]
    assert front
    for one in front:
        for other in trials.values():
            better = other["kl"] <= one["kl"] and other["memory_bytes"] <= one["memory_bytes"]
            assert not better or (
                (other["kl"], other["memory_bytes"]) == (one["kl"], one["memory_bytes"])
            )


@pytest.mark.parametrize(
    "settings",
    [
        ("search.layers=free",),
        ("search.proxy=repaired",),
        ("search.axes.heads={min: 0.5}", "search.axes.query_heads={min: 0.5}"),
        ("search.sampler=random", "search.seeded=false", "search.screen=false"),
        ("search.limits.parameters=85%", "search.tournament.finalists=1"),
    ],
)
def test_every_way_to_search_leads_to_a_cut_that_fits(home: Path, settings: tuple[str]) -> None:
    recipe, folder = searched(home, "run", "search.tournament.rungs=[{steps: 0}]", *settings)
    run_stage("prune", recipe, folder)
    best = records(folder)["best"]
    assert read_architecture(folder.artefact("pruned"))[2].to_json() == best["architecture"]
    assert best["memory_bytes"] <= best["budget_bytes"]


def test_latency_is_measured_where_it_limits(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latencies, "SECONDS", 3.0)
    _, folder = searched(home, "run", "search.limits.latency=95%", "search.tournament.finalists=1")
    found = records(folder)
    assert all(trial["latency"] > 0 for trial in found["trials"]["trials"])
    assert (folder.artefact("search") / "latency.json").exists()


def test_another_candidate_can_be_cut_and_a_strangers_cannot(home: Path) -> None:
    recipe, folder = searched(home, "run")
    search = folder.artefact("search")
    other = records(folder)["finalists"]["finalists"][1]["number"]
    chosen = Recipe.load(home / "r.yaml", [f"prune.candidate={other}"])
    run_stage("prune", chosen, folder)
    wanted = read_json(search / "candidates" / f"{other}.json")["architecture"]
    assert read_architecture(folder.artefact("pruned"))[2].to_json() == wanted
    with pytest.raises(UserError, match="kept no candidate 999; prune.candidate may be"):
        run_stage("prune", Recipe.load(home / "r.yaml", ["prune.candidate=999"]), folder)
    write_model(home / "other", seed=1)
    stranger = Recipe.load(home / "r.yaml", [f"model={home / 'other'}"])
    with pytest.raises(UserError, match="is a candidate for another model; run `minipuzzle search"):
        run_stage("prune", stranger, folder)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("budget=10%", "cannot be reached: the smallest .* binds most"),
        ("budget=100%", "fits the budget"),
        ("search.max_removed={mamba: 0, attention: 0, ffn: 0}", "space is empty|cannot be reached"),
        ("search.protect=[77]", "names layer 77"),
        (
            "search.storage=postgresql://nobody@localhost:1/none",
            "the storage .*(cannot be used|install)",
        ),
    ],
)
def test_impossible_searches_are_one_line(
    home: Path, capsys: pytest.CaptureFixture[str], setting: str, message: str
) -> None:
    run_stage("score", Recipe.load(home / "r.yaml"), RunFolder(home / "run"))
    extra = ["--set", "search.axes.width.min=1.0"] if "max_removed" in setting else []
    code = main(
        ["search", str(home / "r.yaml"), "--run", str(home / "run"), "--set", setting, *extra]
    )
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and re.search(message, lines[-1]), lines
