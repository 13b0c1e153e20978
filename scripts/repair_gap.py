"""How much of a cut's loss repair gives back: four cuts of 17 % of the parameters, one model.

Loss on the search split of the uncut model, after the cut, after repair on at most 200,000 tokens
of calibration text, and after the same short distillation with and without repair. Everything is
scored and fitted on the same calibration tokens; nothing here looks at the report split.

    python scripts/repair_gap.py --model demo --suffix demo
    python scripts/repair_gap.py --model FOLDER --suffix 27m --device cuda --recipe RECIPE.yaml
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from figures import RESULTS, device, record
from torch import nn

from minipuzzle.architecture import Architecture, FFNLayer, MambaLayer
from minipuzzle.data.blocks import recipe_blocks
from minipuzzle.distill.heldout import evaluate
from minipuzzle.distill.stage import settings_of
from minipuzzle.distill.teacher import TeacherStates
from minipuzzle.distill.trainer import train
from minipuzzle.families import parameter_count
from minipuzzle.files import atomic_write_json
from minipuzzle.model import Model, clone, load, prepare
from minipuzzle.prune.constraints import SLICEABLE
from minipuzzle.prune.prices import channel_prices, loss_metrics, widths_by_price
from minipuzzle.prune.repair import repair
from minipuzzle.prune.score import score
from minipuzzle.prune.select import select
from minipuzzle.recipe import Recipe
from minipuzzle.scores import Scores
from minipuzzle.selection import Selection
from minipuzzle.source import resolve
from minipuzzle.walk import narrow_layer

MODEL_RECIPE = Path(__file__).resolve().parent.parent / "minipuzzle" / "demo" / "demo.yaml"
SHARE, TOLERANCE = 0.17, 0.005
MAX_TOKENS = 200_000
METRIC_TOKENS = 65_536
CUTS = ("ffn", "ffn_uniform", "layers", "mamba_heads", "mixed")


@dataclass(frozen=True)
class Bench:
    """A teacher, its scores, and the texts that everything is fitted to and measured on."""

    teacher: Model
    scores: Scores
    calibration: torch.Tensor
    search: torch.Tensor
    distillation: torch.Tensor

    @cached_property
    def prices(self) -> dict[int, torch.Tensor]:
        """What the channels of every FFN layer are worth to the loss."""
        few = self.calibration[: max(1, METRIC_TOKENS // self.calibration.shape[1])]
        return channel_prices(self.teacher, self.calibration, loss_metrics(self.teacher, few))

    def share(self, selection: Selection) -> float:
        """Part of the parameters that a cut takes away."""
        return self.share_of(selection.apply(self.teacher.architecture))

    def share_of(self, cut: Architecture) -> float:
        """Part of the parameters that an architecture lacks."""
        family, whole = self.teacher.family, self.teacher.architecture
        return 1 - parameter_count(cut, family) / parameter_count(whole, family)

    def select(self, removed: frozenset[int] = frozenset(), **sizes: Any) -> Selection:
        """A cut that a checkpoint could hold, but for shapes that differ between layers."""
        architecture, family = self.teacher.architecture, self.teacher.family
        return select(
            self.scores,
            architecture,
            removed=removed,
            sizes=sizes,
            units=family.removable(architecture),
            constraints=SLICEABLE,
        )

    def order(self) -> list[tuple[int, ...]]:
        """Layers (those that go together), the least important first."""
        values = self.scores.layers["hidden_mse"]
        units = self.teacher.family.removable(self.teacher.architecture)
        return sorted(units, key=lambda unit: float(values[list(unit)].mean()))


def cut_ffn(bench: Bench, removed: frozenset[int] = frozenset(), **sizes: Any) -> Selection:
    """Every FFN layer narrowed to the same width, in the default order of its channels."""
    layers = bench.teacher.architecture.layers
    widest = max(layer.width for layer in layers if isinstance(layer, FFNLayer))

    def at(width: int) -> Selection:
        return bench.select(removed, width=width, **sizes)

    width = nearest(range(1, widest), lambda w: bench.share(at(w)))
    return at(width)


def cut_ffn_by_price(bench: Bench) -> Selection:
    """As many channels as `cut_ffn` takes, but the cheapest of all layers together."""
    uniform = cut_ffn(bench)
    kept = sum(len(axes["width"]) for axes in uniform.layers if axes and "width" in axes)
    return bench.select(width=widths_by_price(bench.prices, kept))


def nearest(choices: range, share: Callable[[int], float]) -> int:
    """The choice whose share is nearest to SHARE; the share falls as the choice rises."""
    low, high = choices.start, choices.stop - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if share(middle) > SHARE else (low, middle)
    return min((low, high), key=lambda c: abs(share(c) - SHARE))


def cut_layers(bench: Bench) -> Selection:
    """Whole layers of any kind, the least important first; those that would be too much stay."""
    gone: frozenset[int] = frozenset()
    for unit in bench.order():
        kinds = {
            kind for i, kind in enumerate(bench.scores.kinds) if i not in gone and i not in unit
        }
        with_it = gone | set(unit)
        if kinds != set(bench.scores.kinds):
            continue
        if bench.share(bench.select(with_it)) <= SHARE + TOLERANCE:
            gone = with_it
        if bench.share(bench.select(gone)) >= SHARE - TOLERANCE:
            break
    return bench.select(gone)


def cut_mamba_heads(bench: Bench) -> Selection:
    """One head of every group after another, in the least important Mamba layers first."""
    layers = bench.teacher.architecture.layers
    heads = {i: x.heads for i, x in enumerate(layers) if isinstance(x, MambaLayer)}
    order = [i for unit in bench.order() for i in unit if i in heads]
    while True:
        for i in order:
            layer = layers[i]
            assert isinstance(layer, MambaLayer)
            heads[i] -= layer.groups
            selection = bench.select(heads=dict(heads))
            if bench.share(selection) >= SHARE - TOLERANCE / 2:
                return selection


def cut_mixed(bench: Bench) -> Selection:
    """One Mamba and one FFN layer, an eighth of the Mamba heads, and FFN width for the rest."""
    kinds = bench.scores.kinds
    ordered = [i for unit in bench.order() for i in unit]
    gone = frozenset(next(i for i in ordered if kinds[i] == kind) for kind in ("mamba", "ffn"))
    layers = bench.teacher.architecture.layers
    mamba = next(layer for layer in layers if isinstance(layer, MambaLayer))
    step = mamba.groups
    heads = mamba.heads - max(step, mamba.heads // 8 // step * step)
    return cut_ffn(bench, gone, heads=heads)


def choose(bench: Bench, cut: str) -> Selection:
    """The selection of a cut; its share of the parameters is asserted."""
    makers = {
        "ffn": cut_ffn_by_price,
        "ffn_uniform": cut_ffn,
        "layers": cut_layers,
        "mamba_heads": cut_mamba_heads,
        "mixed": cut_mixed,
    }
    selection = makers[cut](bench)
    assert abs(bench.share(selection) - SHARE) <= TOLERANCE, (cut, bench.share(selection))
    return selection


def cut_model(teacher: Model, selection: Selection) -> Model:
    """The cut model in memory; its layers may differ in shape, which no checkpoint can hold."""
    family, size = teacher.family, teacher.family.layers_per_block
    blocks: dict[int, nn.Module] = {}
    for i in selection.kept:
        block = blocks.setdefault(i // size, copy.deepcopy(teacher.layer(i)))
        axes = selection.layers[i]
        if axes:
            kind = teacher.architecture.layers[i].kind
            narrowed = copy.deepcopy(narrow_layer(teacher, i, axes))
            block.set_submodule(family.norms[kind], narrowed.norm)
            block.set_submodule(family.mixers[kind], narrowed.mixer)
    module = copy.deepcopy(teacher.module)
    path = family.layer_module(0).rpartition(".")[0]
    module.set_submodule(path, nn.ModuleList(blocks.values()))
    prepare(module, teacher.device)
    return replace(teacher, architecture=selection.apply(teacher.architecture), module=module)


def measure(bench: Bench, cut: str, recipe: Recipe, settings: dict[str, Any]) -> dict[str, Any]:
    """Losses and KL of one cut at every station."""
    selection = choose(bench, cut)
    judge = TeacherStates(bench.teacher.module, bench.search)
    pruned = cut_model(bench.teacher, selection)

    def station(model: Model) -> dict[str, float]:
        found = evaluate(model.module, judge, bench.search)
        return {"loss": found.loss, "kl": found.kl}

    result: dict[str, Any] = {
        "share_removed": bench.share(selection),
        "pattern": selection.apply(bench.teacher.architecture).pattern,
        "sizes": sizes_of(selection),
        "settings": settings,
        "cut": station(pruned),
    }
    repaired = clone(pruned)
    started = time.monotonic()
    repair(
        bench.teacher,
        repaired,
        selection,
        bench.calibration,
        **settings,
        dtype=torch.bfloat16,
        label=f"{cut}: repair",
    )
    result["repair_seconds"] = round(time.monotonic() - started, 1)
    result["repaired"] = station(repaired)
    for name, model in (("cut", pruned), ("repaired", repaired)):
        if recipe.distill.steps:
            train(model.module, bench.teacher.module, bench.distillation, settings_of(recipe))
            result[f"{name}_distilled"] = station(model)
    teacher = evaluate(bench.teacher.module, judge, bench.search).loss
    result["gap_closed"] = closed(teacher, result["cut"]["loss"], result["repaired"]["loss"])
    return result


def closed(teacher: float, cut: float, repaired: float) -> float:
    """Percent of the gap between cut and teacher that repair closes."""
    return 100 * (cut - repaired) / (cut - teacher)


def sizes_of(selection: Selection) -> list[dict[str, int] | None]:
    """Units that every layer keeps along its cut axes; None for removed layers."""
    return [
        None if axes is None else {axis: len(kept) for axis, kept in axes.items()}
        for axes in selection.layers
    ]


def prepare_bench(recipe: Recipe, options: argparse.Namespace) -> Bench:
    """Load the teacher and the texts, and score on the calibration tokens."""
    teacher = load(resolve(recipe.model, recipe.revision), device=options.device)
    calibration = recipe_blocks(recipe, "calibration", teacher.tokenizer, options.blocks)
    assert calibration.numel() <= MAX_TOKENS, calibration.numel()
    search = recipe_blocks(recipe, "search", teacher.tokenizer, options.search_blocks)
    needed = max(1, recipe.distill.steps * recipe.distill.batch)
    distillation = recipe_blocks(recipe, "distillation", teacher.tokenizer, needed)
    scores = score(
        teacher,
        calibration,
        {},
        metrics=("hidden_mse",),
        layer_sequences=recipe.score.blocks,
    )
    return Bench(teacher, scores, calibration, search, distillation)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="demo", help="`demo`, a folder or a hub id")
    add("--suffix", required=True, help="of the figures and of the results file")
    add("--recipe", type=Path, default=MODEL_RECIPE, help="data, distillation and repair settings")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override of the recipe")
    add("--json", type=Path, help="results file (default: docs/results/repair_gap_SUFFIX.json)")
    add("--results", type=Path, default=RESULTS, help="folder of both files")
    add("--device", default="cpu")
    add("--blocks", type=int, default=384, help="sequences of calibration text")
    add("--search-blocks", type=int, default=64, help="sequences of search text")
    add("--cuts", nargs="+", choices=CUTS, default=list(CUTS))
    add("--steps", nargs="*", default=[], metavar="CUT=N", help="repair.steps of single cuts")
    return parser.parse_args(arguments)


def measured_before(path: Path, result: dict[str, Any]) -> dict[str, Any]:
    """The other cuts of the same model on the same search text that a results file holds."""
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    same = all(known.get(key) == result[key] for key in ("parameters", "search_tokens"))
    cuts: dict[str, Any] = known["cuts"] if same else {}
    return cuts


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all cuts, write the results file and the figures."""
    options = parse(arguments)
    recipe = Recipe.load(options.recipe, [f"model={options.model}", *options.set])
    settings = recipe.repair.model_dump(exclude={"blocks"})
    bench = prepare_bench(recipe, options)
    judge = TeacherStates(bench.teacher.module, bench.search)
    result: dict[str, Any] = {
        "teacher": asdict(evaluate(bench.teacher.module, judge, bench.search)),
        "parameters": parameter_count(bench.teacher.architecture, bench.teacher.family),
        "calibration_tokens": bench.calibration.numel(),
        "search_tokens": bench.search.numel(),
        "distillation_tokens": bench.distillation.numel(),
        "cuts": {},
    }
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.json or options.results / f"repair_gap_{options.suffix}.json"
    result["cuts"] = measured_before(path, result)
    steps = {cut: int(number) for cut, _, number in (s.partition("=") for s in options.steps)}
    for cut in options.cuts:
        own = settings | ({"steps": steps[cut]} if cut in steps else {})
        found = measure(bench, cut, recipe, own)
        source = recipe.data.calibration.source
        result["cuts"][cut] = {**found, "calibration": source, "device": device()}
        print(cut, json.dumps(result["cuts"][cut]), flush=True)
        atomic_write_json(path, result)
        value = round(result["cuts"][cut]["gap_closed"], 2)
        name = f"gap_closed_{cut}_{options.suffix}"
        record("importance", {name: (value, "%")}, folder=options.results)


if __name__ == "__main__":
    main()
