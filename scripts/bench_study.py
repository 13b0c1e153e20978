"""The demo's study with its shared walks and screens against every candidate in full, one by one.

    python scripts/bench_study.py

Both begin by measuring additive prices, which make the first candidates, and go on with the same
seed. The outcome is the best candidate's KL on all sequences. Times are of the whole study,
the proposals included, by processor time: other programs on the machine disturb that less.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from bench_trie import Figures, Setting, demo_setting, demo_space, seconds, settle
from figures import RESULTS, record

from minipuzzle.recipe import SearchConfig
from minipuzzle.search.additive import additive_seeds, measure_prices
from minipuzzle.search.proxies import ProxyEvaluator
from minipuzzle.search.screen import Screen
from minipuzzle.search.space import Point, Space
from minipuzzle.search.storage import sqlite_url
from minipuzzle.search.study import Judge, Judged, Trial, search
from minipuzzle.selection import Selection

PRICED = slice(0, 2)  # sequences of the prices, as in the product


class Counting(ProxyEvaluator):
    """An evaluator that counts the sequences that candidates have seen."""

    sequences = 0

    def sums(self, selections: Sequence[Selection], blocks: slice | None = None) -> torch.Tensor:
        """See `ProxyEvaluator.sums`."""
        found = super().sums(selections, blocks)
        self.sequences += found.shape[0] * found.shape[1]
        return found


@dataclass(frozen=True)
class Bench:
    """What both ways have in common."""

    setting: Setting
    space: Space
    settings: SearchConfig

    def study(self, seed: int, *, plain: bool) -> tuple[list[Trial], int]:
        """The trials of a study, and how many sequences its candidates and prices have seen."""
        evaluate = Counting(self.setting.model, self.setting.ids)

        def price(selections: Sequence[Selection]) -> list[float]:
            groups = [[each] for each in selections] if plain else [selections]
            found = [evaluate(group, blocks=PRICED) for group in groups]
            return [proxies.kl for group in found for proxies in group]

        prices = measure_prices(self.space, self.setting.scores, price)
        judge = self._plain(evaluate) if plain else self._screened(evaluate)
        with tempfile.TemporaryDirectory() as folder:
            trials = search(
                self.space,
                judge,
                settings=self.settings,
                seed=seed,
                storage=sqlite_url(Path(folder) / "study.db"),
                seeds=additive_seeds(self.space, prices),
            )
        return trials, evaluate.sequences

    def _plain(self, evaluate: ProxyEvaluator) -> Judge:
        def judge(points: Sequence[Point]) -> list[Judged]:
            selections = self.setting.selections(self.space, points)
            return [Judged(evaluate([each])[0], screened=False) for each in selections]

        return judge

    def _screened(self, evaluate: ProxyEvaluator) -> Judge:
        screen = Screen(evaluate, self.settings.blocks)

        def judge(points: Sequence[Point]) -> list[Judged]:
            selections = self.setting.selections(self.space, points)
            return [Judged(proxies, screened) for proxies, screened in screen(selections)]

        return judge


def best(trials: Sequence[Trial]) -> Trial:
    """The best trial among those that saw everything."""
    return min((t for t in trials if not t.screened), key=lambda t: (t.proxies.kl, t.number))


def measure(bench: Bench, seeds: int) -> Figures:
    """Both ways for several seeds."""
    rows = []
    for seed in range(seeds):
        found: dict[bool, tuple[list[Trial], int]] = {}

        def run(plain: bool, seed: int = seed) -> None:
            found[plain] = bench.study(seed, plain=plain)  # noqa: B023

        took = {
            plain: seconds(partial(run, plain), bench.setting.model.device)
            for plain in (True, False)
        }
        chosen = {plain: best(trials) for plain, (trials, _) in found.items()}
        row = {
            "clock": took[True][0] / took[False][0],
            "processor": took[True][1] / took[False][1],
            "sequences": found[False][1] / found[True][1],
            "same": chosen[True].point == chosen[False].point,
            "kl": chosen[False].proxies.kl / chosen[True].proxies.kl - 1,
            "whole": sum(not t.screened for t in found[False][0]) / len(found[False][0]),
        }
        rows.append(row)
        print(f"seed {seed}: {took} s, {row}; chosen {chosen[False].point.key}", flush=True)

    def middle(name: str) -> float:
        return round(statistics.median(row[name] for row in rows), 3)

    return {
        "study_speedup": (middle("processor"), "times as fast, by processor time"),
        "study_speedup_clock": (middle("clock"), "times as fast, by the clock"),
        "study_trials": (bench.settings.trials, ""),
        "study_seeds": (seeds, ""),
        "study_same_choice": (sum(row["same"] for row in rows), f"of {seeds} seeds"),
        "study_kl_above_plain": (
            float(f"{max(row['kl'] for row in rows):.3g}"),
            "of the chosen one's KL, largest over the seeds",
        ),
        "study_sequences_share": (middle("sequences"), "of the sequences of the plain study"),
        "study_seen_whole_share": (middle("whole"), "of the trials"),
    }


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of the processor")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--dry", action="store_true", help="print the figures, record none")
    options = parser.parse_args()
    settle(options.threads)
    setting = demo_setting(options.blocks)
    settings = SearchConfig(trials=options.trials, blocks=options.blocks)
    figures = measure(Bench(setting, demo_space(setting), settings), options.seeds)
    for name, (value, unit) in figures.items():
        print(f"{name}: {value} {unit}")
    if not options.dry:
        record("search", figures, folder=options.results)


if __name__ == "__main__":
    main()
