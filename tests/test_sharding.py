"""Two processes that share student and teacher train like one: gloo on the CPU."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from minipuzzle.distill import sharding
from minipuzzle.distill.config import Settings
from minipuzzle.distill.trainer import train
from minipuzzle.errors import UserError

from .distill_models import blocks, tiny

SETTINGS = Settings(steps=6, batch=4, learning_rate=3e-3, warmup=0.2, clip=0.05, seed=5)


def run(settings: Settings, tied: bool, prepare: Callable[[nn.Module], Any]) -> dict[str, Any]:
    """A short training: its history and the norm of every parameter at its end."""
    student, teacher = tiny(2, tied=tied), tiny(1)
    prepare(student)
    prepare(teacher)
    history = train(student, teacher, blocks(), settings, held_out=blocks(3, seed=9))
    kinds = {type(p) for p in student.parameters()}
    assert len(kinds) == 1  # nothing stays whole after the last evaluation
    whole = {
        name: p.full_tensor() if isinstance(p, DTensor) else p
        for name, p in student.named_parameters()
    }
    return {
        "steps": [asdict(step) for step in history.steps],
        "held_out": [asdict(entry) for entry in history.evaluations],
        "parameters": {name: p.double().norm().item() for name, p in whole.items()},
    }


def shard_and_check(module: nn.Module) -> None:
    """Shard a model and hold each of its parameters against the sizes of a share."""
    sizes = {name: p.numel() for name, p in module.named_parameters()}
    sharding.shard(module)
    found = dict(module.named_parameters())
    assert found.keys() == sizes.keys()
    for name, parameter in found.items():
        assert isinstance(parameter, DTensor), name
        assert parameter.placements == (Shard(0),), name
        assert parameter.to_local().numel() < sizes[name], name
    local = sum(p.to_local().numel() for p in module.parameters())  # type: ignore[attr-defined]
    assert abs(local / sum(sizes.values()) - 1 / 2) < 0.05


def work(rank: int, port: int, settings: Settings, tied: bool, out: Path) -> None:
    """One of two processes; each writes what it saw."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    try:
        result = run(settings, tied, shard_and_check)
        with pytest.raises(UserError, match="multiple"):
            student = tiny(2)
            sharding.shard(student)
            train(student, tiny(1), blocks(), replace(settings, batch=3))
        (out / f"{rank}.json").write_text(json.dumps(result))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("micro", "tied"), [(0, False), (1, True)])
def test_two_processes_train_like_one(tmp_path: Path, micro: int, tied: bool) -> None:
    """Losses, gradient norms (clipped), held-out figures and parameters, at equal global batch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import sys; from tests.test_sharding import main; main(*sys.argv[1:])"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, (rank, port, micro, int(tied), tmp_path))],
            env=environment,
            cwd=Path(__file__).parent.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], told
    two = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    one = run(replace(SETTINGS, micro=micro), tied, lambda module: None)
    assert two[0] == two[1]
    assert one["steps"][0]["gradient_norm"] > SETTINGS.clip  # so that clipping is seen
    assert one["steps"][-1]["loss"] < one["steps"][0]["loss"]
    _close(two[0], one)


def _close(found: Any, expected: Any) -> None:
    """Every number of two nested records equal to rounding."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            _close(*pair)
    else:
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_alone_nothing_is_shared() -> None:
    student = tiny(2)
    rows = torch.arange(4)
    assert sharding.own_rows(student, rows) is rows
    assert sharding.summed(student, 0.5) == 0.5
    weight = next(student.parameters())
    assert sharding.gathered(weight) is weight


def main(rank: str, port: str, micro: str, tied: str, out: str) -> None:
    """Entry of a spawned process."""
    work(int(rank), int(port), replace(SETTINGS, micro=int(micro)), tied == "1", Path(out))
