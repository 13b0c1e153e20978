"""Presets: what the papers' cases need, and what a recipe or the command line makes of a name."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minipuzzle import families
from minipuzzle.architecture import FFNLayer
from minipuzzle.cli import main
from minipuzzle.deployments import PRESETS, deployment, find, listing
from minipuzzle.errors import UserError
from minipuzzle.memory import Deployment, memory
from minipuzzle.recipe import Recipe
from minipuzzle.units import parse_budget, parse_bytes
from tests.test_core import P47, P56, PUBLISHED
from tests.tiny import write_tiny

GIB = 2**30
DOCS = Path(__file__).parent.parent / "docs" / "budgets.md"
MODEL = {"model": "some/model"}


def cut_56b(pattern: str, width: int) -> float:
    """GiB that layers of the 56B in `pattern` need at the paper's preset."""
    family, whole = families.read(PUBLISHED["56B"][0])
    by_letter = dict(zip(P56, whole.layers, strict=True)) | {"-": FFNLayer(width)}
    cut = replace(whole, layers=tuple(by_letter[letter] for letter in pattern))
    return memory(cut, family, find("rtx5090-1m").build()).total / GIB


def test_the_papers_case() -> None:
    """56B does not fit, the released 47B does; figure 10 has its finalists at 31.55 to 31.58."""
    assert cut_56b(P56, 32768) > 36
    assert 31.5 < cut_56b(P47, 30720) < 31.7
    for mamba, ffn, attention, width in ((44, 49, 5, 30720), (46, 48, 4, 32768)):
        need = cut_56b("M" * mamba + "-" * ffn + "*" * attention, width)
        assert 31.55 <= round(need, 2) <= 31.58


def test_the_a10g_keeps_nothing_back_from_a_budget_that_is_net() -> None:
    assert parse_bytes(find("a10g-128k").budget) / GIB == pytest.approx(
        22.06 * 0.95 - 1.3, abs=0.01
    )
    assert find("a10g-128k").build() == Deployment(context=2**17, state="bf16")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_sound_and_a_recipe_builds_the_same(name: str) -> None:
    preset = PRESETS[name]
    recipe = Recipe.from_mapping({**MODEL, "deployment": {"preset": name}})
    assert recipe.deployment.build() == preset.build()
    assert recipe.budget == preset.budget and parse_budget(preset.budget).bytes
    assert preset.build().reserve_bytes < 0.1 * parse_bytes(preset.budget)
    assert preset.about and preset.source
    assert f"{name} " in listing() and max(map(len, listing().splitlines())) <= 80


@pytest.mark.parametrize("name", PRESETS)
def test_the_documentation_has_every_preset_as_it_is(name: str) -> None:
    p = PRESETS[name]
    bits = f"{p.weights}, {p.kv}, {p.state}"
    cells = (f"`{name}`", p.about, p.budget, p.reserve, p.context, bits, p.source)
    assert f"| {' | '.join(cells)} |" in DOCS.read_text(encoding="utf-8").splitlines()


def test_what_is_written_beside_a_preset_wins() -> None:
    given = {"preset": "rtx4090-32k", "context": "8k", "kv": "fp8"}
    recipe = Recipe.from_mapping({**MODEL, "budget": "20GiB", "deployment": given})
    expected = replace(find("rtx4090-32k").build(), context=8192, kv="fp8")
    assert recipe.deployment.build() == expected
    assert recipe.budget == "20GiB"
    assert deployment("rtx4090-32k", {"context": 8192, "kv": "fp8"}) == expected


def test_without_a_preset_nothing_changes() -> None:
    recipe = Recipe.from_mapping(MODEL)
    assert (recipe.budget, recipe.deployment.build()) == ("83%", Deployment())
    assert deployment(None, {"weights": "fp8"}).embeddings == "fp8"


def test_a_written_recipe_with_a_preset_is_read_back_equal(tmp_path: Path) -> None:
    recipe = Recipe.from_mapping({**MODEL, "deployment": {"preset": "a10g-128k", "batch": 2}})
    (tmp_path / "recipe.yaml").write_text(recipe.dump())
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe
    assert "preset" not in recipe.deployment.options()


def test_a_preset_on_the_command_line_replaces_the_deployment_of_the_recipe() -> None:
    written = Recipe.from_mapping(
        {**MODEL, "deployment": {"preset": "rtx4090-32k", "kv": "fp8"}}
    ).to_mapping()
    overrides = ["deployment.preset=l40s-64k", "deployment.batch=4"]
    recipe = Recipe.from_mapping(written, overrides)
    assert recipe.deployment.build() == replace(find("l40s-64k").build(), batch=4)
    assert recipe.budget == find("l40s-64k").budget
    kept = Recipe.from_mapping({**written, "budget": "70%"}, overrides)
    assert kept.budget == "70%"


@pytest.mark.parametrize("name", ["rtx5090", "RTX4090-32K", "h100-80gb", "zzz"])
def test_an_unknown_preset_names_the_nearest(name: str) -> None:
    with pytest.raises(UserError, match="there is no preset '.*'; (did you mean|there are) ") as a:
        find(name)
    with pytest.raises(UserError, match=r"my.yaml: deployment\.preset: there is no preset"):
        Recipe.from_mapping({**MODEL, "deployment": {"preset": name}}, source="my.yaml")
    hint = re.search(r"did you mean (\S+)\?", str(a.value))
    assert (name == "zzz") == (hint is None)
    assert hint is None or hint[1].startswith(name.lower()[:4])


def test_plan_with_a_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(write_tiny(tmp_path / "tiny"))

    def planned(*options: str) -> dict[str, Any]:
        assert main(["plan", folder, *options, "--json"]) == 0
        record: dict[str, Any] = json.loads(capsys.readouterr().out)
        return record

    record = planned("--preset", "rtx4090-32k")
    assert record["budget_bytes"] == parse_bytes("23.64GiB")
    assert Deployment(**record["deployment"]) == find("rtx4090-32k").build()
    changed = planned("--preset", "rtx4090-32k", "--context", "2k", "--budget", "2GiB")
    assert changed["budget_bytes"] == 2 * GIB
    assert changed["deployment"] == record["deployment"] | {"context": 2048}
    assert planned("--weights", "fp8")["deployment"]["embeddings"] == "fp8"


def test_presets_are_listed_without_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--preset", "list"]) == 0
    assert capsys.readouterr().out == listing() + "\n"
    assert main(["plan", "demo", "--preset", "rtx509-1m"]) == 2
    assert "did you mean rtx5090-1m?" in capsys.readouterr().err
