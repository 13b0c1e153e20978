"""Where the time of a distillation step goes on this machine, as JSON.

    python scripts/bench_distill.py result.json

A teacher and a student of the demo's shape with random weights (speed does not depend on them):
one step is timed part by part, then whole steps per second for several micro-batch sizes, with the
teacher online and with its states in memory, and the share of matrix products is profiled.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minipuzzle import families
from minipuzzle.distill.config import Settings
from minipuzzle.distill.loss import forward_kl
from minipuzzle.distill.teacher import OnlineTeacher, TeacherStates, final_hidden, head_weight
from minipuzzle.distill.trainer import batch_rows, clip_gradients, make_optimizer, train_step
from minipuzzle.model import prepare, transformers_config

SHAPE: dict[str, Any] = {
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "M-M-M-M*-M-M-M-M*-M-M-M-M*-",
    "num_hidden_layers": 27,
    "hidden_size": 192,
    "vocab_size": 4096,
    "intermediate_size": 672,
    "mamba_num_heads": 16,
    "mamba_head_dim": 32,
    "n_groups": 2,
    "conv_kernel": 4,
    "use_conv_bias": True,
    "ssm_state_size": 64,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "time_step_min": 1e-6,
    "rescale_prenorm_residual": False,
}
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


def build(**changes: Any) -> nn.Module:
    """A model of the demo's shape with random fp32 weights."""
    from transformers import AutoModelForCausalLM

    config = SHAPE | changes
    family, architecture = families.read(config)
    stock = transformers_config(family, config, architecture)
    module: nn.Module = AutoModelForCausalLM.from_config(stock).eval().requires_grad_(False)
    prepare(module, "cpu")
    return module


class Clock:
    """Seconds per named part, over several repetitions."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time the block as one repetition of `name`."""
        begun = time.perf_counter()
        yield
        self.seconds.setdefault(name, []).append(time.perf_counter() - begun)

    def medians(self) -> dict[str, float]:
        """Median seconds per part."""
        return {name: statistics.median(values) for name, values in self.seconds.items()}


def split_step(
    student: nn.Module, teacher: nn.Module, blocks: Tensor, settings: Settings, repeats: int
) -> dict[str, float]:
    """Median seconds of each part of a step with the whole batch at once."""
    clock, online = Clock(), OnlineTeacher(teacher, blocks)
    optimizer = make_optimizer(student.requires_grad_(True), settings)
    for step in range(repeats + 1):
        if step == 1:
            clock = Clock()  # the first step warms up
        rows = batch_rows(len(blocks), settings.batch, 0, step)
        with clock.part("teacher_forward"):
            target = online.hidden(rows).flatten(0, 1)
        with clock.part("student_forward"):
            hidden = final_hidden(student, blocks[rows]).flatten(0, 1)
        with clock.part("loss"):
            loss = forward_kl(hidden, head_weight(student), target, online.head)
        with clock.part("student_backward"):
            torch.autograd.backward(loss)
        with clock.part("clip"):
            clip_gradients(optimizer, settings.clip)
        with clock.part("optimizer"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return clock.medians()


def tokens_per_second(
    student: nn.Module, teacher: Any, blocks: Tensor, settings: Settings, repeats: int
) -> float:
    """Of whole training steps, median."""
    optimizer = make_optimizer(student.requires_grad_(True), settings)
    times = []
    for step in range(repeats + 1):
        begun = time.perf_counter()
        train_step(student, teacher, blocks, optimizer, settings, step)
        times.append(time.perf_counter() - begun)
    return settings.batch * blocks.shape[1] / statistics.median(times[1:])


def product_share(step: Callable[[], object]) -> float:
    """Share of the profiled time that is spent in matrix products."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    events = profile.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    return float(sum(e.self_cpu_time_total for e in events if e.key in PRODUCTS) / total)


def measure(batch: int, block: int, width: int, repeats: int) -> dict[str, Any]:
    """Everything, for one batch and student FFN width."""
    torch.manual_seed(0)
    teacher, student = build(), build(intermediate_size=width)
    blocks = torch.randint(0, SHAPE["vocab_size"], (2 * batch, block))
    settings = Settings(steps=1000, batch=batch, learning_rate=1e-5)
    states, online = TeacherStates(teacher, blocks), OnlineTeacher(teacher, blocks)
    optimizer = make_optimizer(student.requires_grad_(True), settings)
    parts = split_step(student, teacher, blocks, settings, repeats)
    rates = {
        str(micro or batch): tokens_per_second(
            student, online, blocks, dataclasses.replace(settings, micro=micro), repeats
        )
        for micro in (0, 4, 2, 1)
        if micro < batch
    }
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "tokens_per_step": batch * block,
        "student_width": width,
        "seconds": parts,
        "tokens_per_second_by_micro_batch": rates,
        "tokens_per_second_states_in_memory": tokens_per_second(
            student, states, blocks, settings, repeats
        ),
        "matrix_product_share": product_share(
            lambda: train_step(student, online, blocks, optimizer, settings, 0)
        ),
    }


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("result", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--block", type=int, default=512)
    parser.add_argument("--width", type=int, default=368)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    result = measure(given.batch, given.block, given.width, given.repeats)
    text = json.dumps(result, indent=2)
    given.result.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
