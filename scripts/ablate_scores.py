"""What each score is worth: the loss after cutting by it, against rankings that know nothing.

Every axis is cut alone, in all layers alike, by about 10, 20 and 30 % of its units: by each score,
and by three controls: the units in their order, in reverse, and at random (three draws). Cuts are
shown by masks, so that rules of serving (equal numbers from every group) do not interfere; layers
are chosen among all of them. FFN width and Mamba heads are also cut for real and repaired. All of
it is measured on the search split of a recipe.

    python scripts/ablate_scores.py --json docs/results/ablate_scores.json
    python scripts/ablate_scores.py --json docs/results/ablate_scores.json --repair
    python scripts/ablate_scores.py --render
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from figures import RESULTS, command, device, versions
from render_scores import render
from texts import split_blocks
from torch import nn

from minipuzzle.architecture import Architecture
from minipuzzle.distill.heldout import evaluate
from minipuzzle.distill.teacher import TeacherStates
from minipuzzle.files import atomic_write_json
from minipuzzle.masks import masked
from minipuzzle.metrics import CONTROLS, LAYER_METRICS, LayerMetric
from minipuzzle.model import Model, load
from minipuzzle.prune.constraints import SLICEABLE, Constraints
from minipuzzle.prune.depth import REMOVAL_ORDER
from minipuzzle.prune.iterative import Iteration
from minipuzzle.prune.repair import repair
from minipuzzle.prune.score import score
from minipuzzle.prune.select import select
from minipuzzle.prune.slice import slice_checkpoint
from minipuzzle.recipe import Recipe
from minipuzzle.scores import Scores
from minipuzzle.selection import CUT_AXES, Selection
from minipuzzle.source import resolve

SHARES = (0.1, 0.2, 0.3)
SEEDS = (0, 1000, 2000)  # `select` adds the layer's position
AXES = ("width", "heads", "head_dim", "query_heads", "kv_heads", "hidden")
REPAIRED_AXES = ("width", "heads")
LAYERS = "layers"

Found = dict[str, float]
"""Loss, its excess over the teacher's, and KL."""


