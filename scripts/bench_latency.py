"""The latency table against whole models, timed in the same rounds on this device.

    OMP_NUM_THREADS=1 python scripts/bench_latency.py
    python scripts/bench_latency.py --shape 8b --device cuda --dtype bfloat16 --results results

The table's probes and the whole models decode turn by turn (random weights; the stock class, its
cache at the context). Whole models: the uncut one, fewer layers of each kind, narrower FFN at and
between the sizes of the table, fewer Mamba heads, and mixtures. The largest difference between a
whole model and the sum of its parts is recorded: for the demo's shape as
`latency_model_error_percent`, for others as `latency_model_error_percent_gpu_<shape>`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from figures import RESULTS, record
from random_model import SHAPES, shape_config

from minipuzzle import families
from minipuzzle.architecture import Architecture, MambaLayer
from minipuzzle.decoding import Decoder, Pool, memory_is_a_user_error, needed_bytes, step_seconds
from minipuzzle.files import atomic_write_json
from minipuzzle.jsonfile import read_json
from minipuzzle.latency import LatencyTable
from minipuzzle.latencyplan import Plan
from minipuzzle.memory import Deployment
from minipuzzle.plan import width_step, with_width, without
from minipuzzle.progress import table as text_table
from minipuzzle.source import demo_teacher
from minipuzzle.units import parse_tokens

DEMO = "demo"
ROUNDS = {"cpu": 80, "cuda": 60}


def narrower_heads(whole: Architecture, share: float) -> Architecture:
    """Every Mamba layer with a share of its heads, in whole groups of 8."""

    def narrowed(layer: MambaLayer) -> MambaLayer:
        step = max(8, layer.groups)
        return replace(layer, heads=int(layer.heads * share) // step * step)

    layers = (narrowed(x) if isinstance(x, MambaLayer) else x for x in whole.layers)
    return replace(whole, layers=tuple(layers))


def whole_models(whole: Architecture, widths: list[int]) -> dict[str, Architecture]:
    """Name -> architecture: what is compared.

    One layer of each kind stays: transformers' cache counts tokens in an attention layer.
    """
    mamba, attention, ffn = (min(max(1, n // 4), n - 1) for n in whole.counts().values())
    between = (widths[len(widths) // 2] + widths[len(widths) // 2 - 1]) // 2
    mixed = without(without(whole, "mamba", mamba), "ffn", ffn)
    return {
        "uncut": whole,
        f"{mamba} Mamba layers less": without(whole, "mamba", mamba),
        f"{attention} attention layers less": without(whole, "attention", attention),
        f"{ffn} FFN layers less": without(whole, "ffn", ffn),
        f"FFN width {widths[0]}": with_width(whole, widths[0]),
        f"FFN width {between}": with_width(whole, between),
        "half the Mamba heads": narrower_heads(whole, 0.5),
        f"{mamba} Mamba, {ffn} FFN less": mixed,
        f"the same, width {between}": with_width(mixed, between),
        "the same, 3/4 of the heads": narrower_heads(with_width(mixed, between), 0.75),
    }


def sizes_of(whole: Architecture) -> dict[str, list[int]]:
    """Sizes that the table is asked for: FFN widths from a quarter up, Mamba heads from half."""
    width = max(getattr(layer, "width", 0) for layer in whole.layers)
    heads = max(getattr(layer, "heads", 0) for layer in whole.layers)
    step = width_step(width)
    least = width // 4 // step * step
    return {"width": [*range(least, width, step), width], "heads": [heads // 2, heads]}


def compare(
    config: Mapping[str, Any],
    at: Deployment,
    device: torch.device,
    dtype: torch.dtype,
    limit: float,
) -> tuple[LatencyTable, dict[str, tuple[float, float]]]:
    """The table, and name -> (seconds of the whole model, seconds by the table)."""
    family, whole = families.read(config)
    sizes = sizes_of(whole)
    models = whole_models(whole, sizes["width"])
    plan = Plan.make(whole, family, at, sizes)
    every = [probe.architecture for probe in plan.probes.values()] + list(models.values())
    with memory_is_a_user_error(needed_bytes(every, family, at, dtype), device, "this benchmark"):
        pool = Pool(device, dtype)
        decoders = plan.decoders(config, pool) | {
            name: Decoder(model, family, config, at, pool) for name, model in models.items()
        }
        seconds = step_seconds(decoders, rounds=ROUNDS[device.type], limit=limit)
    table = LatencyTable.fit(plan, seconds, device, dtype)
    return table, {name: (seconds[name], table.of(model)) for name, model in models.items()}


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=[DEMO, *sorted(SHAPES)], default=DEMO)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--context", default="512", help="tokens")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--limit", type=float, default=100.0, help="seconds of the rounds")
    parser.add_argument("--out", type=Path, help="the table as JSON")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    demo = args.shape == DEMO
    config = read_json(demo_teacher() / "config.json") if demo else shape_config(args.shape)
    at = Deployment(context=parse_tokens(args.context), batch=args.batch)
    started = time.perf_counter()
    table, found = compare(
        config, at, torch.device(args.device), getattr(torch, args.dtype), args.limit
    )
    rows = [
        [name, f"{1000 * real:.3f}", f"{1000 * told:.3f}", f"{100 * (told / real - 1):+.1f}"]
        for name, (real, told) in found.items()
    ]
    print(text_table(["model", "ms a step", "by the table", "error %"], rows))
    for kind, values in table.seconds.items():
        print(kind, table.grids[kind].knots, [f"{1e6 * x:.0f} us" for x in values.values()])
    print(f"base {1e6 * table.base():.0f} us, probes off by {table.misfit:.1%} at most")
    print(f"{time.perf_counter() - started:.0f} s in all", flush=True)
    if args.out:
        atomic_write_json(args.out, table.to_json())
    error = max(abs(told / real - 1) for real, told in found.values())
    name = "latency_model_error_percent"
    if not demo:
        name += f"_{'gpu' if args.device == 'cuda' else args.device}_{args.shape}"
    unit = f"%, the largest of {len(found)} architectures"
    print(record("search", {name: (round(100 * error, 2), unit)}, folder=args.results))


if __name__ == "__main__":
    main()
