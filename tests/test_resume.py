"""The whole pipeline, killed again and again, ends as if nothing had happened."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from minipuzzle.pipeline import STAGES
from minipuzzle.runfolder import RunFolder

from .tiny_text import TEXT, write_model

RECIPE = """
model: teacher
budget: 90%
data:
  calibration: {source: calibration.txt, block: 32}
  distillation: {source: distillation.txt, block: 32}
  search: {source: search.txt, block: 32}
  report: {source: report.txt, block: 32}
score: {blocks: 4}
search: {trials: 6, blocks: 4, tournament: {finalists: 2, blocks: 8, rungs: [{steps: 3}]}}
repair: {blocks: 8}
distill: {steps: 12, batch: 2, checkpoint_every: 3}
eval: {blocks: 4, tasks: [], speed: {prompt: 8, tokens: 8, repeats: 1}}
"""

# Runs the recipe and kills itself, as kill -9 does, before the n-th change of a file in the run
# folder that Python knows of (0: never); the journal's, which come from a clock, do not count.
WORKER = """
    import os, signal, sys
    from minipuzzle.cli import main

    recipe, run, left = sys.argv[1], sys.argv[2], int(sys.argv[3])
    CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}

    def changes(event, arguments):
        if event == "open":
            path, _, flags = arguments
            return flags & (os.O_WRONLY | os.O_RDWR) and str(path)
        return event in CHANGES and str(arguments[0])

    def hook(event, arguments):
        global left
        path = changes(event, arguments)
        if not path or run not in path or ".journal" in path:
            return
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    code = main(["run", recipe, "--run", run])
    print("changes", -left, file=sys.stderr)
    sys.exit(code)
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    write_model(tmp_path / "teacher")
    for name in ("calibration", "distillation", "search", "report"):
        (tmp_path / f"{name}.txt").write_text(f"# {name}\n{TEXT}")
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    return path


def start(recipe: Path, run: Path, die_at: int) -> int:
    code = textwrap.dedent(WORKER)
    command = [sys.executable, "-c", code, str(recipe), str(run), str(die_at)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, -signal.SIGKILL), done.stdout + done.stderr
    return done.returncode


def lasting(summary: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a summary that do not come from a clock."""
    for name in ("teacher", "pruned", "repaired", "student"):
        del summary[name]["decode_tokens_per_second"]
    del summary["seconds"]
    return summary


@pytest.mark.slow
def test_killed_many_times_it_ends_with_the_same_result(recipe: Path, tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert start(recipe, straight, 0) == 0

    deaths = 0
    while start(recipe, broken, 7 * (deaths + 1)) == -signal.SIGKILL:
        deaths += 1
    assert deaths >= 5

    for artefact in ("scores", "pruned", "repaired", "student"):
        assert fingerprint(straight, artefact) == fingerprint(broken, artefact), artefact
    for file in ("best.json", "trials.json", "finalists.json"):  # study.db holds the time of day
        path = Path("search", file)
        assert (straight / path).read_text() == (broken / path).read_text(), file
    assert read(straight) == read(broken)
    there = {path.name for path in broken.iterdir()}
    assert there == {".lock", "recipe.yaml", "summary.json", *(s.artefact for s in STAGES)}


def fingerprint(run: Path, artefact: str) -> str:
    return RunFolder(run).fingerprint(artefact)


def read(run: Path) -> dict[str, Any]:
    return lasting(json.loads((run / "summary.json").read_text()))