@dataclass
class Bench:
    """The teacher, its scores, the texts, and the rows measured so far."""

    teacher: Model
    scores: Scores
    calibration: torch.Tensor
    search: torch.Tensor
    settings: dict[str, Any]  # of the repair
    swept: torch.Tensor
    shares: Sequence[float] = SHARES
    rows: list[dict[str, Any]] = field(default_factory=list)
    known: dict[Selection, Found] = field(default_factory=dict)
    mended: dict[Selection, tuple[Found, Found]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.judge = TeacherStates(self.teacher.module, self.search)
        self.base = evaluate(self.teacher.module, self.judge, self.search).loss

    @property
    def architecture(self) -> Architecture:
        """Of the teacher."""
        return self.teacher.architecture

    def narrowed(
        self, axis: str, keep: int, metric: str, seed: int, constraints: Constraints | None
    ) -> Selection:
        """The cut that leaves `keep` units of an axis, ranked by a metric."""
        return select(
            self.scores,
            self.architecture,
            sizes={axis: keep},
            metrics={axis: metric},
            constraints=constraints,
            seed=seed,
        )

    def measure(self, module: nn.Module) -> Found:
        """Loss, its excess over the teacher's, and KL on the search text, nats."""
        found = evaluate(module, self.judge, self.search)
        return {"loss": found.loss, "excess": found.loss - self.base, "kl": found.kl}

    def mask(self, selection: Selection, **row: Any) -> None:
        """Measure the teacher under the masks of a selection; equal ones only once."""
        started = time.monotonic()
        if selection not in self.known:
            with masked(self.teacher, selection) as module:
                self.known[selection] = self.measure(module)
        self.keep(row | {"state": "cut"} | self.known[selection], started)

    def mend(self, selection: Selection, **row: Any) -> None:
        """Measure the sliced model, before and after repair; equal ones only once."""
        started = time.monotonic()
        if selection not in self.mended:
            with tempfile.TemporaryDirectory() as folder:
                slice_checkpoint(self.teacher.folder, Path(folder) / "cut", selection)
                student = load(Path(folder) / "cut", device=str(self.teacher.device))
            before = self.measure(student.module)
            repair(self.teacher, student, selection, self.calibration, **self.settings)
            self.mended[selection] = before, self.measure(student.module)
        for state, found in zip(("sliced", "repaired"), self.mended[selection], strict=True):
            self.keep(row | {"state": state} | found, started)

    def keep(self, row: dict[str, Any], started: float) -> None:
        """Take a row."""
        self.rows.append(row | {"seconds": round(time.monotonic() - started, 1)})
        print(self.rows[-1], flush=True)


def units_of(architecture: Architecture, axis: str) -> int:
    """Units of an axis, the same in every layer that has it; 0 where nothing has."""
    if axis == "hidden":
        return architecture.hidden
    sizes = {getattr(x, axis) for x in architecture.layers if axis in CUT_AXES[x.kind]}
    assert len(sizes) <= 1, f"`{axis}` differs between layers"
    return next(iter(sizes), 0)


def counts(units: int, step: int = 1, shares: Sequence[float] = SHARES) -> list[int]:
    """How many units to take for each share: the nearest number, at least one step."""
    wished = [max(1, round(share * units / step)) * step for share in shares]
    return sorted({gone for gone in wished if gone < units})


def rankings(bench: Bench, axis: str) -> Iterator[tuple[str, str, int]]:
    """(name of the row, metric for `select`, seed): every score of an axis, then the controls."""
    measured = {m for (_, a, m) in bench.scores.units if a == axis}
    for metric in sorted(measured if axis != "hidden" else bench.scores.hidden):
        yield metric, metric, 0
    for control in CONTROLS:
        for k, seed in enumerate(SEEDS if control == "random" else SEEDS[:1]):
            yield (f"random {k + 1}" if control == "random" else control), control, seed


def cut_axis(bench: Bench, axis: str) -> None:
    """Every ranking of an axis at every number of units, by masks."""
    units = units_of(bench.architecture, axis)
    for gone in counts(units, shares=bench.shares) if units else []:
        for name, metric, seed in rankings(bench, axis):
            selection = bench.narrowed(axis, units - gone, metric, seed, None)
            bench.mask(selection, axis=axis, by=name, removed=gone, units=units)


def repair_axis(bench: Bench, axis: str) -> None:
    """Scores and one random draw of an axis, sliced (equal numbers from every group), repaired."""
    units = units_of(bench.architecture, axis)
    grouped = {x.grouping for x in bench.architecture.layers if axis in CUT_AXES[x.kind]}
    by = next((g[1] for g in grouped if g is not None and g[0] == axis), None)
    step = units_of(bench.architecture, by) if by else 1
    for gone in counts(units, step, bench.shares) if units else []:
        for name, metric, seed in rankings(bench, axis):
            if metric in CONTROLS and name != "random 1":
                continue
            selection = bench.narrowed(axis, units - gone, metric, seed, SLICEABLE)
            bench.mend(selection, axis=axis, by=name, removed=gone, units=units)


def layer_cuts(bench: Bench) -> Iterator[tuple[dict[str, Any], Selection]]:
    """Every layer metric, one-shot and iterative, then the controls: row and selection."""
    blocks = bench.teacher.family.removable(bench.architecture)
    numbers = counts(len(blocks), shares=bench.shares)
    for metric in LAYER_METRICS:
        steps = removal_steps(bench.teacher, bench.swept, metric, numbers[-1])
        again = replace(bench.scores, removals=steps.removals)
        for number in numbers:
            for name, scores, order in (
                (metric, bench.scores, metric),
                (f"{metric}, iterative", again, REMOVAL_ORDER),
            ):
                yield (
                    layer_row(name, number, len(blocks)),
                    select(
                        scores,
                        bench.architecture,
                        removed=number,
                        layer_metric=order,
                        units=blocks,
                        constraints=None,
                    ),
                )
    for number in numbers:
        for name, last in layer_controls(len(blocks)):
            gone = sorted(i for block in last[:number] for i in blocks[block])
            yield layer_row(name, number, len(blocks)), without(bench.architecture, gone)


def layer_row(name: str, number: int, blocks: int) -> dict[str, Any]:
    """What a row of the layers begins with."""
    return {"axis": LAYERS, "by": name, "removed": number, "units": blocks}


def cut_layers(bench: Bench) -> None:
    """Layers out by every ranking, by masks."""
    for row, selection in layer_cuts(bench):
        bench.mask(selection, **row, layers=gone_layers(selection))


def repair_layers(bench: Bench) -> None:
    """Layers out by the scores and by one random draw, repaired."""
    for row, selection in layer_cuts(bench):
        if row["by"] in ("random 1", *measured_by()):
            bench.mend(selection, **row, layers=gone_layers(selection))


def measured_by() -> list[str]:
    """Names of the rankings of layers that are scores."""
    return [f"{metric}{how}" for metric in LAYER_METRICS for how in ("", ", iterative")]


def gone_layers(selection: Selection) -> list[int]:
    """Positions of the removed layers."""
    return [i for i, axes in enumerate(selection.layers) if axes is None]


def removal_steps(model: Model, ids: torch.Tensor, metric: LayerMetric, number: int) -> Scores:
    """Scores whose removals are the first `number` blocks that iterative removal takes."""
    taken = model.family.layers_per_block * number
    iteration = Iteration(metric, lambda gone: len(gone) >= taken)
    return score(model, ids, {}, metrics=(metric,), unit_metrics=(), iterative=iteration)


def layer_controls(blocks: int) -> Iterator[tuple[str, list[int]]]:
    """Orders of removal that know nothing: the last first, the first first, at random."""
    yield "order", list(range(blocks))[::-1]
    yield "reverse", list(range(blocks))
    for k, seed in enumerate(SEEDS):
        order = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed))
        yield f"random {k + 1}", order.tolist()


