"""The stage `prune`: slice the teacher as the search decided, then prove the cut."""

from __future__ import annotations

from pathlib import Path

from minipuzzle.checkpoint import Checkpoint
from minipuzzle.data.blocks import recipe_blocks
from minipuzzle.files import atomic_write_json
from minipuzzle.jsonfile import read_json
from minipuzzle.model import load_tokenizer, read_architecture
from minipuzzle.recipe import Recipe
from minipuzzle.runfolder import RunFolder
from minipuzzle.selection import Selection
from minipuzzle.source import resolve

from .slice import slice_checkpoint
from .verify import verify_cut

VERIFIED_BLOCKS = 2


def run(recipe: Recipe, folder: RunFolder) -> None:
    """See `minipuzzle.prune.run`."""
    teacher = resolve(recipe.model, recipe.revision)
    best = read_json(folder.artefact("search") / "best.json")
    selection = Selection.from_json(best.get("selection"))
    selection.apply(read_architecture(teacher)[2])
    inputs = {
        "teacher": Checkpoint.open(teacher).fingerprint(),
        "selection": selection.to_json(),
    }

    def body(work: Path) -> None:
        slice_checkpoint(teacher, work, selection)
        ids = recipe_blocks(recipe, "calibration", load_tokenizer(teacher), VERIFIED_BLOCKS)
        atomic_write_json(work / "verified.json", verify_cut(teacher, work, selection, ids))
        atomic_write_json(work / "selection.json", selection.to_json())

    folder.run_stage("prune", "pruned", inputs, body)
