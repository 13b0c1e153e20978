"""Measured figures in docs/results: each with the command, device, versions and date it came from.

    record("importance", {"prune_8b_peak_gib": (1.2, "GiB")})

Entries of other names stay as they are, so that each script writes its own. What a script wrote to
another folder (its option --results) on another machine is taken over whole, origin included, by

    python scripts/figures.py merge FOLDER [--only PREFIX]
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minipuzzle.files import atomic_write_json
from minipuzzle.runfolder import package_versions

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
FIELDS = {"value", "unit", "command", "device", "versions", "date"}
PACKAGES = ("torch", "transformers", "triton", "mamba-ssm")


def record(
    name: str, figures: Mapping[str, tuple[float | int | None, str]], *, folder: Path = RESULTS
) -> Path:
    """Write figures (name -> value and unit) into `<folder>/<name>.json` and return its path."""
    path = folder / f"{name}.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    origin = {
        "command": command(),
        "device": device(),
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    for key, (value, unit) in figures.items():
        known[key] = {"value": value, "unit": unit, **origin}
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_json(path, dict(sorted(known.items())))
    return path


def merge(source: Path, *, only: str = "", folder: Path = RESULTS) -> Path:
    """Take the entries of a results file over into the file of the same name in `folder`.

    Args:
        source: a file that `record` wrote.
        only: beginning of the names that are taken.
        folder: where the results lie.

    Raises:
        ValueError: for a file with an entry that `record` cannot have written.
    """
    path = folder / source.name
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    found: dict[str, Any] = json.loads(source.read_text())
    found = {name: entry for name, entry in found.items() if name.startswith(only)}
    for name, entry in found.items():
        if set(entry) != FIELDS:
            raise ValueError(f"{source}: {name} has the fields {sorted(entry)}")
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_json(path, dict(sorted((known | found).items())))
    return path


def command() -> str:
    """The command line of this process, with its script relative to the repository.

    Without --results: the file's place says where it was written to, or merged into.
    """
    script = Path(sys.argv[0])
    root = RESULTS.parent.parent
    name = script.resolve().relative_to(root) if script.resolve().is_relative_to(root) else script
    arguments = sys.argv[1:]
    if "--results" in arguments:
        at = arguments.index("--results")
        del arguments[at : at + 2]
    return shlex.join(["python", str(name), *arguments])


def device() -> str:
    """The GPU, or the kind and number of processor cores that torch uses."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU cores ({platform.machine()})"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide speed and rounding."""
    return package_versions(PACKAGES)


def main() -> None:
    """`merge FOLDER`: take over every results file in FOLDER."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("action", choices=["merge"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", metavar="PREFIX", help="of the figures' names")
    options = parser.parse_args()
    for source in sorted(options.folder.glob("*.json")):
        print(merge(source, only=options.only))


if __name__ == "__main__":
    main()
