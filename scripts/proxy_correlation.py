"""Which proxy knows what a candidate is worth once it is healed: ranks before and after repair.

Candidates of a recipe's search space are judged as they are cut and with the quick repair, on the
search text that a study reads; some of them, from very good to mediocre by either judgement, are
then repaired for good and distilled for a little, and compared on other search text ("final").

    python scripts/proxy_correlation.py
    python scripts/proxy_correlation.py --only draw      # from the results file

What lies in --work is not measured again; with --processes several measure side by side.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from figures import RESULTS, device, record
from rank_correlations import FIGURES, agreement, correlations, difference, draw, picks
from texts import split_blocks

from minipuzzle.architecture import KINDS
from minipuzzle.distill.heldout import evaluate
from minipuzzle.distill.stage import settings_of
from minipuzzle.distill.teacher import TeacherStates
from minipuzzle.distill.trainer import train
from minipuzzle.files import atomic_write_json
from minipuzzle.model import Model, load
from minipuzzle.prune.repair import repair
from minipuzzle.prune.score import score
from minipuzzle.prune.slice import slice_checkpoint
from minipuzzle.recipe import Recipe
from minipuzzle.scores import Scores
from minipuzzle.search.proxies import Proxies, ProxyEvaluator
from minipuzzle.search.quickrepair import QuickRepair
from minipuzzle.search.ranges import recipe_space
from minipuzzle.search.space import Point, Space
from minipuzzle.selection import Selection
from minipuzzle.source import resolve

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "minipuzzle" / "demo" / "demo.yaml"
DRAWING = ROOT / "docs" / "images" / "proxy-correlation.svg"
MEDIOCRE = 0.6  # of the pool, from the best on, is what candidates are taken from
STEPS = ["choose", "measure", "report", "draw"]
TABLE = "proxy_correlation.json"
BATCH = 32  # candidates judged together


@dataclass(frozen=True)
class Bench:
    """The teacher, its space, and the texts: what is judged is chosen on `search` alone."""

    recipe: Recipe
    teacher: Model
    work: Path
    calibration: torch.Tensor
    search: torch.Tensor
    final: torch.Tensor
    distillation: torch.Tensor

    @cached_property
    def scores(self) -> Scores:
        """Made on the recipe's numbers of calibration blocks, once."""
        folder = self.work / "scores"
        if not folder.exists():
            ids = self.calibration[: self.recipe.score.unit_blocks]
            found = score(self.teacher, ids, {}, layer_sequences=self.recipe.score.blocks)
            folder.mkdir(parents=True)
            found.save(folder)
        return Scores.load(folder)

    @cached_property
    def space(self) -> Space:
        """The recipe's space, its layers in the order of the scores."""
        return recipe_space(
            self.recipe, self.teacher.architecture, self.teacher.family, self.scores
        )

    def selection(self, point: Point) -> Selection:
        """A candidate as a cut."""
        return self.space.selection(point, self.scores)

    @cached_property
    def judges(self) -> dict[str, TeacherStates]:
        """The teacher's states of the texts that whole models are compared on."""
        texts = {"repaired": self.search, "final": self.final}
        return {name: TeacherStates(self.teacher.module, ids) for name, ids in texts.items()}

    @cached_property
    def lessons(self) -> TeacherStates:
        """The teacher's states of the distillation text."""
        return TeacherStates(self.teacher.module, self.distillation)


