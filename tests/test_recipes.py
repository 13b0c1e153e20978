"""The recipes people start from load, have candidates, and a dry run of them needs no weights.

And the paper's grid: the released 47B is in it, layer for layer.
"""

from __future__ import annotations

import json
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from paper_memory import TOLERANCE, Shape, lattice, misses, points

from minipuzzle import estimate, families, pipeline
from minipuzzle.cli import main
from minipuzzle.errors import UserError
from minipuzzle.recipe import Recipe
from minipuzzle.search.listing import Listing, choices, list_space, published_scores, render
from minipuzzle.search.space import Parameter, Point
from minipuzzle.source import resolve_config
from tests.test_core import P47, PUBLISHED
from tests.tiny import write_tiny

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
CONFIGS = ROOT / "recipes" / "configs"
PAPER = ROOT / "recipes" / "nemotron-h-56b-rtx5090.yaml"
CURVE = ROOT / "recipes" / "nemotron-h-56b-layer-mse.json"
CONFIG_OF = {
    "nvidia/Nemotron-H-56B-Base-8K": CONFIGS / "nemotron-h-56b",
    "nvidia/Nemotron-H-8B-Base-8K": CONFIGS / "nemotron-h-8b",
    "meta-llama/Llama-3.1-8B": CONFIGS / "llama-3.1-8b",
}
GIB = 2**30


def override(path: Path) -> str:
    return f"model={CONFIG_OF[Recipe.load(path).model]}"


@cache
def listed(path: Path, *, scores: bool = False) -> Listing:
    recipe = Recipe.load(path, [override(path)])
    family, architecture = resolve_config(recipe.model)
    order = published_scores(CURVE, architecture)[0] if scores else None
    return list_space(recipe, architecture, family, order)


@pytest.fixture
def grid() -> Listing:
    return listed(PAPER, scores=True)


