"""The judge of a recipe's candidates, and the points that its study begins with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from minipuzzle import progress
from minipuzzle.data.blocks import recipe_blocks
from minipuzzle.files import atomic_write_json
from minipuzzle.jsonfile import read_json
from minipuzzle.model import Model
from minipuzzle.recipe import Recipe
from minipuzzle.scores import Scores
from minipuzzle.selection import Selection

from .additive import additive_seeds, measure_prices
from .proxies import ProxyEvaluator
from .quickrepair import QuickRepair
from .screen import Screen
from .space import Point, Space
from .trials import Judged, Trial

PRICE_BLOCKS = 2  # sequences that additive prices are measured on: they only say where to begin


class Judge:
    """Judges points on the recipe's search text: cut or with a quick repair, screened or whole."""

    def __init__(self, recipe: Recipe, model: Model, space: Space, scores: Scores) -> None:
        settings = recipe.search
        self.space, self.scores = space, scores
        ids = recipe_blocks(recipe, "search", model.tokenizer, settings.blocks)
        maker = None
        if settings.proxy == "repaired":
            text = recipe_blocks(recipe, "calibration", model.tokenizer, settings.proxy_blocks)
            maker = QuickRepair(model, text, ridge=recipe.repair.ridge)
        self.evaluate = ProxyEvaluator(model, ids, maker=maker)
        alone = settings.objectives == ("kl",)  # what is bad by KL may still be on a front
        self.screen = Screen(self.evaluate, settings.blocks) if settings.screen and alone else None

    def __call__(self, points: Sequence[Point]) -> list[Judged]:
        """The proxies of points, in their order."""
        selections = [self.space.selection(point, self.scores) for point in points]
        if self.screen is not None:
            return [Judged(proxies, screened) for proxies, screened in self.screen(selections)]
        return [Judged(proxies, screened=False) for proxies in self.evaluate(selections)]

    def completed(self, trials: Sequence[Trial], number: int) -> list[Trial]:
        """The trials; the best `number` of them all judged on all sequences.

        A study that looks for the best one gives up many early that are good enough to be compared
        with it after healing.
        """
        ranked = sorted(trials, key=lambda trial: (trial.proxies.kl, trial.number))[:number]
        early = [trial for trial in ranked if trial.screened]
        selections = [self.space.selection(trial.point, self.scores) for trial in early]
        whole = dict(zip(early, self.evaluate(selections), strict=True))
        return [
            replace(trial, proxies=whole[trial], screened=False) if trial in whole else trial
            for trial in trials
        ]

    def remind(self, best: Point) -> None:
        """Compare with the best point so far; a resumed study has not seen it here."""
        if self.screen is not None:
            self.screen.remind(self.space.selection(best, self.scores))

    def divergences(self, selections: Sequence[Selection]) -> list[float]:
        """KL to the teacher on the first sequences alone."""
        found = self.evaluate(selections, blocks=slice(0, PRICE_BLOCKS))
        return [proxies.kl for proxies in found]


def study_seeds(space: Space, scores: Scores, judge: Judge, path: Path) -> list[Point]:
    """The additive and greedy solutions, at prices measured by the judge; kept in a file."""
    if not path.exists():
        progress.say("search: pricing single changes, to begin with what they add up to")
        points = additive_seeds(space, measure_prices(space, scores, judge.divergences))
        atomic_write_json(path, {"seeds": [point.to_json() for point in points]})
    return [Point.from_json(record) for record in read_json(path)["seeds"]]
