"""What candidates cost that walk together, against one by one, on the CPU and on a GPU.

    python scripts/bench_trie.py cpu      # the demo teacher: 64 candidates together, one by one
    python scripts/bench_trie.py gpu      # an 8B-shaped model of random weights, the same

One by one is the same evaluator, called with one candidate at a time; the two alternate in one run.
The bound on the speed-up is the inverse of the node ratio: layers computed together over layers
computed one by one. It counts a narrow layer like a whole one and leaves out what is paid besides
layers: each candidate's head, and per call the teacher's head and the making of narrow layers, of
which one by one pays more. The weighted bound counts heads and layers with times measured here.
"""

from __future__ import annotations

import argparse
import ctypes
import random
import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from figures import RESULTS, record
from random_model import SHAPES, random_model

from minipuzzle.architecture import FFNLayer
from minipuzzle.data.blocks import recipe_blocks
from minipuzzle.memory import Deployment
from minipuzzle.model import Model, load
from minipuzzle.prune.score import score
from minipuzzle.recipe import AxesConfig, AxisRange, MaxRemoved, Recipe, SearchConfig, demo_recipe
from minipuzzle.scores import Scores
from minipuzzle.search.costs import CostModel
from minipuzzle.search.proxies import ProxyEvaluator
from minipuzzle.search.ranges import make_space, recipe_space
from minipuzzle.search.space import Limits, Point, Space
from minipuzzle.search.trie import Trie, decisions, node_ratio
from minipuzzle.selection import Selection
from minipuzzle.source import demo_teacher

CANDIDATES = 64
BATCH = 8  # candidates that a study proposes at once
COARSE = "search.axes={width: {min: 0.25, step: 128}}"  # 5 widths; the recipe's are 16 apart
GPU_BUDGET = 0.85  # of the teacher's memory
Figures = dict[str, tuple[float | int | None, str]]


@dataclass(frozen=True)
class Setting:
    """A model with the scores that make its candidates, and the text they are judged on."""

    model: Model
    scores: Scores
    ids: torch.Tensor

    def selections(self, space: Space, points: Sequence[Point]) -> list[Selection]:
        """Points as cuts."""
        return [space.selection(point, self.scores) for point in points]

    def some(self, space: Space, number: int = CANDIDATES) -> list[Selection]:
        """Cuts of so many points of a space, drawn at random from those that fit."""
        points = list(space.points())
        chosen = random.Random(0).sample(points, min(number, len(points)))
        return self.selections(space, chosen)


def settle(threads: int) -> None:
    """So many threads, and freed memory stays with the process (glibc's mallopt, see malloc.h).

    Else large blocks go back to the system and are faulted in again at the next call, which makes a
    Mamba layer take up to half as long again, or not, depending on what ran before.
    """
    torch.set_num_threads(threads)
    trim, mapped, largest = -1, -3, 2**25  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD and its maximum
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(trim, 2**30)
        libc.mallopt(mapped, largest)


def demo_setting(blocks: int) -> Setting:
    """The demo teacher, scored on 8 sequences of its calibration text."""
    recipe = Recipe.load(demo_recipe())
    model = load(demo_teacher())
    calibration = recipe_blocks(recipe, "calibration", model.tokenizer, 8)
    scores = score(
        model,
        calibration,
        {},
        metrics=("hidden_mse",),
        unit_metrics=("energy",),
        layer_sequences=4,
    )
    return Setting(model, scores, recipe_blocks(recipe, "search", model.tokenizer, blocks))


def demo_space(setting: Setting, *overrides: str) -> Space:
    """The space of the demo's recipe, with some of its values changed."""
    recipe = Recipe.load(demo_recipe(), list(overrides))
    model = setting.model
    return recipe_space(recipe, model.architecture, model.family, setting.scores)