def test_there_are_recipes() -> None:
    assert {path.stem for path in RECIPES} >= {
        "nemotron-h-56b-rtx5090",
        "nemotron-h-8b-24gb",
        "llama-8b",
    }
    assert all((folder / "config.json").is_file() for folder in CONFIG_OF.values())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_dry_run_needs_no_weights(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(estimate, "matmul_rate", lambda: 1e15)
    assert main(["run", str(path), "--set", override(path), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[2:4]] == ["score", "search"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_space_has_candidates_between_all_and_nothing(path: Path) -> None:
    listing = listed(path)
    assert listing.points is not None and listing.without_reserve is not None
    assert 0 < len(listing.points) < listing.without_reserve < listing.space.cardinality
    assert all(listing.space.fits(point) for point in listing.points)
    assert len({point.key for point in listing.points}) == len(listing.points)


def test_configs_are_the_published_shapes() -> None:
    for name, size in (("nemotron-h-56b", "56B"), ("nemotron-h-8b", "8B")):
        config, parameters = PUBLISHED[size]
        family, architecture = resolve_config(CONFIGS / name)
        assert architecture == families.read(config)[1]
        assert families.parameter_count(architecture, family) == parameters
    family, architecture = resolve_config(CONFIGS / "llama-3.1-8b")
    assert families.parameter_count(architecture, family) == 8_030_261_248


def kept(listing: Listing, mamba: int, ffn: int, attention: int, width: int) -> Point:
    values = {"mamba": 54 - mamba, "ffn": 54 - ffn, "attention": 10 - attention}
    wanted = {f"removed.{kind}": number for kind, number in values.items()} | {"width": width}
    assert listing.points is not None
    (point,) = (point for point in listing.points if point.mapping == wanted)
    return point


def test_the_papers_grid_holds_the_released_47b_layer_for_layer(grid: Listing) -> None:
    released = kept(grid, 45, 48, 5, 30720)
    assert grid.space.shape(released).pattern == P47
    assert 31.5 < grid.space.costs(released).memory_bytes / GIB <= 31.7
    chosen = kept(grid, 44, 49, 5, 30720)  # section 3.5, and figure 11
    gone = [7, 29, 73, 77, 79, 81, 83, 84, 86, 87, 88, 89, 90, 91, 93, 95, 96, 97, 99, 101]
    assert grid.gone(chosen) == gone


def test_the_grid_is_nine_widths_and_counts_are_the_recorded_ones(grid: Listing) -> None:
    width = next(p for p in grid.space.parameters if p.name == "width")
    assert width.choices == tuple(range(24576, 32769, 1024))
    results = json.loads((ROOT / "docs" / "results" / "search.json").read_text())
    assert grid.points is not None
    assert len(grid.points) == results["grid_feasible"]["value"]
    assert grid.without_reserve == results["grid_feasible_without_reserve"]["value"]


def test_the_order_of_layers_changes_no_count(grid: Listing) -> None:
    plain = listed(PAPER)
    assert plain.points == grid.points


def test_figure_10_is_sums_over_layers() -> None:
    """All 120 points; not with a Mamba layer that costs a hundredth more."""
    shapes = lattice()
    assert len(points()) == 120 and max(misses(shapes)) <= TOLERANCE
    strange = [shape.mib + 2.65 * shape.mamba for shape in shapes]
    near = [min(abs(value - point) for value in strange) <= TOLERANCE for point in points()]
    assert sum(near) < 60
    circled = {Shape(44, 49, 5, 30720).mib: 32281.23, Shape(46, 48, 4, 32768).mib: 32314.04}
    assert all(abs(ours - theirs) < TOLERANCE for ours, theirs in circled.items())


def test_limits_beside_the_budget() -> None:
    """Parameters are counted; latency, which needs a measurement, is left out."""
    path = ROOT / "recipes" / "llama-8b.yaml"
    whole = listed(path)

    def under(limit: str) -> Listing:
        recipe = Recipe.load(path, [override(path), f"search.limits.{limit}"])
        return list_space(recipe, whole.space.architecture, whole.space.family)

    assert whole.points is not None
    small = [p for p in whole.points if whole.space.costs(p).parameters <= 5.2e9]
    assert 0 < len(small) < len(whole.points)
    assert under("parameters=5.2B").points == small
    assert "limit of 5.20 B parameters" in render(under("parameters=5.2B"))
    assert under("latency=90%").points == whole.points


def test_a_list_on_the_command_line(
    tmp_path: Path,
    grid: Listing,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    few = render(grid)
    assert max(map(len, few.splitlines())) <= 80
    assert "405 fit the budget" in few and few.count("gone:") == 20
    monkeypatch.chdir(tmp_path)
    model = ["--set", override(PAPER), "--scores", str(CURVE)]
    assert main(["search", str(PAPER), *model, "--list", "--all"]) == 0
    everything = capsys.readouterr().out
    assert everything.count("gone:") == 405
    assert "gone: 7 29 73 79 81 83 84 85 86 87 88 89 90 91 93 95 96 97 99 101\n" in everything
    assert list(tmp_path.iterdir()) == []


def test_shortcuts_are_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[Recipe] = []
    monkeypatch.setattr(pipeline, "run_stage", lambda name, recipe, folder: seen.append(recipe))
    assert main(["search", "demo", "--trials", "7", "--timeout", "90", "--set", "seed=1"]) == 0
    assert (seen[0].search.trials, seen[0].search.timeout, seen[0].seed) == (7, 90.0, 1)
    assert main(["search", "demo", "--trials", "0"]) == 2


def test_a_worker_needs_a_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["search", "demo", "--worker"]) == 2
    assert "search.storage" in capsys.readouterr().err


def test_options_of_the_list_alone_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "demo", "--all"]) == 2
    assert "belong to --list" in capsys.readouterr().err


def tiny_listing(tmp_path: Path, **search: Any) -> Listing:
    write_tiny(tmp_path / "tiny")
    recipe = Recipe.from_mapping(
        {"model": str(tmp_path / "tiny"), "budget": "80%", "search": search}
    )
    family, architecture = resolve_config(recipe.model)
    return list_space(recipe, architecture, family)


def test_free_layers_name_themselves_and_share_a_row(tmp_path: Path) -> None:
    text = render(tiny_listing(tmp_path, layers="free", max_removed={"mamba": 2, "ffn": 2}))
    assert "layer.*" in text and "gone: " in text and "layer.3" not in text


def test_single_widths_stand_below_their_candidate(tmp_path: Path) -> None:
    text = render(tiny_listing(tmp_path, widths="per_layer"), 3)
    assert "width.*" in text and "width.1 " in text and "3 largest" in text


def test_a_large_space_is_named_and_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minipuzzle.search.listing.MOST", 3)
    listing = tiny_listing(tmp_path)
    assert listing.points is None and "too many to count" in render(listing)


def test_values_in_short() -> None:
    assert choices(Parameter("width", (16, 32, 48))) == "16 to 48, step 16 (3)"
    assert choices(Parameter("removed.ffn", (0, 1, 2))) == "0 to 2 (3)"
    assert choices(Parameter("heads", (8, 16, 20))) == "8 to 20 (3)"
    assert choices(Parameter("layer.1", (0, 1))) == "0, 1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "mse"}, "`metric` must be one of hidden_mse"),
        ({"pattern": "M-"}, "another pattern|other layers"),
        ({"scores": [1.0]}, "7 layers need as many scores"),
        ({"scores": ["much"] * 7}, "must be a list of numbers"),
    ],
)
def test_scores_of_another_kind_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    _, architecture = resolve_config(write_tiny(tmp_path / "tiny"))
    good = {"metric": "hidden_mse", "pattern": architecture.pattern, "scores": [1.0] * 7}
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(good))
    assert published_scores(path, architecture)[1] == "hidden_mse"
    path.write_text(json.dumps(good | change))
    with pytest.raises(UserError, match=message):
        published_scores(path, architecture)
    shutil.rmtree(tmp_path / "tiny")
    with pytest.raises(UserError, match="does not exist"):
        published_scores(tmp_path / "none.json", architecture)


