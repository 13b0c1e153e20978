"""All layer and width scores of a large model on one GPU: seconds and peak memory.

    python scripts/bench_56b.py                          # 56B-shaped, resident, random weights
    python scripts/make_checkpoint.py --shape 8b runs/8b
    python scripts/bench_56b.py --stream runs/8b         # the same scores, streamed from disk

The resident run counts from before the first weight is made to the last score. The streamed run
is compared with the slower of two limits: reading its weights from disk with nothing in the page
cache, and scoring the same tokens with the same model resident. Memory is what the allocator holds
(reserved, which is at least what tensors take); `--limit-gib` makes more of it an error.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from figures import RESULTS, record
from random_model import SHAPES, random_model

from minipuzzle.checkpoint import Checkpoint
from minipuzzle.families import parameter_count
from minipuzzle.metrics import LAYER_METRICS, UnitMetric
from minipuzzle.model import Model, load
from minipuzzle.prune.score import score
from minipuzzle.scores import Scores
from minipuzzle.streaming import READ_BYTES, READERS, stream

# those of the literature; `surgeon` needs two tokens for every channel and a place for moments
UNITS: tuple[UnitMetric, ...] = ("activation", "flap", "energy")
GIB = 2**30


@contextmanager
def memory_limit(device: str, gib: float | None) -> Iterator[None]:
    """Let the allocator hold at most so much on the GPU, and count its peak from here."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (gib or 1e9) * GIB / total))
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)


def peaks_gib(device: str) -> tuple[float, float]:
    """Most that the allocator held and that tensors took since the limit was set, GiB."""
    if device != "cuda":
        return 0.0, 0.0
    return torch.cuda.max_memory_reserved() / GIB, torch.cuda.max_memory_allocated() / GIB


def timed_score(
    model: Model, ids: torch.Tensor, units: tuple[UnitMetric, ...]
) -> tuple[Scores, float]:
    """All layer metrics and these unit metrics on ids (B, T), and the seconds they took."""
    start = time.perf_counter()
    scores = score(model, ids, {}, metrics=LAYER_METRICS, unit_metrics=units)
    return scores, time.perf_counter() - start