def random_setting(options: argparse.Namespace) -> tuple[Setting, Space]:
    """A model of random weights and tokens; layers at three quarters of its depth go first."""
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    model = random_model(options.shape, options.device, dtype)
    architecture = model.architecture
    generator = torch.Generator().manual_seed(0)
    depth = torch.arange(len(architecture.layers)) / len(architecture.layers)
    importance = (depth - 0.75).abs() + 0.1 * torch.rand(len(depth), generator=generator)
    kinds = tuple(layer.kind for layer in architecture.layers)
    widths = {i: x.width for i, x in enumerate(architecture.layers) if isinstance(x, FFNLayer)}
    units = {(i, "width", "energy"): torch.rand(w, generator=generator) for i, w in widths.items()}
    scores = Scores(kinds, {"hidden_mse": importance.double()}, units, {})
    step = max(16, max(widths.values()) // 10 // 256 * 256)
    config = SearchConfig(
        axes=AxesConfig(width=AxisRange(min=0.6, step=step)),
        max_removed=MaxRemoved(mamba=4, attention=1, ffn=6),
    )
    costs = CostModel(architecture, model.family, Deployment(context=8192))
    whole = costs.of(architecture).memory_bytes
    space = make_space(costs, Limits(int(GPU_BUDGET * whole)), config, scores)
    shape = (options.blocks, options.block)
    ids = torch.randint(0, architecture.vocabulary, shape, generator=generator)
    return Setting(model, scores, ids), space


def seconds(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Time of one call by the clock (all queued on a GPU included), and of the processor."""
    start, processor = time.perf_counter(), time.process_time()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - processor


@dataclass(frozen=True)
class Comparison:
    """Medians over the rounds of one by one / together, by the clock and by processor time."""

    clock: float
    processor: float
    difference: float  # largest, of KL, relative


def compare(setting: Setting, selections: Sequence[Selection], rounds: int) -> Comparison:
    """Judge all candidates together and one by one, in turn."""
    evaluate = ProxyEvaluator(setting.model, setting.ids)
    kls: dict[str, list[float]] = {}

    def together(some: Sequence[Selection] = selections) -> None:
        kls["together"] = [found.kl for found in evaluate(some)]

    def alone(some: Sequence[Selection] = selections) -> None:
        kls["alone"] = [evaluate([selection])[0].kl for selection in some]

    together(selections[:2])  # kernels are compiled once
    alone(selections[:2])
    ratios = []
    for k in range(rounds):
        runs = [together, alone]
        took = {run: seconds(run, setting.model.device) for run in runs[:: 1 - 2 * (k % 2)]}
        ratios.append([a / b for a, b in zip(took[alone], took[together], strict=True)])
        shown = {run.__name__: [round(t, 2) for t in times] for run, times in took.items()}
        print(f"round {k}: {shown} s by the clock and of the processor", flush=True)
    clock, processor = (statistics.median(column) for column in zip(*ratios, strict=True))
    pairs = zip(kls["together"], kls["alone"], strict=True)
    return Comparison(clock, processor, max(abs(a / b - 1) for a, b in pairs))


@torch.no_grad()
def weighted_bound(setting: Setting, selections: Sequence[Selection]) -> float:
    """One by one / together, every layer and head at the time it takes on one chunk here."""
    evaluate = ProxyEvaluator(setting.model, setting.ids)
    walk, maker = evaluate.walk, evaluate.maker
    ids = setting.ids[: walk.rows_per_chunk(setting.ids.shape[1])]
    hidden = walk.embed(ids)

    def cost(call: Callable[[], object]) -> float:
        call()
        return min(min(seconds(call, walk.device)) for _ in range(3))

    together = alone = 0.0
    trie = Trie.of(decisions(selections, maker.key))
    for i, level in enumerate(trie.levels):
        costs: dict[Hashable, float] = {}
        for step in level:
            selection = selections[step.candidate]
            costs[maker.key(selection, i)] = cost(partial(maker.layer(selection, i), hidden))
            together += costs[maker.key(selection, i)] * len(step.pairs)
        alone += sum(costs.get(maker.key(selection, i), 0.0) for selection in selections)
    reference = walk.final(hidden)
    one, four = (
        cost(partial(evaluate.compare, ids, reference, [hidden] * n, [None] * n)) for n in (1, 4)
    )
    head = (four - one) / 3  # of a candidate; the rest of `one` is the teacher's
    number = len(selections)
    return (alone + number * one) / (together + one + (number - 1) * head)


def of_demo(options: argparse.Namespace) -> Figures:
    """The demo's candidates: time, bounds, and node ratios of other sets of candidates."""
    settle(options.threads)
    setting = demo_setting(options.blocks)
    space, fine = demo_space(setting, COARSE), demo_space(setting)
    selections = setting.some(space)
    found, ratio = compare(setting, selections, options.rounds), node_ratio(selections)
    bound = weighted_bound(setting, selections)
    fines = setting.some(fine)
    everything = setting.selections(fine, list(fine.points()))
    batches = [node_ratio(fines[k : k + BATCH]) for k in range(0, len(fines), BATCH)]
    nodes, times = "of the layers one by one", "times as fast"
    return {
        "trie_nodes_ratio": (round(ratio, 4), nodes),
        "trie_nodes_ratio_fine_widths": (round(node_ratio(fines), 4), nodes),
        "trie_nodes_ratio_batch": (round(statistics.mean(batches), 4), nodes),
        "trie_nodes_ratio_whole_space": (round(node_ratio(everything), 4), nodes),
        "trie_candidates": (len(selections), ""),
        "trie_speedup_cpu": (round(found.processor, 3), f"{times}, by processor time"),
        "trie_speedup_cpu_clock": (round(found.clock, 3), f"{times}, by the clock"),
        "trie_share_of_bound_cpu": (round(found.processor * ratio, 3), "of 1 / trie_nodes_ratio"),
        "trie_share_of_weighted_bound_cpu": (
            round(found.processor / bound, 3),
            "of the bound with the times of layers and heads",
        ),
        "trie_difference_cpu": (float(f"{found.difference:.2g}"), "largest of KL, relative"),
    }


def of_random(options: argparse.Namespace) -> Figures:
    """The same for random weights in a large model's shape."""
    setting, space = random_setting(options)
    selections = setting.some(space)
    found, ratio = compare(setting, selections, options.rounds), node_ratio(selections)
    name = f"gpu_{options.shape}"
    return {
        f"trie_nodes_ratio_{name}": (round(ratio, 4), "of the layers one by one"),
        f"trie_candidates_{name}": (len(selections), ""),
        f"trie_speedup_{name}": (round(found.clock, 3), "times as fast"),
        f"trie_share_of_bound_{name}": (round(found.clock * ratio, 3), "of 1 / the node ratio"),
        f"trie_difference_{name}": (float(f"{found.difference:.2g}"), "largest of KL, relative"),
    }


def main() -> None:
    """Run a measurement and record its figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("place", choices=["cpu", "gpu"])
    parser.add_argument("--rounds", type=int, help="default: 3, on a GPU 2")
    parser.add_argument("--blocks", type=int, help="sequences; default: 4, on a GPU 8")
    parser.add_argument("--block", type=int, default=2048, help="tokens of a sequence, gpu only")
    parser.add_argument("--shape", default="8b", choices=sorted(SHAPES), help="gpu only")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"], help="gpu only")
    parser.add_argument("--threads", type=int, default=1, help="of the processor, cpu only")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--dry", action="store_true", help="print the figures, record none")
    options = parser.parse_args()
    on_gpu = options.place == "gpu"
    options.rounds = options.rounds or (2 if on_gpu else 3)
    options.blocks = options.blocks or (8 if on_gpu else 4)
    figures = of_random(options) if on_gpu else of_demo(options)
    for name, (value, unit) in figures.items():
        print(f"{name}: {value} {unit}")
    if not options.dry:
        record("search", figures, folder=options.results)


if __name__ == "__main__":
    main()
