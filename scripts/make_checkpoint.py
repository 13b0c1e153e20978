"""Write a checkpoint of random weights in a published shape, sharded like a real one.

    python scripts/make_checkpoint.py --shape 8b runs/random-8b

16 GB (8b) or 113 GB (56b) in bf16, at the disk's speed and with little memory: every tensor is cut
from one block of random numbers at an offset of its own. There is no tokenizer.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from random_model import SHAPES, shape_config

from minipuzzle import families
from minipuzzle.families import TensorSpec
from minipuzzle.shards import TensorPlan
from minipuzzle.units import format_bytes, format_seconds
from minipuzzle.writer import MAX_SHARD_BYTES, CheckpointWriter

NUMBERS = 2**23 + 9  # not a multiple of any row: rows of a matrix do not repeat
STRIDE = 1_000_003  # prime: offsets of tensors are distinct
BLOCK = 2**20
THREADS = 2


class Weights:
    """Random bf16 tensors without making a random number for each of their elements."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._normal = torch.randn(NUMBERS, generator=generator)
        self._scaled: dict[tuple[float, float], torch.Tensor] = {}

    def blocks(self, spec: TensorSpec, number: int) -> Iterator[torch.Tensor]:
        """Flat pieces of the tensor that is the `number`-th of its model."""
        numbers = self._of(*spread(spec))
        place, left = number * STRIDE % NUMBERS, spec.size
        while left:
            piece = numbers[place : place + min(BLOCK, left)]
            yield piece
            left -= len(piece)
            place = (place + len(piece)) % NUMBERS

    def _of(self, scale: float, shift: float) -> torch.Tensor:
        if (scale, shift) not in self._scaled:
            self._scaled[scale, shift] = (self._normal * scale + shift).to(torch.bfloat16)
        return self._scaled[scale, shift]


def spread(spec: TensorSpec) -> tuple[float, float]:
    """Deviation and mean with which a forward pass neither vanishes nor overflows.

    Matrices keep the variance of what they multiply (0.016 at width 4096), norms are near one;
    the rest (A_log, D, dt_bias, convolutions, biases) is small.
    """
    if spec.role in ("norm", "inner_norm"):
        return 0.1, 1.0
    if spec.role == "embedding":
        return 1.0, 0.0
    return (spec.shape[1] ** -0.5 if len(spec.shape) == 2 else 0.3), 0.0


def make(shape: str, folder: Path, *, seed: int = 0, max_shard_bytes: int = MAX_SHARD_BYTES) -> int:
    """Write the checkpoint; its size in bytes."""
    config = shape_config(shape) | {"dtype": "bfloat16"}
    family, architecture = families.read(config)
    specs = {spec.name: (i, spec) for i, spec in enumerate(family.tensors(architecture))}
    plans = [TensorPlan(name, spec.shape, torch.bfloat16) for name, (_, spec) in specs.items()]
    weights = Weights(seed)

    def fill(name: str) -> None:
        number, spec = specs[name]
        writer.write(name, weights.blocks(spec, number))

    writer = CheckpointWriter(folder, config, plans, max_shard_bytes=max_shard_bytes)
    with writer, ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(fill, writer.order):
            pass  # an error of a thread is raised here
    return sum(plan.nbytes for plan in plans)


def main() -> None:
    """Write the checkpoint that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    started = time.perf_counter()
    size = make(options.shape, options.out, seed=options.seed)
    took = time.perf_counter() - started
    print(f"{options.out}: {format_bytes(size)} in {format_seconds(took)}")


if __name__ == "__main__":
    main()
