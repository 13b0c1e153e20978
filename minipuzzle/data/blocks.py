"""The blocks of token ids that a recipe's split asks for."""

from __future__ import annotations

from typing import Any

import torch

from minipuzzle.data.packing import token_blocks
from minipuzzle.data.splits import shares
from minipuzzle.recipe import Recipe

SPLITS = ("calibration", "distillation", "search", "report")


def recipe_blocks(recipe: Recipe, split: str, tokenizer: Any, blocks: int) -> torch.Tensor:
    """Token ids (blocks, block) of a split, disjoint from the recipe's other splits.

    Raises:
        UserError: for a source that cannot be read or holds too little text.
    """
    sources = {name: getattr(recipe.data, name).source for name in SPLITS}
    config = getattr(recipe.data, split)
    return token_blocks(
        config.source,
        tokenizer,
        block=config.block,
        blocks=blocks,
        seed=recipe.seed,
        split=shares(sources)[split],
    )
