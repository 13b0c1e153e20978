"""The second family goes through the stages like the first: its table is all that it has."""

from __future__ import annotations

from pathlib import Path

import pytest

from minipuzzle import pipeline
from minipuzzle.errors import UserError
from minipuzzle.families import llama
from minipuzzle.model import load, read_architecture
from minipuzzle.recipe import Recipe
from minipuzzle.runfolder import RunFolder
from tests.test_resume import RECIPE
from tests.tiny import CONFIGS, write_tiny
from tests.tiny_text import TEXT, write_tokenizer


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    write_tiny(tmp_path / "teacher", family="llama", vocab_size=264)
    write_tokenizer(tmp_path / "teacher")
    for name in ("calibration", "distillation", "search", "report"):
        (tmp_path / f"{name}.txt").write_text(f"# {name}\n{TEXT}")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_a_llama_is_scored_searched_cut_and_repaired(recipe: Path, tmp_path: Path) -> None:
    settings = ["search.trials=3", "search.tournament.finalists=1", "budget=85%"]
    loaded, folder = Recipe.load(recipe, settings), RunFolder(tmp_path / "run")
    for stage in ("score", "search", "prune", "repair"):
        pipeline.run_stage(stage, loaded, folder)

    whole = read_architecture(tmp_path / "teacher")[2]
    repaired = load(folder.artefact("repaired")).architecture
    assert repaired.pattern == "*-" * (len(repaired.layers) // 2)
    assert repaired != whole


def test_a_number_of_heads_that_transformers_refuses_is_refused_here() -> None:
    config = CONFIGS["llama"] | {"hidden_size": 32, "num_attention_heads": 6, "head_dim": 8}
    config["num_key_value_heads"] = 2
    with pytest.raises(UserError, match="multiple of its query heads.*nearest number is (4|8)"):
        llama.write_config(config, llama.read_config(config))
