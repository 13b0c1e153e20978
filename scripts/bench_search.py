"""How soon a study finds the best of a space whose every architecture has been evaluated.

    python scripts/bench_search.py [--proxy cut]

Judges from the table of docs/results/enumerated_space.json (scripts/enumerate_space.py). Without
seeded points each sampler searches with 10 seeds, by 10 % of the architectures; then the same with
the additive and greedy solutions in front, and the additive solution alone. An evaluation is a
distinct architecture; repeats are free. `random` draws what the study then makes fit, as it does
with everything that is proposed; `uniform` draws from all architectures that fit, without a study.
Figures go to docs/results/search.json.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from figures import RESULTS, record
from scipy.stats import spearmanr

from minipuzzle.files import atomic_write_json
from minipuzzle.model import read_architecture
from minipuzzle.recipe import Recipe, demo_recipe
from minipuzzle.search.additive import Prices, additive_seeds
from minipuzzle.search.proxies import Proxies
from minipuzzle.search.ranges import recipe_space
from minipuzzle.search.space import Layers, Point, Space
from minipuzzle.search.storage import sqlite_url
from minipuzzle.search.study import Judged, search
from minipuzzle.source import resolve

SEEDS = 10
SHARE = 0.1  # of the architectures are evaluated
BEST = 0.01  # of them, by rank, count as found
UNIFORM = "uniform"
SAMPLERS = ("auto", "random", UNIFORM)


class TableSpace:
    """The enumerated space with what every point of it is worth."""

    def __init__(self, path: Path, proxy: str) -> None:
        suffix = {"cut": "", "repaired": "_repaired"}[proxy]
        record_: Mapping[str, Any] = json.loads(path.read_text())
        self.recipe = Recipe.load(demo_recipe())
        _, family, architecture = read_architecture(resolve(self.recipe.model, None))
        space = recipe_space(self.recipe, architecture, family)
        orders = {
            name: [tuple(unit) for unit in order] for name, order in record_["orders"].items()
        }
        self.space: Space = replace(space, layers=Layers(orders=orders))
        names = [parameter.name for parameter in space.parameters]
        self.table = {
            space.canonical({name: entry[name] for name in names}): {
                name: entry[name + suffix] for name in ("kl", "accuracy", "agreement")
            }
            for entry in record_["candidates"]
        }
        assert set(self.table) == set(self.space.points()), "the space is not the table's"
        ranked = sorted(self.table, key=lambda point: float(self.table[point]["kl"]))
        self.ranks = {point: i for i, point in enumerate(ranked)}
        prices = record_["prices" + suffix]
        removal, sizes = prices["removal"], prices["sizes"]
        self.prices = Prices(
            {tuple(unit): price for unit, price in removal},
            {name: {size: price for size, price in values} for name, values in sizes.items()},
        )
        self.good = max(1, int(BEST * len(self.table)))

    def judge(self, points: Sequence[Point]) -> list[Judged]:
        """What the table says."""
        entries = [self.table[point] for point in points]
        return [
            Judged(Proxies(e["kl"], e["accuracy"], e["agreement"], 8), screened=False)
            for e in entries
        ]

    def study(self, sampler: str, seed: int, trials: int, seeds: Sequence[Point]) -> list[int]:
        """Ranks of the evaluated architectures, in order."""
        if sampler == UNIFORM:
            drawn = random.Random(seed).sample(list(self.table), trials)
            return [self.ranks[point] for point in [*seeds, *drawn][:trials]]
        settings = self.recipe.search.model_copy(update={"sampler": sampler, "trials": trials})
        with tempfile.TemporaryDirectory() as folder:
            found = search(
                self.space,
                self.judge,
                settings=settings,
                seed=seed,
                storage=sqlite_url(Path(folder) / "study.db"),
                seeds=seeds,
            )
        return [self.ranks[trial.point] for trial in found]

    def until_good(self, ranks: Sequence[int]) -> int | None:
        """Evaluations until one of the best was among them."""
        return next((i + 1 for i, rank in enumerate(ranks) if rank < self.good), None)


def compare(table: TableSpace, samplers: Sequence[str], seeds: int) -> list[dict[str, Any]]:
    """One row per sampler, with and without seeded points."""
    trials = int(SHARE * len(table.table))
    rows = []
    for seeded in (False, True):
        points = additive_seeds(table.space, table.prices) if seeded else []
        for sampler in samplers:
            runs = [table.study(sampler, seed, trials, points) for seed in range(seeds)]
            firsts = [table.until_good(ranks) for ranks in runs]
            hits = [first for first in firsts if first is not None]
            rows.append(
                {
                    "sampler": sampler,
                    "seeded": seeded,
                    "evaluations": trials,
                    "found": len(hits),
                    "seeds": seeds,
                    "median_evaluations": statistics.median(hits) if hits else None,
                    "most_evaluations": max(hits, default=None),
                    "best_ranks": [min(ranks) for ranks in runs],
                }
            )
            print(rows[-1], flush=True)
    return rows


def additive(table: TableSpace) -> dict[str, Any]:
    """How good the additive prices are: the rank of their best point, and of all by rank."""
    predicted = {point: table.prices.of(table.space, point) for point in table.table}
    points = list(predicted)
    worth = [float(table.table[point]["kl"]) for point in points]
    correlation = spearmanr([predicted[point] for point in points], worth).statistic
    seeds = additive_seeds(table.space, table.prices)
    best = min(predicted, key=lambda point: predicted[point])
    top = sorted(table.ranks, key=lambda point: table.ranks[point])[:10]
    return {
        "rank_of_best": table.ranks[best],
        "ranks_of_seeds": [table.ranks[seed] for seed in seeds],
        "rank_correlation": round(float(correlation), 4),
        "candidates": len(points),
        "by_layers_gone": interactions(table, predicted),
        "best_points": [
            {**p.to_json(), "kl": table.table[p]["kl"], "additive": round(predicted[p], 4)}
            for p in [best, *top]
        ],
    }


def interactions(
    table: TableSpace, predicted: Mapping[Point, float]
) -> list[dict[str, float | int]]:
    """What candidates cost beyond the sum of their prices, by the number of layers gone.

    `ratio`: median of KL over price; `rank_correlation`: among candidates with as many gone.
    """
    groups: dict[int, list[Point]] = {}
    for point in predicted:
        groups.setdefault(len(table.space.gone(point)), []).append(point)
    rows: list[dict[str, float | int]] = []
    for gone, points in sorted(groups.items()):
        worth = [float(table.table[point]["kl"]) for point in points]
        prices = [predicted[point] for point in points]
        ratios = [kl / price for kl, price in zip(worth, prices, strict=True)]
        rows.append(
            {
                "layers_gone": gone,
                "candidates": len(points),
                "ratio": round(statistics.median(ratios), 3),
                "rank_correlation": round(float(spearmanr(prices, worth).statistic), 3),
            }
        )
    return rows


def main() -> None:
    """Search in the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samplers", nargs="+", default=SAMPLERS)
    parser.add_argument("--proxy", choices=["cut", "repaired"], default="repaired")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--additive", action="store_true", help="write that part alone anew")
    parser.add_argument("--record", action="store_true", help="write the figures to docs/results")
    options = parser.parse_args()
    table = TableSpace(RESULTS / "enumerated_space.json", options.proxy)
    result = {"additive": additive(table)}
    print(json.dumps(result["additive"], indent=1))
    path = RESULTS / "bench_search.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if options.additive:
        atomic_write_json(path, {**known, options.proxy: {**known[options.proxy], **result}})
        return
    rows = compare(table, options.samplers, options.seeds)
    if not options.record:
        return
    default = next(r for r in rows if r["sampler"] == "auto" and not r["seeded"])
    known = json.loads(path.read_text()) if path.exists() else {}
    atomic_write_json(path, {**known, options.proxy: {**result, "studies": rows}})
    end = "" if options.proxy == table.recipe.search.proxy else f"_{options.proxy}"
    figures: dict[str, tuple[float, str]] = {
        f"seeds_of_10_in_best_percent{end}": (default["found"], "of 10"),
        f"evaluations_share{end}": (round(default["evaluations"] / len(table.table), 4), ""),
        f"additive_rank_of_best{end}": (result["additive"]["rank_of_best"], "from 0"),
    }
    print(f"written to {record('search', figures)}")


if __name__ == "__main__":
    main()
