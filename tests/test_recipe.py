"""Recipes: complete, frozen, and any mistake is one line that says where and what instead."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from minipuzzle.errors import UserError
from minipuzzle.recipe import Recipe
from minipuzzle.recipe_io import keys, merged, override_mapping
from minipuzzle.source import demo_teacher

MODEL = {"model": "some/model"}


def message(mapping: dict[str, Any], *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        Recipe.from_mapping(mapping, overrides, source="my.yaml")
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_model_is_enough_and_the_rest_has_defaults() -> None:
    recipe = Recipe.from_mapping(MODEL)
    assert recipe.model == "some/model"
    assert recipe.deployment.build().context == 2048
    assert recipe.data.search.source == "python-packages:optuna,mpmath"
    assert recipe.search.max_removed.ffn == 3


def test_every_key_is_described() -> None:
    def descriptions(section: Any) -> list[str | None]:
        found = [field.description for field in section.model_fields.values()]
        for field in section.model_fields.values():
            if hasattr(field.annotation, "model_fields"):
                found += descriptions(field.annotation)
        return found

    found = descriptions(Recipe)
    assert all(found) and len(found) == len(list(keys(Recipe)))


def test_written_recipe_is_read_back_equal(tmp_path: Path) -> None:
    overrides = ["repair.ridge=1e-4", "distill.betas=[0.9, 0.99]", "deployment.context=1M"]
    recipe = Recipe.from_mapping(MODEL, overrides)
    (tmp_path / "recipe.yaml").write_text(recipe.dump())
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe


def test_frozen() -> None:
    recipe = Recipe.from_mapping(MODEL)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 1


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        ({**MODEL, "serch": {"trials": 3}}, "my.yaml: serch: .*did you mean search\\?"),
        (
            {**MODEL, "search": {"trails": 3}},
            "my.yaml: search.trails: .*did you mean search.trials\\?",
        ),
        ({**MODEL, "trials": 3}, "my.yaml: trials: .*did you mean search.trials\\?"),
        (
            {**MODEL, "search": {"max_removed": {"ffm": 1}}},
            "search.max_removed.ffm: .*did you mean search.max_removed.ffn\\?",
        ),
        ({}, "my.yaml: model: is missing"),
        ({**MODEL, "seed": "one"}, "my.yaml: seed: .*integer, not 'one'"),
        ({**MODEL, "seed": True}, "my.yaml: seed: .*integer, not True"),
        ({**MODEL, "seed": -1}, "seed: .*greater than or equal to 0, not -1"),
        ({**MODEL, "search": 3}, "search: holds keys of its own, so it cannot be 3"),
        ({**MODEL, "budget": 83}, 'budget: budget "83" has no unit'),
        ({**MODEL, "budget": "83 percent"}, "budget: .*unknown unit percent"),
        (
            {**MODEL, "deployment": {"weights": "fp16"}},
            "deployment.weights: .*'nvfp4'.* not 'fp16'",
        ),
        (
            {**MODEL, "deployment": {"context": "1m"}},
            "deployment.context: .*unknown unit m; did you mean M\\?",
        ),
        ({**MODEL, "eval": {"tasks": "demo"}}, "eval.tasks: .*list, not 'demo'"),
        ({**MODEL, "distill": {"learning_rate": float("nan")}}, "finite number, not nan"),
        ({**MODEL, "sed": 1, "sead": 2}, "did you mean seed\\? \\(and 1 more\\)"),
    ],
)
def test_mistakes(mapping: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        Recipe.from_mapping(mapping, source="my.yaml")
    message(mapping)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("serch.trials=3", "--set: serch: there is no such key; did you mean search?"),
        ("trials=3", "--set: trials: there is no such key; did you mean search.trials?"),
        ("seed=x", "--set: seed: input should be a valid integer, not 'x'"),
        ("seed", '--set "seed" is not of the form key=value, like seed=1'),
        ("=1", '--set "=1" is not of the form key=value, like seed=1'),
        ("a..b=1", '--set "a..b=1" is not of the form key=value, like seed=1'),
    ],
)
def test_mistakes_in_overrides_name_the_option(override: str, expected: str) -> None:
    assert message(MODEL, override) == expected


def test_overrides_win_and_leave_the_rest() -> None:
    mapping = {**MODEL, "search": {"trials": 5, "blocks": 6}, "seed": 3}
    recipe = Recipe.from_mapping(mapping, ["search.trials=7", "search.trials=8", "eval.limit=9"])
    assert (recipe.search.trials, recipe.search.blocks, recipe.seed) == (8, 6, 3)
    assert recipe.eval.limit == 9


def test_a_split_without_a_source_keeps_the_default_one() -> None:
    recipe = Recipe.from_mapping({**MODEL, "data": {"search": {"block": 64}}})
    assert recipe.data.search.block == 64
    assert recipe.data.search.source == "python-packages:optuna,mpmath"


def test_paths_are_taken_from_the_recipe_and_overrides_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipes" / "model").mkdir(parents=True)
    path = tmp_path / "recipes" / "r.yaml"
    path.write_text("model: model\ndata: {report: {source: text.jsonl}}\n")
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.load(path, ["data.search.source=other.txt"])
    assert recipe.model == str(tmp_path / "recipes" / "model")
    assert recipe.data.report.source == str(tmp_path / "recipes" / "text.jsonl")
    assert recipe.data.search.source == str(tmp_path / "other.txt")
    assert Recipe.load(path, ["model=./recipes/model"]).model == recipe.model
    assert Recipe.load(path, ["model=hub/id"]).model == "hub/id"


def test_the_bundled_teacher_is_called_demo_in_files(tmp_path: Path) -> None:
    recipe = Recipe.from_mapping({"model": "demo"})
    assert recipe.model == str(demo_teacher())
    assert recipe.to_mapping()["model"] == "demo"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: [", "line 1: .*expected"),
        ("model: a\nmodel: b\n", "line 2: the key model stands twice"),
        ("- model\n", "is not a recipe"),
        ("", "is not a recipe"),
        ("model: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
    ],
)
def test_files_that_are_no_recipes(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=expected):
        Recipe.load(path)


def test_missing_binary_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no recipe"):
        Recipe.load(tmp_path / "r.yaml")
    with pytest.raises(UserError, match="is a folder"):
        Recipe.load(tmp_path)
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a text file"):
        Recipe.load(tmp_path / "b.yaml")


def test_numbers_in_scientific_notation_are_numbers() -> None:
    given = override_mapping(["a=1e-3", "b=1E3", "c=1.5e+2", "d=e3", "e=0x10", "f=1"])
    assert given == {"a": 1e-3, "b": 1e3, "c": 150.0, "d": "e3", "e": 16, "f": 1}


VALUES = st.recursive(
    st.integers(),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=3),
)
MAPPINGS = st.dictionaries(st.sampled_from("abc"), VALUES, max_size=3)


def leaves(mapping: dict[str, Any], prefix: str = "") -> dict[str, int]:
    """Dotted key -> value, for the values that are no mappings."""
    found: dict[str, int] = {}
    for key, value in mapping.items():
        if isinstance(value, dict):
            found |= leaves(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


@given(MAPPINGS, MAPPINGS)
def test_merging_lets_the_top_win_and_keeps_the_rest(
    base: dict[str, Any], top: dict[str, Any]
) -> None:
    both, above = leaves(merged(base, top)), leaves(top)
    assert above.items() <= both.items()
    assert set(both) <= set(above) | set(leaves(base))
    assert merged(merged(base, top), top) == merged(base, top)
    assert merged(base, {}) == base == merged({}, base)
    hidden = {
        key
        for key in leaves(base)
        for other in above
        if key == other or key.startswith(f"{other}.") or other.startswith(f"{key}.")
    }
    kept = {key: value for key, value in leaves(base).items() if key not in hidden}
    assert kept.items() <= both.items()


def test_no_torch() -> None:
    code = "import sys, minipuzzle.recipe; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
