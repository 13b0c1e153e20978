"""The end of a run on the terminal: what was made, how good it is, how to load it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from minipuzzle.progress import table
from minipuzzle.units import format_bytes, format_count, format_seconds

MODELS = ("teacher", "pruned", "repaired", "student")


def render(summary: Mapping[str, Any], run: Path) -> str:
    """The table of a summary.json's models, the paths to go on with, and the lines to load it."""
    export, report = run / "export", run / "report" / "report.html"
    return "\n".join(
        [
            "",
            results_table(summary),
            "",
            f"Budget {format_bytes(summary['budget_bytes'])}; "
            f"all stages took {format_seconds(sum(summary['seconds'].values()))}.",
            f"Report:     {report}",
            f"Checkpoint: {export}",
            "",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            f'model = AutoModelForCausalLM.from_pretrained("{export}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{export}")',
        ]
    )


def results_table(summary: Mapping[str, Any]) -> str:
    """One column per model, one row per quantity; tasks with their standard errors in percent."""
    names = [name for name in MODELS if name in summary]
    models = [summary[name] for name in names]

    def row(label: str, cell: Callable[[Any], str]) -> list[str]:
        return [label, *map(cell, models)]

    rows = [
        row("parameters", lambda model: format_count(model["parameters"])),
        row("memory", lambda model: format_bytes(model["memory_bytes"])),
        row("bits per byte", lambda model: f"{model['bits_per_byte']:.4f}"),
        *(
            [f"{task} %", *(_accuracy(model["tasks"][task]) for model in models)]
            for task in models[0]["tasks"]
        ),
        row("decode tokens/s", lambda model: f"{model['decode_tokens_per_second']:.1f}"),
    ]
    if len(models[0]["tasks"]) > 1:
        rows.insert(-1, row("mean of tasks %", lambda model: f"{_mean(model['tasks']):.1f}"))
    return table(["", *names], rows)


def _accuracy(task: Mapping[str, float]) -> str:
    return f"{100 * task['acc']:.1f} ± {100 * task['acc_stderr']:.1f}"


def _mean(tasks: Mapping[str, Mapping[str, float]]) -> float:
    """Unweighted mean accuracy in percent."""
    return 100 * fmean(task["acc"] for task in tasks.values())
