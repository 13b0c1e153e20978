"""Measure the fast CPU path against the stock one: tokens/s of a forward and of a training step.

Builds a model of the demo teacher's shape with random weights and alternates the two paths, so that
a busy machine slows both. Two rates are given: by the clock, and by the processor time of all
threads (tokens per core second), which other programs disturb less. Set OMP_WAIT_POLICY=passive in
the environment to keep waiting threads out of the processor time.

    python scripts/bench_scan.py --heads 16 --head-dim 24 --batch 4 --tokens 512 --json out.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import NemotronHConfig, NemotronHForCausalLM

from minipuzzle.fastscan import install, uninstall

_PATTERN = "M-M-M-M*-M-M-M-M*-M-M-M-M*-"
_KINDS = {"M": "mamba", "*": "attention", "-": "mlp"}
_PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm_"}
_PATHS: dict[str, Callable[[Any], int]] = {"stock": uninstall, "fast": install}


def build_model(heads: int, head_dim: int) -> Any:
    """The demo teacher's shape (8.3 M parameters with 16 heads x 24), random weights, eval mode."""
    torch.manual_seed(0)
    config = NemotronHConfig(
        vocab_size=4096,
        hidden_size=192,
        intermediate_size=672,
        layers_block_type=[_KINDS[letter] for letter in _PATTERN],
        num_hidden_layers=len(_PATTERN),
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        ssm_state_size=64,
        mamba_num_heads=heads,
        mamba_head_dim=head_dim,
        n_groups=2,
        conv_kernel=4,
        chunk_size=64,
        rescale_prenorm_residual=False,
        use_cache=False,
    )
    return NemotronHForCausalLM(config).eval()


def measure(run: Callable[[], None]) -> tuple[float, float]:
    """Seconds by the clock and of processor time."""
    clock, processor = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - clock, time.process_time() - processor


def product_share(run: Callable[[], None]) -> float:
    """Share of matrix products in the processor time of all operators."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        run()
    events = record.key_averages()
    total: float = sum(event.self_cpu_time_total for event in events)
    products: float = sum(e.self_cpu_time_total for e in events if e.key in _PRODUCTS)
    return products / total


def bench(model: Any, tokens: torch.Tensor, repeats: int) -> dict[str, dict[str, Any]]:
    """Per task and path: all seconds measured, the best rates and the matrix products' share."""

    def forward() -> None:
        with torch.no_grad():
            model(tokens)

    def step() -> None:
        model(tokens, labels=tokens).loss.backward()
        model.zero_grad()

    tasks = {"forward": forward, "training step": step}
    seconds: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for repeat in range(repeats + 1):
        for path, switch in _PATHS.items():
            switch(model)
            for task, run in tasks.items():
                taken = measure(run)
                if repeat:  # the first round warms up
                    seconds.setdefault((task, path), []).append(taken)
    results: dict[str, dict[str, Any]] = {task: {} for task in tasks}
    for (task, path), taken_all in seconds.items():
        _PATHS[path](model)
        results[task][path] = {
            "seconds": [clock for clock, _ in taken_all],
            "core_seconds": [processor for _, processor in taken_all],
            "tokens_per_s": tokens.numel() / min(clock for clock, _ in taken_all),
            "tokens_per_core_s": tokens.numel() / min(processor for _, processor in taken_all),
            "product_share": product_share(tasks[task]),
        }
    return results


def ratio(result: dict[str, Any], kind: str) -> float:
    """Median over the rounds of stock / fast time; the two of a round ran one after the other."""
    pairs = zip(result["stock"][kind], result["fast"][kind], strict=True)
    middle: float = statistics.median(stock / fast for stock, fast in pairs)
    return middle


def main() -> None:
    """Run the measurement, print a table and write the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name, default in (("heads", 16), ("head-dim", 24), ("batch", 4), ("tokens", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = build_model(args.heads, args.head_dim)
    results = bench(model, torch.randint(0, 4096, (args.batch, args.tokens)), args.repeats)
    print(f"{'task':14} {'path':6} {'tokens/s':>9} {'per core s':>10} {'products':>9}")
    for task, result in results.items():
        for path in _PATHS:
            row = result[path]
            rates = f"{row['tokens_per_s']:9.0f} {row['tokens_per_core_s']:10.0f}"
            print(f"{task:14} {path:6} {rates} {row['product_share']:9.0%}")
        result["ratio_clock"] = ratio(result, "seconds")
        result["ratio_core"] = ratio(result, "core_seconds")
        print(f"{task:14} ratio  {result['ratio_clock']:9.2f} {result['ratio_core']:10.2f}")
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k != "json"}
        args.json.write_text(json.dumps({"settings": settings, "results": results}, indent=1))


if __name__ == "__main__":
    main()
