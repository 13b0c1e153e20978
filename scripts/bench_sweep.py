"""One sweep against one forward pass per removed layer: time for hidden_mse, and all differences.

The two alternate in one run on the same tokens, so that a busy machine slows both; what is given is
the median over the rounds of sweep time / reference time. Ideal is half.

    python scripts/bench_sweep.py                                  # the demo teacher on the CPU
    python scripts/bench_sweep.py --shape 8b --device cuda --tokens 16384 --rounds 2
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from figures import record
from random_model import SHAPES, random_model

from minipuzzle.data.blocks import recipe_blocks
from minipuzzle.metrics import LAYER_METRICS, LayerMetric
from minipuzzle.model import Model, load
from minipuzzle.prune.reference import layer_scores_reference
from minipuzzle.prune.score import score
from minipuzzle.recipe import Recipe, demo_recipe
from minipuzzle.source import demo_teacher

DEMO = "demo"


def open_shape(options: argparse.Namespace) -> tuple[Model, torch.Tensor]:
    """The model and its text: the demo's own, or random weights on random tokens."""
    shape = (options.tokens // options.block, options.block)
    if options.shape == DEMO:
        model = load(demo_teacher(), device=options.device)
        recipe = Recipe.load(demo_recipe(), [f"data.calibration.block={options.block}"])
        return model, recipe_blocks(recipe, "calibration", model.tokenizer, shape[0])
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    model = random_model(options.shape, options.device, dtype)
    generator = torch.Generator().manual_seed(0)
    return model, torch.randint(0, model.architecture.vocabulary, shape, generator=generator)


def swept(
    model: Model, ids: torch.Tensor, metrics: tuple[LayerMetric, ...]
) -> dict[str, torch.Tensor]:
    """Scores of all layers by one sweep."""
    return dict(score(model, ids, {}, metrics=metrics, unit_metrics=()).layers)


def plain(
    model: Model, ids: torch.Tensor, metrics: tuple[LayerMetric, ...]
) -> dict[str, torch.Tensor]:
    """The same by one forward pass per removed unit, spread over its layers."""
    units = model.family.removable(model.architecture)
    found = layer_scores_reference(model, ids, metrics)
    repeats = torch.tensor([len(layers) for layers in units])
    return {metric: values.repeat_interleave(repeats) for metric, values in found.items()}


def seconds(run: Callable[[], object], device: str) -> tuple[float, float]:
    """Time of one call by the clock (all queued on a GPU included), and of the processor."""
    start, processor = time.perf_counter(), time.process_time()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - processor


def ratios(model: Model, ids: torch.Tensor, rounds: int, device: str) -> tuple[float, float]:
    """Median over the rounds of sweep / reference, by the clock and by processor time."""
    metrics: tuple[LayerMetric, ...] = ("hidden_mse",)
    seconds(partial(swept, model, ids[:1], metrics), device)  # kernels are compiled once
    found = []
    for k in range(rounds):
        runs = {"sweep": swept, "reference": plain}
        names = sorted(runs, reverse=bool(k % 2))  # each goes first in turn
        took = {n: seconds(partial(runs[n], model, ids, metrics), device) for n in names}
        found.append([a / b for a, b in zip(took["sweep"], took["reference"], strict=True)])
        shown = {n: [round(t, 2) for t in times] for n, times in took.items()}
        print(f"round {k}: {shown} s by the clock, of the processor: {found[-1]}", flush=True)
    clock, processor = (statistics.median(column) for column in zip(*found, strict=True))
    return clock, processor


def relative(model: Model, ids: torch.Tensor) -> dict[str, float]:
    """Metric -> largest |sweep - reference| / reference over all layers."""
    fast, slow = swept(model, ids, LAYER_METRICS), plain(model, ids, LAYER_METRICS)
    return {m: float(((fast[m] - slow[m]) / slow[m]).abs().max()) for m in slow}


def main() -> None:
    """Run the measurement and record its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", default=DEMO, choices=[DEMO, *SHAPES])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--block", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compared", type=int, default=4, help="sequences of the comparison")
    parser.add_argument("--dry", action="store_true", help="print the figures, record none")
    options = parser.parse_args()
    model, ids = open_shape(options)
    middle, processor = ratios(model, ids, options.rounds, options.device)
    worst = relative(model, ids[: options.compared])
    place = "gpu" if options.device == "cuda" else "cpu"
    print(f"{place}: sweep / reference {middle:.3f}; relative differences {worst}")
    figures: dict[str, tuple[float | int | None, str]] = {
        f"sweep_over_reference_{place}": (round(middle, 4), "of the reference's time")
    }
    if place == "cpu":  # what other programs on the machine disturb less
        unit = "of the reference's processor time"
        figures["sweep_over_reference_cpu_core_seconds"] = (round(processor, 4), unit)
    for metric, value in worst.items():
        figures[f"sweep_difference_{metric}_{place}"] = (float(f"{value:.3g}"), "largest, relative")
    if not options.dry:
        record("importance", figures)


if __name__ == "__main__":
    main()