def random_ids(vocabulary: int, args: argparse.Namespace) -> torch.Tensor:
    """Random text: (sequences, tokens each)."""
    generator = torch.Generator().manual_seed(0)
    shape = (args.tokens // args.block, args.block)
    return torch.randint(0, vocabulary, shape, generator=generator)


def describe(scores: Scores) -> str:
    """How much was scored; an assertion that all of it is there."""
    layers = len(scores.kinds)
    assert set(scores.layers) == set(LAYER_METRICS)
    assert all(len(v) == layers and bool(v.isfinite().all()) for v in scores.layers.values())
    axes = sorted({axis for _, axis, _ in scores.units})
    number = sum(len(v) for v in scores.units.values())
    return f"{len(scores.layers)} scores of {layers} layers, {number} of units ({', '.join(axes)})"


def resident(args: argparse.Namespace) -> dict[str, tuple[float, str]]:
    """Build a model of random weights on the device and score it."""
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    with memory_limit(args.device, args.limit_gib):
        start = time.perf_counter()
        model = random_model(args.shape, args.device, dtype)
        if args.device == "cuda":
            torch.cuda.synchronize()
        built = time.perf_counter() - start
        parameters = parameter_count(model.architecture, model.family)
        print(f"{parameters:,} parameters built in {built:.1f} s", flush=True)
        ids = random_ids(model.architecture.vocabulary, args)
        scores, seconds = timed_score(model, ids, args.unit_metrics)
        reserved, allocated = peaks_gib(args.device)
    print(f"{describe(scores)} on {ids.numel()} tokens in {seconds:.1f} s")
    name = f"bench_{args.shape}"
    return {
        f"{name}_seconds": (round(built + seconds, 1), "s"),
        f"{name}_build_seconds": (round(built, 1), "s"),
        f"{name}_peak_gib": (round(reserved, 2), "GiB held by the allocator"),
        f"{name}_peak_tensors_gib": (round(allocated, 2), "GiB"),
    }


def streamed(args: argparse.Namespace) -> dict[str, tuple[float, str]]:
    """Score a checkpoint streamed, resident, and read it alone."""
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    model = load(args.stream, dtype=dtype, device=args.device)
    ids = random_ids(model.architecture.vocabulary, args)
    timed_score(model, ids[:1], args.unit_metrics)  # kernels are compiled and tuned once
    expected, arithmetic = timed_score(model, ids, args.unit_metrics)
    print(f"resident: {describe(expected)} in {arithmetic:.1f} s", flush=True)
    embedding = next(s for s in model.family.tensors(model.architecture) if s.role == "embedding")
    del model
    gc.collect()

    checkpoint = Checkpoint.open(args.stream)
    rate = disk_rate(checkpoint)
    weights = checkpoint.total_bytes - embedding.size * checkpoint.dtype(embedding.name).itemsize
    disk = weights / rate
    print(f"disk: {rate / 1e9:.2f} GB/s, {disk:.1f} s for the weights", flush=True)

    drop_pages(checkpoint)
    with memory_limit(args.device, args.limit_gib):
        start = time.perf_counter()
        model = stream(args.stream, dtype=dtype, device=args.device)
        got, _ = timed_score(model, ids, args.unit_metrics)
        seconds = time.perf_counter() - start
        reserved, allocated = peaks_gib(args.device)
    print(f"streamed: {seconds:.1f} s, furthest from resident: {furthest(expected, got):.2e}")
    return {
        "stream_8b_gpu_gib": (round(reserved, 2), "GiB held by the allocator"),
        "stream_8b_gpu_tensors_gib": (round(allocated, 2), "GiB"),
        "stream_8b_seconds": (round(seconds, 1), "s"),
        "stream_8b_disk_seconds": (round(disk, 1), "s"),
        "stream_8b_arithmetic_seconds": (round(arithmetic, 1), "s"),
        "stream_8b_share_of_limit": (round(max(disk, arithmetic) / seconds, 3), "1"),
    }


def furthest(expected: Scores, got: Scores) -> float:
    """Largest relative difference of a layer's score between two runs."""
    differences = [
        ((got.layers[m] - expected.layers[m]).abs() / expected.layers[m].abs().clamp_min(1e-30))
        for m in expected.layers
    ]
    return float(torch.stack(differences).max())


def shards(checkpoint: Checkpoint) -> list[Path]:
    """The files that hold the tensors."""
    return sorted({checkpoint.entry(name).shard for name in checkpoint.names})


def drop_pages(checkpoint: Checkpoint) -> None:
    """Take the checkpoint out of the page cache."""
    for shard in shards(checkpoint):
        descriptor = os.open(shard, os.O_RDONLY)
        os.fsync(descriptor)  # pages not yet written cannot be dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def disk_rate(checkpoint: Checkpoint) -> float:
    """Bytes per second of reading all shards from disk, as the streamed walk reads: by threads."""
    drop_pages(checkpoint)

    def read(part: tuple[Path, int]) -> int:
        shard, start = part
        descriptor = os.open(shard, os.O_RDONLY)
        try:
            return len(os.pread(descriptor, READ_BYTES, start))
        finally:
            os.close(descriptor)

    parts = [(s, i) for s in shards(checkpoint) for i in range(0, s.stat().st_size, READ_BYTES)]
    start = time.perf_counter()
    with ThreadPoolExecutor(READERS) as pool:
        total = sum(pool.map(read, parts))
    return total / (time.perf_counter() - start)


def main() -> None:
    """Run one of the two and record its figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="56b")
    parser.add_argument("--stream", type=Path, help="a checkpoint's folder: score it from there")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--block", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--limit-gib", type=float, help="of GPU memory")
    parser.add_argument(
        "--unit-metrics", nargs="*", choices=get_args(UnitMetric), default=list(UNITS)
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.unit_metrics = tuple(args.unit_metrics)
    figures = streamed(args) if args.stream else resident(args)
    for name, (value, unit) in figures.items():
        print(f"{name}: {value} {unit}")
    record("importance", dict[str, Any](figures), folder=args.results)


if __name__ == "__main__":
    main()
