"""Put measured figures where the documents show them: nobody types these numbers.

Copies a run's summary.json to docs/results/demo.json, renders it as the table in README.md between
the markers, and renders every JSON file of docs/results as docs/results/README.md; without a run
only the last.

    python scripts/write_results.py runs/demo
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from render_scores import comparison, defaults_table
from render_tournament import tournaments

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


def ablation(record: Mapping[str, Any]) -> str:
    """A file of scripts/ablate_repair.py as a Markdown table."""
    base = record["teacher_loss"]
    lines = [
        f"Teacher's loss: {base:.4f} nats on {record['search_tokens']:,} tokens of search text.",
        "",
        "| channels by | tokens | ridge | KL cut | loss cut | KL repaired | loss repaired | s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for t in record["trials"]:
        cut, mended = (
            f"{100 * (t[key] / base - 1):+.2f} %" for key in ("loss_cut", "loss_repaired")
        )
        lines.append(
            f"| {t['channels']} | {t['tokens']:,} | {t['ridge']:g} | {t['kl_cut']:.4f} | {cut} "
            f"| {t['kl_repaired']:.4f} | {mended} | {t['seconds']:.0f} |"
        )
    return "\n".join(lines)


def full_comparison(record: Mapping[str, Any]) -> str:
    """A file of scripts/compare_full.py as a Markdown table per model."""
    parts = []
    teacher = record["models"]["teacher"]["tasks"]
    for name, against in record["against_teacher"].items():
        ours, kept = record["models"][name]["tasks"], against["retained"]
        parts += [f"| | questions | teacher, % | {name}, % | difference, 95 % |", "|---" * 5 + "|"]
        parts += [
            f"| `{task}` | {found['n']:,} | {100 * teacher[task]['acc']:.1f} "
            f"| {100 * ours[task]['acc']:.1f} | {interval(found)} |"
            for task, found in against["tasks"].items()
        ]
        parts += [
            f"| mean | {against['mean']['n']:,} | | | {interval(against['mean'])} |",
            "",
            f"The {name} keeps {100 * kept['value']:.2f} % of the teacher's mean accuracy "
            f"(95 % interval {100 * kept['low']:.2f} to {100 * kept['high']:.2f} %).",
            "",
        ]
    return "\n".join(parts).rstrip()


def figures(record: Mapping[str, Any]) -> str:
    """A file of scripts/figures.py as a Markdown table."""
    lines = ["| figure | value | unit | device | command |", "|---" * 5 + "|"]
    lines += [
        f"| `{name}` | {entry['value']:,} | {entry['unit']} | {entry['device']} "
        f"| `{entry['command']}` |"
        for name, entry in record.items()
    ]
    return "\n".join(lines)


def gap(record: Mapping[str, Any]) -> str:
    """A file of scripts/repair_gap.py as a Markdown table of losses above the teacher's."""
    base = record["teacher"]["loss"]
    stations = ("cut", "repaired", "cut_distilled", "repaired_distilled")
    titles = "cut, repaired, cut and distilled, repaired and distilled".split(", ")
    lines = [
        f"{format_count(record['parameters'])} parameters; teacher's loss {base:.4f} nats on "
        f"{record['search_tokens']:,} tokens of search text; repair on "
        f"{record['calibration_tokens']:,} tokens of calibration text, distillation on "
        f"{record['distillation_tokens']:,}. Losses above the teacher's.",
        "",
        "| | parameters removed | " + " | ".join(titles) + " | gap closed by repair | s |",
        "|---" * (len(stations) + 4) + "|",
    ]
    for name, found in record["cuts"].items():
        cells = [
            f"{100 * (found[key]['loss'] / base - 1):+.2f} %" if key in found else ""
            for key in stations
        ]
        lines.append(
            f"| {name} | {100 * found['share_removed']:.1f} % | {' | '.join(cells)} "
            f"| {found['gap_closed']:.1f} % | {found['repair_seconds']:.0f} |"
        )
    return "\n".join(lines)


def interval(found: Mapping[str, float]) -> str:
    """A paired difference in points with its 95 % interval."""
    mean, low, high = (100 * found[key] for key in ("mean", "low", "high"))
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


SECTIONS: tuple[tuple[str, str, str, Callable[[Mapping[str, Any]], str]], ...] = (
    (
        "demo.json",
        "The demo",
        "`make demo`, then `python scripts/write_results.py runs/demo`",
        table,
    ),
    (
        "full.json",
        "Student and teacher on every question of the report packages",
        "`python scripts/compare_full.py runs/demo --json docs/results/full.json`",
        full_comparison,
    ),
    (
        "repair_ablation.json",
        "Cut and repair of the bundled teacher",
        "`python scripts/ablate_repair.py --recipe minipuzzle/demo/demo.yaml --json "
        "docs/results/repair_ablation.json` (2 FFN layers out, width 704 to 416)",
        ablation,
    ),
    (
        "repair_ablation_long.json",
        "The same cut of a teacher of the same shape trained on 24 times the tokens",
        "the same with `--model` and that teacher's folder",
        ablation,
    ),
    (
        "repair_gap_demo.json",
        "What repair gives back, by kind of cut: the bundled teacher",
        "`python scripts/repair_gap.py --model demo --suffix demo`",
        gap,
    ),
    (
        "repair_gap_27m.json",
        "The same for a teacher of 27 M parameters",
        "`python scripts/train_demo_teacher.py --shape large ...`, then "
        "`python scripts/repair_gap.py --model FOLDER --suffix 27m --device cuda ...`",
        gap,
    ),
    (
        "ablate_scores.json",
        "Which score decides, axis by axis",
        "`python scripts/ablate_scores.py`, all of it in "
        "[how the scores compare](../how-scores-compare.md)",
        lambda record: defaults_table(record["rows"]),
    ),
    (
        "compare_pruners.json",
        "Pruning a small Llama by ours and by others",
        "`python scripts/compare_pruners.py`, explained in "
        "[how the scores compare](../how-scores-compare.md)",
        comparison,
    ),
    (
        "tournament.json",
        "A tournament of candidates and its winner",
        "`python scripts/tournament_experiment.py --run runs/tournament ...`",
        tournaments,
    ),
    (
        "importance.json",
        "Figures of scoring, pruning and repair",
        "each by the script that its row names",
        figures,
    ),
)


def results_page(folder: Path) -> str:
    """docs/results/README.md: a section for every file that is there."""
    parts = ["# Results", "", "Written by `scripts/write_results.py` from the files beside it."]
    for name, title, command, render in SECTIONS:
        if (folder / name).exists():
            record = json.loads((folder / name).read_text())
            parts += ["", f"## {title}", "", f"`{name}`: {command}", "", render(record)]
    return "\n".join(parts) + "\n"


def insert(text: str, new: str) -> str:
    """The text with what stands between the markers replaced."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{new}\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, nargs="?")
    options = parser.parse_args(arguments)
    results = ROOT / "docs" / "results"
    if options.run is not None:
        summary = json.loads((options.run / "summary.json").read_text())
        (results / "demo.json").write_text(json.dumps(summary, indent=2) + "\n")
        readme = ROOT / "README.md"
        readme.write_text(insert(readme.read_text(), table(summary)))
    (results / "README.md").write_text(results_page(results))


if __name__ == "__main__":
    main()
