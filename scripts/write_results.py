"""Put the figures of a finished demo run where the documents show them.

Copies summary.json to docs/results/demo.json and renders it as the table in README.md and
docs/results/README.md, between the markers. Nobody types these numbers.

    python scripts/write_results.py runs/demo
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from minipuzzle.results import MODELS
from minipuzzle.units import format_bytes, format_count, format_seconds

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- demo table: scripts/write_results.py -->", "<!-- end of demo table -->"


def table(summary: Mapping[str, Any]) -> str:
    """The comparison of a summary.json as a Markdown table, with what it took."""
    models = [summary[name] for name in MODELS]

    def row(label: str, cell: Callable[[Any], str]) -> str:
        return f"| {label} | " + " | ".join(map(cell, models)) + " |"

    tasks = list(models[0]["tasks"])
    lines = [
        "| | " + " | ".join(MODELS) + " |",
        "|---" * (len(MODELS) + 1) + "|",
        row("parameters", lambda m: format_count(m["parameters"])),
        row("memory at the deployment", lambda m: format_bytes(m["memory_bytes"])),
        row("bits per byte", lambda m: f"{m['bits_per_byte']:.4f}"),
        *(row(f"`{task}`, %", task_cell(task)) for task in tasks),
        row("mean of tasks, %", lambda m: f"{100 * mean_accuracy(m):.1f}"),
        row("decode, tokens/s", lambda m: f"{m['decode_tokens_per_second']:.1f}"),
    ]
    seconds = summary["seconds"]
    parts = ", ".join(f"{stage} {format_seconds(spent)}" for stage, spent in seconds.items())
    total = format_seconds(sum(seconds.values()))
    return "\n".join([*lines, "", f"All stages on two CPU cores: {total} ({parts})."])


def task_cell(task: str) -> Callable[[Any], str]:
    """What a model's cell in the row of a task shows."""
    return lambda model: accuracy(model["tasks"][task])


def accuracy(task: Mapping[str, float]) -> str:
    """Accuracy and standard error in percent."""
    return f"{100 * task['acc']:.1f} ± {100 * task['acc_stderr']:.1f}"


def mean_accuracy(model: Mapping[str, Any]) -> float:
    """Unweighted mean over the tasks."""
    return fmean(task["acc"] for task in model["tasks"].values())


def insert(text: str, new: str) -> str:
    """The text with what stands between the markers replaced."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{new}\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    options = parser.parse_args(arguments)
    summary = json.loads((options.run / "summary.json").read_text())
    (ROOT / "docs" / "results" / "demo.json").write_text(json.dumps(summary, indent=2) + "\n")
    readme = ROOT / "README.md"
    readme.write_text(insert(readme.read_text(), table(summary)))


if __name__ == "__main__":
    main()
