"""The stage `prune`: slice the teacher as the search decided, then prove the cut."""

from __future__ import annotations

from pathlib import Path

from minipuzzle.checkpoint import Checkpoint
from minipuzzle.data.blocks import recipe_blocks
from minipuzzle.errors import UserError
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
    fingerprint = Checkpoint.open(teacher).fingerprint()
    selection = _chosen(recipe, folder.artefact("search"), fingerprint)
    selection.apply(read_architecture(teacher)[2])
    inputs = {"teacher": fingerprint, "selection": selection.to_json()}

    def body(work: Path) -> None:
        slice_checkpoint(teacher, work, selection)
        ids = recipe_blocks(recipe, "calibration", load_tokenizer(teacher), VERIFIED_BLOCKS)
        atomic_write_json(work / "verified.json", verify_cut(teacher, work, selection, ids))
        atomic_write_json(work / "selection.json", selection.to_json())

    folder.run_stage("prune", "pruned", inputs, body)


def _chosen(recipe: Recipe, search: Path, teacher: str) -> Selection:
    """The selection of the recipe's candidate, or of the best; for this teacher."""
    number = recipe.prune.candidate
    path = search / ("best.json" if number is None else f"candidates/{number}.json")
    if not path.exists():
        there = sorted(int(file.stem) for file in (search / "candidates").glob("*.json"))
        raise UserError(
            f"the search kept no candidate {number}; prune.candidate may be one of "
            f"{', '.join(map(str, there))}, or null for the best"
        )
    candidate = read_json(path)
    if candidate.get("teacher", teacher) not in (teacher, None):
        raise UserError(
            f"{path} is a candidate for another model; run `minipuzzle search` for this one"
        )
    return Selection.from_json(candidate.get("selection"))
