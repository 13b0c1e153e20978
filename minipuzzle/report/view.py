"""From records to what the page shows: sentences, cells and tables, all text and numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from minipuzzle.architecture import PATTERN_LETTERS, Architecture
from minipuzzle.export.changes import describe_cut
from minipuzzle.units import format_bytes, format_count

from .charts import MEMORY_NAMES
from .gather import Findings
from .words import KIND_NAMES

Record = Mapping[str, Any]
MODELS = ("teacher", "pruned", "repaired", "student")
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Figure:
    """A number of the headline: what it is, the number, what stands below it."""

    label: str
    value: str
    note: str


def headline(findings: Findings) -> list[Figure]:
    """Memory, quality, accuracy, speed of the student beside the teacher's; what is known of it."""
    teacher, student = (findings.models.get(name) for name in ("teacher", "student"))
    if teacher is None or student is None:
        return []
    size = student["memory_bytes"] / teacher["memory_bytes"] - 1
    loss = student["bits_per_byte"] / teacher["bits_per_byte"] - 1
    speed = student["decode_tokens_per_second"] / teacher["decode_tokens_per_second"]
    figures = [
        Figure("memory", percent(size), f"{_bytes(teacher)} to {_bytes(student)}"),
        Figure(
            "bits per byte",
            percent(loss),
            f"{teacher['bits_per_byte']:.4f} to {student['bits_per_byte']:.4f}, less is better",
        ),
        Figure("decode speed", f"{speed:.2f}×", _speeds(teacher, student)),
    ]
    kept = findings.evaluation.get("against_teacher", {}).get("student", {}).get("retained")
    if kept is not None:
        interval = f"95 % interval {100 * kept['low']:.1f} to {100 * kept['high']:.1f} %"
        figures.insert(2, Figure("accuracy kept", f"{100 * kept['value']:.1f} %", interval))
    return figures


def changes(findings: Findings) -> list[str]:
    """What the cut removed, in words."""
    if findings.teacher is None or findings.student is None:
        return []
    return describe_cut(findings.teacher, findings.student)


def layers(findings: Findings) -> list[dict[str, Any]]:
    """One record per layer of the teacher: kind, importance, whether and how much of it is kept.

    `rank` is the importance from 0 (least) to 1 (most) on a logarithmic scale.
    """
    if findings.teacher is None:
        return []
    scores, selection = findings.importance, findings.selection
    known = [math.log(score) for score in scores if score > 0]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    records = []
    for i, layer in enumerate(findings.teacher.layers):
        mse = scores[i] if i < len(scores) and scores[i] > 0 else None
        axes = selection[i] if i < len(selection) else {}
        rank = 0.5
        if high > low:
            rank = 0.0 if mse is None else (math.log(mse) - low) / (high - low)
        narrowed = _narrowed(layer, axes or {})
        record = {
            "index": i,
            "kind": layer.kind,
            "letter": PATTERN_LETTERS[layer.kind],
            "mse": mse,
            "rank": round(rank, 3),
            "kept": axes is not None,
            "share": min((has / had for _, had, has in narrowed), default=1.0),
        }
        records.append(record | {"title": _layer_title(record, narrowed)})
    return records


def _narrowed(layer: Any, axes: Record) -> list[tuple[str, int, int]]:
    """(axis, units before, units kept) of every axis that lost some."""
    sizes = [(axis, int(getattr(layer, axis)), len(kept)) for axis, kept in axes.items()]
    return [(axis, had, has) for axis, had, has in sizes if has < had]


def _layer_title(record: Record, narrowed: Sequence[tuple[str, int, int]]) -> str:
    parts = [f"layer {record['index']}", KIND_NAMES[record["kind"]]]
    parts += [] if record["kept"] else ["removed"]
    parts += [f"{axis.replace('_', ' ')} {had} to {has}" for axis, had, has in narrowed]
    parts += [] if record["mse"] is None else [f"error without it {record['mse']:.3g}"]
    return ", ".join(parts)


def model_names(findings: Findings) -> list[str]:
    """The evaluated models in the order they were made."""
    return [name for name in MODELS if name in findings.models]