def choose(bench: Bench, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Judge a pool of the space by both proxies, and take candidates from it; kept in a file."""
    path, settings = bench.work / "chosen.json", identity(bench, options)
    if path.exists():
        known = json.loads(path.read_text())
        if known["settings"] != settings:
            raise SystemExit(f"{bench.work} was measured with other settings; use another --work")
        return list(known["candidates"])
    generator = random.Random(options.seed)
    points = sorted(bench.space.points(), key=lambda point: point.key)
    pool = generator.sample(points, min(options.pool, len(points)))
    selections = [bench.selection(point) for point in pool]
    started = time.monotonic()
    cut = judged(ProxyEvaluator(bench.teacher, bench.search), selections)
    middle = time.monotonic()
    maker = QuickRepair(bench.teacher, bench.calibration, ridge=bench.recipe.repair.ridge)
    quick = judged(ProxyEvaluator(bench.teacher, bench.search, maker=maker), selections)
    seconds = {"cut": middle - started, "quick": time.monotonic() - middle}
    rows = [
        {
            "number": number,
            "point": point.to_json(),
            "kind": kind_of(bench, selection),
            "cut": asdict(before),
            "quick": asdict(after),
        }
        for number, (point, selection, before, after) in enumerate(
            zip(pool, selections, cut, quick, strict=True)
        )
    ]
    chosen = stratified(rows, options.candidates)
    known = {"settings": settings, "feasible": len(points), "seconds": seconds, "pool": rows}
    atomic_write_json(path, {**known, "candidates": chosen})
    return chosen


def identity(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """All that measurements depend on."""
    numbers = ("candidates", "pool", "repair_blocks", "steps", "batch", "final_blocks", "seed")
    chosen = {name: getattr(options, name) for name in numbers}
    return {"recipe": bench.recipe.to_mapping(), **chosen}


def judged(evaluate_all: ProxyEvaluator, selections: Sequence[Selection]) -> list[Proxies]:
    """The proxies of all selections, some at a time."""
    found: list[Proxies] = []
    for start in range(0, len(selections), BATCH):
        found += evaluate_all(selections[start : start + BATCH])
        print(f"judged {len(found)} of {len(selections)}", flush=True)
    return found


def kind_of(bench: Bench, selection: Selection) -> str:
    """Which kinds of layers a cut removes."""
    layers = bench.teacher.architecture.layers
    gone = {layers[i].kind for i, axes in enumerate(selection.layers) if axes is None}
    return " + ".join(kind for kind in KINDS if kind in gone) or "none"


def stratified(rows: Sequence[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """Candidates from very good to mediocre, and of as many kinds of cut as there are.

    Turn and turn about by the KL as cut and by that of the quick repair, so that neither of them is
    favoured by the spread. The better part of the pool is cut into strata; each gives one
    candidate, of the kind that was taken least often until then.
    """
    taken: list[dict[str, Any]] = []
    kinds: Counter[str] = Counter()
    for turn in range(number):
        proxy = ("cut", "quick")[turn % 2]
        ranked = sorted(rows, key=lambda row: float(row[proxy]["kl"]))
        ranked = ranked[: max(number, round(MEDIOCRE * len(rows)))]
        strata = -(-number // 2)
        start, stop = (len(ranked) * (turn // 2 + more) // strata for more in (0, 1))
        free = [row for row in ranked[start:stop] if row not in taken]
        free = free or [row for row in ranked if row not in taken]
        best = min(free, key=lambda row: (kinds[row["kind"]], row["number"]))
        kinds[best["kind"]] += 1
        taken.append(best)
    return sorted(taken, key=lambda row: int(row["number"]))


def measure(bench: Bench, chosen: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> None:
    """Repair and distil this process's share of the candidates; a file for each."""
    own, of = (int(part) for part in options.share.split("/"))
    settings = replace(
        settings_of(bench.recipe),
        steps=options.steps,
        batch=options.batch,
        checkpoint_every=0,
        evaluate_every=0,
    )
    for row in chosen[own - 1 :: of]:
        path = bench.work / f"{row['number']}.json"
        if path.exists():
            continue
        started = time.monotonic()
        selection = bench.selection(Point.from_json(row["point"]))
        with tempfile.TemporaryDirectory() as folder:
            slice_checkpoint(bench.teacher.folder, Path(folder) / "cut", selection)
            student = load(Path(folder) / "cut", device=options.device)
        found: dict[str, Any] = {**row}
        how = bench.recipe.repair.model_dump(exclude={"blocks"})
        repair(bench.teacher, student, selection, bench.calibration, **how)
        for station, judge in bench.judges.items():
            ids = bench.search if station == "repaired" else bench.final
            name = "repaired" if station == "repaired" else "repaired_final"
            found[name] = asdict(evaluate(student.module, judge, ids))
        train(student.module, bench.lessons, bench.distillation, settings)
        found["final"] = asdict(evaluate(student.module, bench.judges["final"], bench.final))
        found["seconds"] = round(time.monotonic() - started, 1)
        atomic_write_json(path, found)
        print(json.dumps({k: found[k] for k in ("number", "kind", "seconds")}), flush=True)


def report(bench: Bench, options: argparse.Namespace) -> None:
    """Rank correlations, table and drawing from what was measured."""
    known = json.loads((bench.work / "chosen.json").read_text())
    files = [bench.work / f"{row['number']}.json" for row in known["candidates"]]
    missing = [path.name for path in files if not path.exists()]
    assert not missing, f"not measured yet: {missing}"
    rows = [json.loads(path.read_text()) for path in files]
    found = correlations(rows, options.seed)
    better = sorted(rows, key=lambda row: float(row["final"]["kl"]))[: len(rows) // 2]
    result = {
        "feasible": known["feasible"],
        "judged": len(known["pool"]),
        "judging_seconds": known["seconds"],
        "cut_with_quick_over_all_judged": agreement(known["pool"]),
        "tokens": {
            "search": bench.search.numel(),
            "calibration": bench.calibration.numel(),
            "distillation": bench.distillation.numel(),
            "final": bench.final.numel(),
        },
        "device": device(),
        "correlations": found,
        "correlations_of_the_better_half": correlations(better, options.seed),
        "after_minus_before": difference(rows, options.seed),
        "picks": picks(rows),
        "candidates": sorted(rows, key=lambda row: float(row["final"]["kl"])),
    }
    options.results.mkdir(parents=True, exist_ok=True)
    atomic_write_json(options.results / TABLE, result)
    figures = {name: (round(found[proxy]["rho"], 3), "Spearman") for name, proxy in FIGURES.items()}
    record("search", figures, folder=options.results)
    for proxy, entry in found.items():
        print(f"{proxy:24} {entry['rho']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]")
    print(json.dumps({key: result[key] for key in ("after_minus_before", "picks")}, indent=1))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", choices=STEPS, help="one step (default: all)")
    add("--processes", type=int, default=1, help="that measure side by side")
    add("--share", default="1/1", metavar="K/N", help="measure every Nth candidate from the Kth on")
    add("--recipe", type=Path, default=RECIPE, help="space, texts, repair and rate")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override of the recipe")
    add("--work", type=Path, default=Path("runs/proxy-correlation"), help="where measurements lie")
    add("--texts", type=Path, help="file of token blocks, for machines without the packages")
    add("--results", type=Path, default=RESULTS, help="folder of the results files")
    add("--drawing", type=Path, default=DRAWING)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--candidates", type=int, default=32, help="that are repaired and distilled")
    add("--pool", type=int, default=1000, help="that are judged by the proxies, at most")
    add("--repair-blocks", type=int, default=32, help="calibration sequences")
    add("--steps", type=int, default=16, help="of distillation")
    add("--batch", type=int, default=8, help="sequences a step")
    add("--final-blocks", type=int, default=32, help="search sequences of the final comparison")
    add("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def prepare(options: argparse.Namespace) -> Bench:
    """Load teacher and texts."""
    recipe = Recipe.load(options.recipe, options.set)
    teacher = load(resolve(recipe.model, recipe.revision), device=options.device)
    blocks = recipe.search.blocks
    wanted = {
        "calibration": max(options.repair_blocks, recipe.score.unit_blocks),
        "search": blocks + options.final_blocks,
        "distillation": options.steps * options.batch,
    }
    found = split_blocks(recipe, teacher.tokenizer, wanted, options.texts)
    options.work.mkdir(parents=True, exist_ok=True)
    return Bench(
        recipe,
        teacher,
        options.work,
        calibration=found["calibration"][: options.repair_blocks],
        search=found["search"][:blocks],
        final=found["search"][blocks:],
        distillation=found["distillation"],
    )


def side_by_side(options: argparse.Namespace) -> None:
    """Measure in processes of their own, each a share of the candidates."""
    shares = [f"{own}/{options.processes}" for own in range(1, options.processes + 1)]
    running = [
        subprocess.Popen([sys.executable, *sys.argv, "--only", "measure", "--share", share])
        for share in shares
    ]
    failed = [share for share, each in zip(shares, running, strict=True) if each.wait()]
    if failed:
        raise SystemExit(f"these shares failed: {', '.join(failed)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Choose, measure, report, draw."""
    options = parse(arguments)
    steps = [options.only] if options.only else STEPS
    if steps != ["draw"]:
        bench = prepare(options)
        chosen = choose(bench, options)
        if "measure" in steps and options.only is None and options.processes > 1:
            side_by_side(options)
        elif "measure" in steps:
            measure(bench, chosen, options)
        if "report" in steps:
            report(bench, options)
    if "draw" in steps:
        result = json.loads((options.results / TABLE).read_text())
        draw(result["candidates"], result["correlations"], options.drawing)


if __name__ == "__main__":
    main()
