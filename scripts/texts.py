"""Token blocks of a recipe's splits, kept in a file for machines that lack the packages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from minipuzzle.data.blocks import recipe_blocks
from minipuzzle.errors import UserError
from minipuzzle.recipe import Recipe


def split_blocks(
    recipe: Recipe, tokenizer: Any, wanted: Mapping[str, int], kept: Path | None
) -> dict[str, torch.Tensor]:
    """Split -> the first of its blocks, (wanted, T), from the file `kept` or, without it, read.

    What is read is written to `kept`. UserError where the file holds less than is wanted.
    """
    if kept is None or not kept.exists():
        found = {s: recipe_blocks(recipe, s, tokenizer, n) for s, n in wanted.items()}
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            save_file(found, kept)
        return found
    found = load_file(kept)
    for split, blocks in wanted.items():
        if split not in found or len(found[split]) < blocks:
            raise UserError(f"{kept} holds less than {blocks} blocks of {split}; delete it")
    return {split: found[split][:blocks] for split, blocks in wanted.items()}