def quality_rows(findings: Findings) -> list[dict[str, Any]]:
    """Rows of the evaluation table: a label and one (value, note) per model."""
    names = model_names(findings)
    if not names:
        return []
    models = [findings.models[name] for name in names]
    first = models[0]

    def row(label: str, key: str, show: Any, note: Any) -> dict[str, Any]:
        values = [
            (show(model[key]), "" if model is first else note(model, key)) for model in models
        ]
        return {"label": label, "detail": "", "cells": values, "css": ""}

    def change(model: Record, key: str) -> str:
        return percent(model[key] / first[key] - 1)

    def factor(model: Record, key: str) -> str:
        return f"{model[key] / first[key]:.2f}×"

    rows = [
        row("parameters", "parameters", format_count, change),
        row("memory", "memory_bytes", format_bytes, change),
        row("bits per byte", "bits_per_byte", lambda value: f"{value:.4f}", change),
    ]
    rows += [_task_row(findings, names, task) for task in first["tasks"]]
    if len(first["tasks"]) > 1:
        rows.append(_mean_row(findings, names))
    return [
        *rows,
        row("prefill, tokens/s", "prefill_tokens_per_second", _speed, factor),
        row("decode, tokens/s", "decode_tokens_per_second", _speed, factor),
    ]


def _task_row(findings: Findings, names: Sequence[str], task: str) -> dict[str, Any]:
    cells = []
    for name in names:
        record = findings.models[name]["tasks"][task]
        value = f"{100 * record['acc']:.1f} ± {100 * record['acc_stderr']:.1f}"
        tasks = _against(findings, name).get("tasks", {})
        cells.append((value, points(tasks[task]) if task in tasks else ""))
    n = findings.models[names[0]]["tasks"][task]["n"]
    return {"label": task, "detail": f"% of {n} questions", "cells": cells, "css": ""}


def _mean_row(findings: Findings, names: Sequence[str]) -> dict[str, Any]:
    cells = []
    for name in names:
        tasks = findings.models[name]["tasks"].values()
        mean = _against(findings, name).get("mean")
        value = f"{100 * fmean(task['acc'] for task in tasks):.1f}"
        cells.append((value, points(mean) if mean else ""))
    return {"label": "mean of tasks", "detail": "%", "cells": cells, "css": "mean"}


def memory_rows(findings: Findings) -> list[dict[str, Any]]:
    """Rows of the memory table, items that are nowhere left out; colours by item."""
    names = [name for name in ("teacher", "student") if name in findings.models]
    records = [findings.models[name] for name in names]
    rows = [
        {
            "css": item,
            "label": label,
            "cells": [format_bytes(record["memory"].get(item, 0)) for record in records],
        }
        for item, label in MEMORY_NAMES.items()
        if any(record["memory"].get(item, 0) for record in records)
    ]
    totals = [format_bytes(record["memory_bytes"]) for record in records]
    return [*rows, {"css": "total", "label": "total", "cells": totals}] if names else []


def shape(architecture: Architecture) -> str:
    """`29 layers, hidden 192, pattern ...` without the pattern."""
    counts = ", ".join(
        f"{number} {KIND_NAMES[kind]}" for kind, number in architecture.counts().items()
    )
    return f"{len(architecture.layers)} layers ({counts}), hidden size {architecture.hidden}"


def percent(change: float) -> str:
    """A relative change with its sign: `+1.2 %`."""
    return f"{_signed(100 * change)} %"


def points(difference: Record) -> str:
    """A difference of accuracies with half of its interval: `-0.8 ± 1.1`."""
    half = 100 * (difference["high"] - difference["low"]) / 2
    return f"{_signed(100 * difference['mean'])} ± {half:.1f}"


def _signed(value: float) -> str:
    """One decimal with its sign, a real minus, and none for what rounds to zero."""
    text = f"{value:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", MINUS)


def _against(findings: Findings, name: str) -> Record:
    record: Record = findings.evaluation.get("against_teacher", {}).get(name, {})
    return record


def _bytes(model: Record) -> str:
    return format_bytes(model["memory_bytes"])


def _speed(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _speeds(teacher: Record, student: Record) -> str:
    speeds = [_speed(model["decode_tokens_per_second"]) for model in (teacher, student)]
    return f"{speeds[0]} to {speeds[1]} tokens/s"
