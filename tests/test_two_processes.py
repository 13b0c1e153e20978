"""Processes that share the calibration text give the scores of one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from minipuzzle.pipeline import run_stage
from minipuzzle.processes import Processes
from minipuzzle.recipe import Recipe
from minipuzzle.runfolder import RunFolder
from minipuzzle.scores import Scores

from .tiny_text import TEXT, write_model

RECIPE = """
model: teacher
data: {calibration: {source: text.txt, block: 32}}
score:
  blocks: 5
  unit_blocks: 9
  metrics: [hidden_mse, logit_mse, kl, cosine]
  iterative: 2
  iterative_metric: kl
"""
WORKER = """
    import sys
    from minipuzzle.cli import main

    command = ["score", sys.argv[1], "--run", sys.argv[2]]
    sys.exit(main(command) or main(command))
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    write_model(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path / "r.yaml"


def launch(size: int, recipe: Path, run: Path) -> list[subprocess.Popen[str]]:
    """What `torchrun` and `accelerate launch` do: their environment, on one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(size):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        join = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        names = {name: str(value) for name, value in {**place, **join}.items()}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **names}
        command = [sys.executable, "-c", textwrap.dedent(WORKER), str(recipe), str(run)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, env=environment, **pipes))  # type: ignore[call-overload]
    return started


def test_two_processes_give_the_scores_of_one(recipe: Path, tmp_path: Path) -> None:
    """Through the command, twice over: the second time there is nothing to do, and nobody waits."""
    workers = launch(2, recipe, tmp_path / "two")
    told = [worker.communicate(timeout=240)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], told
    assert "done before" in told[0] and "done" not in told[1]
    run_stage("score", Recipe.load(recipe), RunFolder(tmp_path / "one"))
    two, one = (Scores.load(tmp_path / name / "scores") for name in ("two", "one"))
    assert two.provenance == one.provenance
    assert two.removal_order == one.removal_order and len(one.removal_order) == 2
    assert two.units.keys() == one.units.keys() and two.hidden.keys() == one.hidden.keys()
    assert {axis for _, axis, _ in one.units} >= {"width", "heads", "kv_heads"}
    for metric, values in one.layers.items():
        torch.testing.assert_close(two.layers[metric], values, rtol=1e-5, atol=1e-9)
    for key, values in one.units.items():
        torch.testing.assert_close(two.units[key], values, rtol=1e-5, atol=1e-9)
    for metric, values in one.hidden.items():
        torch.testing.assert_close(two.hidden[metric], values, rtol=1e-5, atol=1e-9)


def test_shares_are_disjoint_and_whole() -> None:
    ids = torch.arange(14).reshape(7, 2)
    shares = [Processes(rank, 3).share(ids) for rank in range(3)]
    assert [len(share) for share in shares] == [3, 2, 2]
    assert sorted(torch.cat(shares).flatten().tolist()) == list(range(14))
    assert len(Processes(2, 3).share(ids[:2])) == 0