def without(architecture: Architecture, gone: Sequence[int]) -> Selection:
    """Everything but some layers."""
    return Selection(tuple(None if i in gone else {} for i in range(len(architecture.layers))))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the JSON, or render the page from it."""
    options = read_arguments(arguments)
    if options.json is not None:
        measure(options)
    if options.render:
        render()


def measure(options: argparse.Namespace) -> None:
    """Run what the options ask for; the file is written anew after every axis."""
    recipe = Recipe.load(options.recipe, [f"model={options.model}"] if options.model else [])
    teacher = load(resolve(recipe.model, recipe.revision), device=options.device)
    most = max(recipe.score.unit_blocks, recipe.score.blocks, options.repair_blocks)
    wanted = {"calibration": most, "search": options.blocks}
    blocks = split_blocks(recipe, teacher.tokenizer, wanted, options.texts)
    calibration, search = blocks["calibration"], blocks["search"]
    scored, swept = calibration[: recipe.score.unit_blocks], calibration[: recipe.score.blocks]
    metrics = LAYER_METRICS if LAYERS in options.axes else LAYER_METRICS[:1]
    scores = score(teacher, scored, {}, metrics=metrics, layer_sequences=len(swept))
    fitted = calibration[: options.repair_blocks]
    settings = recipe.repair.model_dump(exclude={"blocks"})
    bench = Bench(teacher, scores, fitted, search, settings, swept, options.shares)
    texts = {
        "search_tokens": search.numel(),
        "unit_tokens": scored.numel(),
        "layer_tokens": swept.numel(),
    }
    if options.repair:
        texts["repair_tokens"] = fitted.numel()
        steps = [partial(repair_axis, bench, a) for a in REPAIRED_AXES if a in options.axes]
        if LAYERS in options.axes:
            steps.append(partial(repair_layers, bench))
    else:
        steps = [partial(cut_axis, bench, axis) for axis in AXES if axis in options.axes]
        if LAYERS in options.axes:
            steps.append(partial(cut_layers, bench))
    for step in steps:
        step()
        write(options.json, bench, texts)


def write(path: Path, bench: Bench, texts: dict[str, int]) -> None:
    """Put the rows so far into the file, in place of earlier ones of the same axis and state."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    new = {(row["axis"], row["state"]) for row in bench.rows}
    old = [row for row in known.get("rows", []) if (row["axis"], row["state"]) not in new]
    origin = {"command": command(), "device": device(), "versions": versions()} | texts
    runs = known.get("runs", {}) | {f"{axis}, {state}": origin for axis, state in sorted(new)}
    record = {"teacher_loss": bench.base, "runs": runs, "rows": [*old, *bench.rows]}
    atomic_write_json(path, record)


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", type=Path, default=Path("minipuzzle/demo/demo.yaml"))
    parser.add_argument("--model", help="another model than the recipe's")
    parser.add_argument("--axes", nargs="+", default=[*AXES, LAYERS], choices=[*AXES, LAYERS])
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--blocks", type=int, default=32, help="sequences of search text")
    parser.add_argument("--repair", action="store_true", help="slice and repair instead of masks")
    parser.add_argument("--repair-blocks", type=int, default=48, help="of calibration text")
    parser.add_argument("--texts", type=Path, help="file of tokens, written where it is missing")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help=f"e.g. {RESULTS.name}/ablate_scores.json")
    parser.add_argument("--render", action="store_true", help="write the page and its drawing")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