def needs(*overrides: str, machine: estimate.Machine) -> dict[str, estimate.Need]:
    path = ROOT / "recipes" / "nemotron-h-8b-24gb.yaml"
    recipe = Recipe.load(path, [override(path), *overrides])
    return {need.stage: need for need in estimate.estimate(recipe, machine)}


def test_an_8b_is_compressed_but_not_distilled_on_24_gb() -> None:
    card = estimate.Machine(1e14, free=int(23.6 * GIB), gpu=True)
    found = needs(machine=card)
    over = {stage for stage, need in found.items() if need.memory_bytes > 23.6 * GIB}
    assert over == {"distill"}
    assert "too large" in estimate.render(list(found.values()), set(), card.free)
    tournament = needs(
        "search.tournament.finalists=4", "search.tournament.rungs=[{steps: 20}]", machine=card
    )
    assert tournament["search"].memory_bytes > 23.6 * GIB  # it trains
    assert tournament["search"].disk_bytes > 4 * found["search"].disk_bytes


def test_what_an_estimate_follows() -> None:
    """A GPU holds half the bytes; streamed models need less; each rung is paid once."""
    card = estimate.Machine(1e14, gpu=True)
    cpu = estimate.Machine(1e14)
    assert needs(machine=card)["eval"].memory_bytes < 0.7 * needs(machine=cpu)["eval"].memory_bytes
    streamed, resident = (
        needs(f"score.residency={where}", machine=card)["repair"].memory_bytes
        for where in ("streamed", "resident")
    )
    assert streamed < 0.5 * resident

    def seconds(rungs: str) -> float:
        settings = ["search.tournament.finalists=8", f"search.tournament.rungs={rungs}"]
        return needs(*settings, machine=card)["search"].seconds

    none = seconds("[{steps: 0}]")
    step = (seconds("[{steps: 10}]") - none) / 80
    halving = seconds("[{steps: 10, keep: 4}, {steps: 20, keep: 2}, {steps: 40}]")
    assert halving - none == pytest.approx(step * (80 + 40 + 40))
