"""The demo's study with its shared walks and screens against every candidate in full, one by one.

    python scripts/bench_study.py
    python scripts/bench_study.py --proxy repaired

Both begin by measuring additive prices, which make the first candidates, and go on with the same
seed. The outcome is the best candidate's KL on all sequences. Times are of the whole study,
proposals and quick repairs included, by processor time: other programs on the machine disturb that
less. What the stage does after its study, to judge all that may become finalists on all sequences,
is measured apart.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench_trie import Figures, Setting, demo_setting, demo_space, seconds, settle
from figures import RESULTS, record

from minipuzzle.recipe import Recipe, demo_recipe
from minipuzzle.search.additive import additive_seeds, measure_prices
from minipuzzle.search.finalists import POOL
from minipuzzle.search.judge import PRICE_BLOCKS, Judge
from minipuzzle.search.space import Point, Space
from minipuzzle.search.storage import sqlite_url
from minipuzzle.search.study import Judged, Trial, search
from minipuzzle.selection import Selection


class PlainJudge(Judge):
    """Every candidate alone, on all sequences."""

    def __call__(self, points: Sequence[Point]) -> list[Judged]:
        """See `Judge`."""
        selections = [self.space.selection(point, self.scores) for point in points]
        return [Judged(self.evaluate([each])[0], screened=False) for each in selections]

    def divergences(self, selections: Sequence[Selection]) -> list[float]:
        """See `Judge`."""
        blocks = slice(0, PRICE_BLOCKS)
        return [self.evaluate([each], blocks=blocks)[0].kl for each in selections]


@dataclass(frozen=True)
class Bench:
    """What both ways have in common."""

    setting: Setting
    space: Space
    recipe: Recipe

    def study(self, seed: int, *, plain: bool) -> tuple[list[Trial], Judge]:
        """The trials of a study, and who judged them."""
        setting, settings = self.setting, self.recipe.search
        judge = (PlainJudge if plain else Judge)(
            self.recipe, setting.model, self.space, setting.scores
        )
        prices = measure_prices(self.space, setting.scores, judge.divergences)
        with tempfile.TemporaryDirectory() as folder:
            trials = search(
                self.space,
                judge,
                settings=settings,
                seed=seed,
                storage=sqlite_url(Path(folder) / "study.db"),
                seeds=additive_seeds(self.space, prices),
                remind=None if plain else judge.remind,
            )
        return trials, judge


def best(trials: Sequence[Trial]) -> Trial:
    """The best trial among those that saw everything."""
    return min((t for t in trials if not t.screened), key=lambda t: (t.proxies.kl, t.number))


def sequences(trials: Sequence[Trial]) -> int:
    """Sequences that candidates have seen."""
    return sum(trial.proxies.blocks for trial in trials)


def measure(bench: Bench, seeds: int) -> Figures:
    """Both ways for several seeds."""
    rows = []
    for seed in range(seeds):
        found: dict[bool, tuple[list[Trial], Judge]] = {}

        def run(plain: bool, seed: int = seed) -> None:
            found[plain] = bench.study(seed, plain=plain)  # noqa: B023

        took = {
            plain: seconds(partial(run, plain), bench.setting.model.device)
            for plain in (True, False)
        }
        chosen = {plain: best(trials) for plain, (trials, _) in found.items()}
        trials, judge = found[False]
        number = POOL * bench.recipe.search.tournament.finalists
        after = seconds(partial(judge.completed, trials, number), bench.setting.model.device)
        row = {
            "clock": took[True][0] / took[False][0],
            "processor": took[True][1] / took[False][1],
            "completed": took[True][1] / (took[False][1] + after[1]),
            "sequences": sequences(trials) / sequences(found[True][0]),
            "same": chosen[True].point == chosen[False].point,
            "kl": chosen[False].proxies.kl / chosen[True].proxies.kl - 1,
            "whole": sum(not t.screened for t in trials) / len(trials),
        }
        rows.append(row)
        print(f"seed {seed}: {took} s, {row}; chosen {chosen[False].point.key}", flush=True)

    def middle(name: str) -> float:
        return round(statistics.median(row[name] for row in rows), 3)

    figures: Figures = {
        "study_speedup": (middle("processor"), "times as fast, by processor time"),
        "study_speedup_clock": (middle("clock"), "times as fast, by the clock"),
        "study_speedup_with_pool": (
            middle("completed"),
            "times as fast, with the judging of possible finalists on all sequences",
        ),
        "study_trials": (bench.recipe.search.trials, ""),
        "study_seeds": (seeds, ""),
        "study_same_choice": (sum(row["same"] for row in rows), f"of {seeds} seeds"),
        "study_kl_above_plain": (
            float(f"{max(row['kl'] for row in rows):.3g}"),
            "of the chosen one's KL, largest over the seeds",
        ),
        "study_sequences_share": (
            middle("sequences"),
            "of the sequences that all candidates see in the plain study",
        ),
        "study_seen_whole_share": (middle("whole"), "of the trials"),
    }
    proxy = bench.recipe.search.proxy
    return figures if proxy == "cut" else {f"{n}_{proxy}": f for n, f in figures.items()}


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--proxy", default="cut", choices=["cut", "repaired"])
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of the processor")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--dry", action="store_true", help="print the figures, record none")
    options = parser.parse_args()
    settle(options.threads)
    setting = demo_setting(options.blocks)
    chosen = {name: getattr(options, name) for name in ("proxy", "trials", "blocks")}
    recipe = Recipe.load(demo_recipe(), [f"search.{name}={v}" for name, v in chosen.items()])
    figures = measure(Bench(setting, demo_space(setting), recipe), options.seeds)
    for name, (value, unit) in figures.items():
        print(f"{name}: {value} {unit}")
    if not options.dry:
        record("search", figures, folder=options.results)


if __name__ == "__main__":
    main()
