"""Evaluate every architecture of the demo's search space that fits, and keep the table.

    python scripts/enumerate_space.py runs/enumerated

Scores, space and search text are those of the demo recipe (choices are made on that text alone).
Each is judged as it is cut and with the quick repair (`kl_repaired`), whose text is the calibration
text of the packages installed here.
Stopped, it goes on. The table goes to docs/results/enumerated_space.json; scripts/bench_search.py
searches in it.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import cached_property
from pathlib import Path

import torch
from figures import RESULTS, record

from minipuzzle import progress
from minipuzzle.data.blocks import recipe_blocks
from minipuzzle.files import atomic_write_json
from minipuzzle.model import Model, load, read_architecture
from minipuzzle.pipeline import run_stage
from minipuzzle.recipe import Recipe, demo_recipe
from minipuzzle.runfolder import RunFolder
from minipuzzle.scores import Scores
from minipuzzle.search.additive import measure_prices
from minipuzzle.search.proxies import ProxyEvaluator
from minipuzzle.search.quickrepair import QuickRepair
from minipuzzle.search.ranges import recipe_space
from minipuzzle.search.space import Space
from minipuzzle.source import resolve

CHUNK = 48  # candidates evaluated together
LAST = "agreement_repaired"  # what a whole entry of the table ends with
PRICE_BLOCKS = slice(0, 2)  # of the additive prices, as in the product


class Enumeration:
    """The demo's space, whole."""

    def __init__(self, work: Path) -> None:
        self.recipe = Recipe.load(demo_recipe())
        self.folder = RunFolder(work)
        run_stage("score", self.recipe, self.folder)
        self.scores = Scores.load(self.folder.artefact("scores"))
        teacher = resolve(self.recipe.model, None)
        _, family, architecture = read_architecture(teacher)
        self.space: Space = recipe_space(self.recipe, architecture, family, self.scores)
        self.path = work / "table.json"
        self.teacher = teacher
        self.evaluated = 0

    @cached_property
    def model(self) -> Model:
        """The demo teacher."""
        return load(self.teacher, device="cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def judges(self) -> dict[str, ProxyEvaluator]:
        """Suffix of the figures -> a judge on the demo's search text."""
        search, tokenizer = self.recipe.search, self.model.tokenizer
        ids = recipe_blocks(self.recipe, "search", tokenizer, search.blocks)
        text = recipe_blocks(self.recipe, "calibration", tokenizer, search.proxy_blocks)
        repair = QuickRepair(self.model, text, ridge=self.recipe.repair.ridge)
        return {
            "": ProxyEvaluator(self.model, ids),
            "_repaired": ProxyEvaluator(self.model, ids, maker=repair),
        }

    def fill(self) -> dict[str, dict[str, float]]:
        """Point.key -> kl, accuracy, agreement of all points; kept in `table.json` as it grows."""
        table = json.loads(self.path.read_text()) if self.path.exists() else {}
        points = sorted(self.space.points(), key=lambda point: point["width"])
        left = [point for point in points if LAST not in table.get(point.key, {})]
        with progress.bar("enumerate", len(points), "architectures") as bar:
            bar.advance(len(points) - len(left))
            for start in range(0, len(left), CHUNK):
                some = left[start : start + CHUNK]
                cuts = [self.space.selection(point, self.scores) for point in some]
                for suffix, judge in self.judges.items():
                    for point, found in zip(some, judge(cuts), strict=True):
                        entry = table.setdefault(point.key, {})
                        for name in ("kl", "accuracy", "agreement"):
                            entry[name + suffix] = getattr(found, name)
                atomic_write_json(self.path, table)
                self.evaluated += len(some)
                bar.advance(len(some))
        return table

    def prices(self, judge: ProxyEvaluator) -> dict[str, object]:
        """The additive prices, from as many sequences as the stage takes."""
        prices = measure_prices(
            self.space,
            self.scores,
            lambda cuts: [p.kl for p in judge(cuts, blocks=PRICE_BLOCKS)],
        )
        return {
            "removal": [[list(unit), price] for unit, price in prices.removal.items()],
            "sizes": {
                name: [[size, price] for size, price in sizes.items()]
                for name, sizes in prices.sizes.items()
            },
        }


def main() -> None:
    """Enumerate into the folder that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("work", type=Path)
    options = parser.parse_args()
    enumeration = Enumeration(options.work)
    started = time.perf_counter()
    table = enumeration.fill()
    seconds = time.perf_counter() - started
    space = enumeration.space
    result = {
        "parameters": {p.name: list(p.choices) for p in space.parameters},
        "budget_bytes": space.limits.memory_bytes,
        "blocks": enumeration.recipe.search.blocks,
        "orders": {name: [list(unit) for unit in o] for name, o in space.layers.orders.items()},
        **{f"prices{name}": enumeration.prices(j) for name, j in enumeration.judges.items()},
        "candidates": [
            {**point.to_json(), "memory_bytes": space.costs(point).memory_bytes, **table[point.key]}
            for point in space.points()
        ],
    }
    atomic_write_json(options.results / "enumerated_space.json", result)
    if enumeration.evaluated:  # a table that was whole before is not a new measurement
        record("search", {"enumerated_candidates": (len(table), "")}, folder=options.results)
    best = min(table, key=lambda key: table[key]["kl"])
    print(f"{len(table)} candidates in {seconds:.0f} s; best: {best}, KL {table[best]['kl']:.4f}")


if __name__ == "__main__":
    main()
