"""Speed of one layer of every kind on this device, by implementation of the Mamba-2 mixer.

    python scripts/bench_layers.py --shape 56b

Prints milliseconds a layer, the tokens/s of a whole forward pass that follow from them, and the
error of each implementation against the plain one in fp32. "kernels" is stock transformers with
`mamba_ssm`, "plain" stock transformers without it, "own" minipuzzle's (gpuscan.py), whose norms
count in its rows only.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from figures import record
from random_model import SHAPES, random_model
from torch import nn

from minipuzzle import fastscan, gpuscan
from minipuzzle.walk import Walk

RECORDED = {
    "stock_kernels": "kernels",
    "stock_plain": "plain",
    "kernels": "own, kernel scan",
    "plain": "own, chunks of 128",
}
STOCK = "_stock_scan_of_the_benchmark"


def milliseconds(call: Callable[[], Any], device: str, repeats: int = 7) -> float:
    """Median time of a call after two that warm up."""
    times = []
    for i in range(repeats + 2):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        if i >= 2:
            times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def synchronize(device: str) -> None:
    """Wait for what the device was given to do."""
    if device == "cuda":
        torch.cuda.synchronize()


def mixers(mixer: nn.Module) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """The mixer's forward by implementation; each sets the module up for itself."""
    import transformers.models.nemotron_h.modeling_nemotron_h as modeling

    if STOCK not in vars(modeling):  # transformers' choice, before anything is changed
        setattr(modeling, STOCK, modeling.mamba2_chunk_scan)
    stock_scan = getattr(modeling, STOCK)
    plain_scan = getattr(stock_scan, "__wrapped__", stock_scan)
    kernel = gpuscan.kernel_scan()

    def stock(scan: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        def call(hidden: torch.Tensor) -> torch.Tensor:
            modeling.mamba2_chunk_scan = scan
            gpuscan.uninstall(mixer)
            result: torch.Tensor = mixer(hidden)
            return result

        return call

    def own(chunk: int, scan: Any = None) -> Callable[[torch.Tensor], torch.Tensor]:
        def call(hidden: torch.Tensor) -> torch.Tensor:
            gpuscan.install(mixer)
            ours: Any = gpuscan
            keep = ours.CHUNK, ours.kernel_scan
            ours.CHUNK, ours.kernel_scan = chunk, lambda: scan
            try:
                result: torch.Tensor = mixer(hidden)
            finally:
                ours.CHUNK, ours.kernel_scan = keep
            return result

        return call

    found = {"plain": stock(plain_scan)}
    found |= {f"own, chunks of {chunk}": own(chunk) for chunk in (64, 128, 256)}
    if kernel is not None:
        found = {"kernels": stock(stock_scan), "own, kernel scan": own(128, kernel)} | found
    return found


def compare(
    calls: dict[str, Callable[[torch.Tensor], torch.Tensor]],
    hidden: torch.Tensor,
    exact: torch.Tensor,
    device: str,
) -> dict[str, dict[str, float]]:
    """Time, relative error and GPU memory of each implementation on hidden (B, T, D)."""
    rows = {}
    for name, call in calls.items():
        run = functools.partial(call, hidden)
        before = peak_gib(device)
        try:
            difference = run().float()[: len(exact)] - exact
            rows[name] = {"error": float(difference.norm() / exact.norm())}
            rows[name] |= {"ms": milliseconds(run, device), "gib": peak_gib(device) - before}
        except (RuntimeError, TypeError) as error:
            print(f"  {name} failed: {str(error)[:200]}", flush=True)
            rows.pop(name, None)
            continue
        show(name, rows[name])
    return rows


def peak_gib(device: str) -> float:
    """Most GPU memory since the last call, in GiB."""
    if device != "cuda":
        return 0.0
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak


def show(name: str, row: dict[str, float]) -> None:
    """One line of figures."""
    print(f"  {name:18}", {key: float(f"{value:.4g}") for key, value in row.items()}, flush=True)


def pieces(mixer: Any, hidden: torch.Tensor, device: str) -> dict[str, float]:
    """Milliseconds of the parts of a mixer, stock against own."""
    import transformers.models.nemotron_h.modeling_nemotron_h as modeling

    inner = mixer.num_heads * mixer.head_dim
    maps = mixer.n_groups * mixer.ssm_state_size
    projected: torch.Tensor = mixer.in_proj(hidden)
    gate, mixed, dt = projected.tensor_split((inner, 2 * (inner + maps)), -1)
    weight, bias = mixer.conv1d.weight, mixer.conv1d.bias
    convolved = gpuscan.convolve(mixed, weight[:, 0], bias)
    x, b, c = convolved.tensor_split((inner, inner + maps), -1)
    y = torch.randn_like(gate)
    shape = (*hidden.shape[:2], mixer.num_heads, mixer.head_dim)
    by_group = (*hidden.shape[:2], mixer.n_groups, mixer.ssm_state_size)
    steps = torch.nn.functional.softplus(dt.float())
    a = -torch.exp(mixer.A_log.float())
    scan_args = (x.view(shape), steps, a, b.view(by_group), c.view(by_group), mixer.D)
    norm = mixer.norm
    calls: dict[str, Callable[[], Any]] = {
        "in_proj": lambda: mixer.in_proj(hidden),
        "out_proj": lambda: mixer.out_proj(y),
        "conv, stock": lambda: modeling.causal_conv1d_fn(
            mixed.transpose(1, 2), weight[:, 0], bias, activation="silu"
        ),
        "conv, own": lambda: gpuscan.convolve(mixed, weight[:, 0], bias),
        "gated norm, stock": lambda: getattr(norm, "stock", type(norm)).forward(norm, y, gate),
        "gated norm, own": lambda: gpuscan.gated_norm(
            y, gate, norm.weight, norm.variance_epsilon, norm.group_size
        ),
        "scan, own": lambda: gpuscan.scan(*scan_args),
    }
    kernel = gpuscan.kernel_scan()
    if kernel is not None:
        calls["scan, kernel"] = lambda: kernel(*scan_args)
    return {name: milliseconds(call, device) for name, call in calls.items()}


def measure(walk: Walk, rows: int, tokens: int, device: str) -> dict[str, Any]:
    """Everything about layers 0 (Mamba), 1 (attention) and 2 (FFN) on `rows` sequences."""
    first = walk.sublayer(0)
    dtype = next(first.norm.parameters()).dtype
    torch.manual_seed(0)
    hidden = torch.randn(rows, tokens, walk.model.architecture.hidden, device=device, dtype=dtype)
    calls = mixers(first.mixer)
    exact = calls["plain"](hidden[:1]) if dtype == torch.float32 else None
    if exact is None:
        first.mixer.float()
        exact = calls["plain"](hidden[:1].float())
        first.mixer.to(dtype)
    peak_gib(device)
    found = compare(calls, hidden, exact, device)
    parts = pieces(first.mixer, hidden, device)
    blocks = nn.ModuleList(walk.model.layer(i) for i in range(3))
    gpuscan.uninstall(blocks)
    layers = {"stock": sublayers(walk, hidden, device)}
    gpuscan.install(blocks)
    layers["own"] = sublayers(walk, hidden, device)
    return {"mixers": found, "pieces_ms": parts, "layers_ms": layers}


def sublayers(walk: Walk, hidden: torch.Tensor, device: str) -> dict[str, float]:
    """Milliseconds of an attention and an FFN layer, norm included, and of a norm."""
    return {
        "attention": milliseconds(functools.partial(walk.layer, 1, hidden), device),
        "ffn": milliseconds(functools.partial(walk.layer, 2, hidden), device),
        "norm": milliseconds(functools.partial(walk.sublayer(0).norm, hidden), device),
    }


@torch.no_grad()
def main() -> None:
    """Measure and print; --out takes all of it, --results the speed on the first batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="56b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batches", default="2x2048,4x2048,1x4096", help="sequences x tokens")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    pattern = SHAPES[args.shape]["hybrid_override_pattern"]
    model = random_model(
        args.shape, args.device, dtype, hybrid_override_pattern="M*-", vocab_size=512
    )
    fastscan.uninstall(model.module)  # on a CPU
    walk = Walk(model)
    report: dict[str, Any] = {}
    for batch in args.batches.split(","):
        rows, tokens = map(int, batch.split("x"))
        print(f"{batch}: Mamba mixers", flush=True)
        found = report[batch] = measure(walk, rows, tokens, args.device)
        speed = {
            name: rows * tokens * 1000 / forward_ms(pattern, layers_of(name, found), row["ms"])
            for name, row in found["mixers"].items()
        }
        found["forward_tokens_per_second"] = speed
        show("pieces_ms", found["pieces_ms"])
        for whose, row in found["layers_ms"].items():
            show(f"{whose} layers_ms", row)
        show("tokens/s", speed)
        if args.out:
            args.out.write_text(json.dumps(report, indent=2) + "\n")
    if args.results:
        speed = next(iter(report.values()))["forward_tokens_per_second"]
        prefix = f"forward_{args.shape}_tokens_per_second"
        figures = {
            f"{prefix}_{name}": (round(speed[key]), "tokens/s")
            for name, key in RECORDED.items()
            if key in speed
        }
        record("importance", figures, folder=args.results)


def layers_of(name: str, found: dict[str, Any]) -> dict[str, float]:
    """Times of the other layers that belong to an implementation of the mixer."""
    times: dict[str, float] = found["layers_ms"]["own" if name.startswith("own") else "stock"]
    return times


def forward_ms(pattern: str, layers: dict[str, float], mixer: float) -> float:
    """Milliseconds of all layers of a pattern; sublayers of attention and FFN include the norm."""
    mamba = mixer + layers["norm"]
    times = {"M": mamba, "*": layers["attention"], "-": layers["ffn"]}
    return sum(times[letter] for letter in pattern)


if __name__ == "__main__":
    main()
