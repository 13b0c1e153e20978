"""Which rate and batch heal a repaired model best for a number of tokens, as JSON.

    python scripts/sweep_distill.py demo.yaml runs/demo/repaired result.json --tokens 49152

Every pair of --batches and --rates distils the repaired model anew on the recipe's distillation
text; KL to the teacher and next-token loss are measured on its *search* text, so that the result
may be used for a choice. Pairs that the result file holds already are not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from minipuzzle import model
from minipuzzle.data.blocks import recipe_blocks
from minipuzzle.distill.heldout import evaluate
from minipuzzle.distill.stage import settings_of
from minipuzzle.distill.teacher import TeacherStates
from minipuzzle.distill.trainer import train
from minipuzzle.files import atomic_write_json, read_json
from minipuzzle.model import Model
from minipuzzle.recipe import Recipe
from minipuzzle.source import resolve


class Sweep:
    """What all runs share: the start, the teacher's states on both texts, the results so far."""

    def __init__(self, recipe: Recipe, start: Path, tokens: int, result: Path) -> None:
        self.recipe, self.result, self.tokens = recipe, result, tokens
        teacher = model.load(resolve(recipe.model, recipe.revision))
        self.start: Model = model.load(start)
        block = recipe.data.distillation.block
        self.blocks = recipe_blocks(recipe, "distillation", teacher.tokenizer, tokens // block)
        self.search = recipe_blocks(recipe, "search", teacher.tokenizer, recipe.eval.blocks)
        self.states = TeacherStates(teacher.module, self.blocks)
        self.search_states = TeacherStates(teacher.module, self.search)
        self.before = asdict(evaluate(self.start.module, self.search_states, self.search))
        self.records: list[dict[str, Any]] = (read_json(result) or {"runs": []})["runs"]

    def play(self, batch: int, rate: float) -> None:
        """One distillation from the start; its record goes to the result file."""
        steps = len(self.blocks) // batch
        key = {"tokens": self.tokens, "batch": batch, "steps": steps, "learning_rate": rate}
        if not any(key.items() <= record.items() for record in self.records):
            settings = dataclasses.replace(
                settings_of(self.recipe), batch=batch, steps=steps, learning_rate=rate
            )
            student = model.clone(self.start)
            train(student.module, self.states, self.blocks, settings)
            self._note(key, student)

    def _note(self, key: dict[str, Any], student: Model) -> None:
        measured = asdict(evaluate(student.module, self.search_states, self.search))
        measured.pop("step")
        self.records.append(key | measured)
        print(json.dumps(self.records[-1]), flush=True)
        atomic_write_json(
            self.result,
            {
                "threads": torch.get_num_threads(),
                "search_tokens": self.search.numel(),
                "start": self.before,
                "runs": self.records,
            },
        )


def main() -> None:
    """Read the command line and run every pair."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("start", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--tokens", type=int, default=49152)
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 2e-4, 4e-4])
    given = parser.parse_args()
    sweep = Sweep(Recipe.load(given.recipe), given.start, given.tokens, given.result)
    for batch, rate in itertools.product(given.batches, given.rates):
        sweep.play(batch, rate)


if __name__ == "__main__":
    main()
