"""Kill a run with kill -9 in every stage, let it go on each time, compare with a straight run.

python scripts/check_resume.py [RECIPE] [--straight RUN] [--broken RUN] [--seed N]

RECIPE is what `minipuzzle run` takes (default: demo). The straight run is made if it is not there;
the broken one is made anew. Exit 1 and the differences unless every tensor file of pruned, repaired
and student, and every number of summary.json but seconds and speeds, is the same.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from minipuzzle.files import fingerprint_folder
from minipuzzle.pipeline import MODELS, STAGES, SUMMARY_FILE
from minipuzzle.runfolder import RunFolder

POLL_SECONDS = 0.005
LONGEST_WAIT_SECONDS = 10.0  # inside a stage, before it is killed


def main() -> int:
    """Run, kill, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", nargs="?", default="demo")
    parser.add_argument("--straight", type=Path, default=Path("runs/straight"))
    parser.add_argument("--broken", type=Path, default=Path("runs/broken"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    finish(options.recipe, options.straight)
    if options.broken.exists():
        shutil.rmtree(options.broken)
    waits = random.Random(options.seed)
    for stage in STAGES:
        kill_in(options.recipe, options.broken, stage.artefact, waits)
    finish(options.recipe, options.broken)
    found = differences(options.straight, options.broken)
    print("\n".join(found) or "The same result.")
    return 1 if found else 0


def start(recipe: str, run: Path) -> subprocess.Popen[bytes]:
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "minipuzzle", "run", recipe, "--run", str(run)]
    return subprocess.Popen(command)


def finish(recipe: str, run: Path) -> None:
    """Run to the end."""
    process = start(recipe, run)
    if process.wait() != 0:
        sys.exit(f"the run in {run} failed")


def kill_in(recipe: str, run: Path, artefact: str, waits: random.Random) -> None:
    """Start, wait until ``artefact`` is being made and a while longer, kill."""
    process, partial = start(recipe, run), run / f"{artefact}.partial"
    while process.poll() is None and not partial.exists():
        time.sleep(POLL_SECONDS)
    until = time.monotonic() + waits.uniform(0, LONGEST_WAIT_SECONDS) ** 2 / LONGEST_WAIT_SECONDS
    while process.poll() is None and partial.exists() and time.monotonic() < until:
        time.sleep(POLL_SECONDS)
    process.kill()
    inside = process.wait() == -signal.SIGKILL and partial.exists()
    print(f"--- killed {'inside' if inside else 'after'} {artefact}", flush=True)


def differences(one: Path, two: Path) -> list[str]:
    """What differs and should not."""
    found = []
    for artefact in ("pruned", "repaired", "student"):
        prints = [fingerprint_folder(run / artefact, without=["stage.json"]) for run in (one, two)]
        if prints[0] != prints[1]:
            found.append(f"{artefact}: the files differ")
    summaries = [lasting(json.loads((run / SUMMARY_FILE).read_text())) for run in (one, two)]
    for model in MODELS:
        if summaries[0][model] != summaries[1][model]:
            found.append(f"summary.json: {summaries[0][model]} is not {summaries[1][model]}")
    unfinished = [stage.name for stage in STAGES if RunFolder(two).stage(stage.artefact) is None]
    return found + [f"{name}: not whole" for name in unfinished]


def lasting(summary: dict[str, Any]) -> dict[str, Any]:
    """The models of a summary without what comes from a clock or a place."""
    clocked = {"path", "decode_tokens_per_second"}
    return {
        model: {key: value for key, value in summary[model].items() if key not in clocked}
        for model in MODELS
    }


if __name__ == "__main__":
    sys.exit(main())
