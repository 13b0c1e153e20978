"""The report's charts, each a function of records and a width in pixels; None without data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from minipuzzle.units import format_bytes

from .plot import Box, Chart, Dot, Line, Text, Tick

Record = Mapping[str, Any]
WIDE, NARROW = 808, 358
BYTE_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
KIND_NAMES = {"mamba": "Mamba-2", "attention": "attention", "ffn": "FFN"}
ROUNDS = (("kl_cut", "cut"), ("kl_repaired", "repaired"), ("kl_distilled", "distilled"))
MEMORY_NAMES = {
    "weights": "weights",
    "embeddings": "embeddings",
    "kv_cache": "KV cache",
    "ssm_state": "Mamba states",
    "conv_state": "convolution states",
    "reserve": "reserve",
}


def importance(layers: Sequence[Record], width: float) -> Chart | None:
    """Hidden MSE per layer, in logarithms; removed layers are rings."""
    known = [layer for layer in layers if layer["mse"]]
    if len(known) < 2:
        return None
    chart = Chart(
        width,
        300,
        "Error of the final hidden state when one layer is removed, for each layer",
        x_label="layer",
        y_label="error without it",
    )
    x = chart.x_scale([0, len(layers) - 1])
    chart.x_ticks = [tick for tick in chart.x_ticks if "." not in tick.label]
    y = chart.y_scale([layer["mse"] for layer in known], log=True)
    places = [(x(layer["index"]), y(layer["mse"])) for layer in known]
    chart.lines.append(Line(places, "thread"))
    for layer, (at, up) in zip(known, places, strict=True):
        state = "kept" if layer["kept"] else "removed"
        chart.dots.append(Dot(at, up, 4.5, f"{layer['kind']} {state}", layer["title"]))
    return chart


def search(
    trials: Sequence[Record], finalists: Sequence[Record], best: Record, width: float
) -> Chart | None:
    """Memory against KL of every trial; finalists are larger, the chosen one has a ring."""
    if not trials:
        return None
    budget = best.get("budget_bytes")
    sizes = [trial["memory_bytes"] for trial in trials] + ([budget] if budget else [])
    unit, name = _unit(max(sizes))
    chart = Chart(
        width,
        320,
        "Candidates by memory and by divergence from the teacher before any healing",
        x_label=f"memory, {name}",
        y_label="KL to the teacher, nats",
    )
    x = chart.x_scale([size / unit for size in sizes])
    y = chart.y_scale([trial["kl"] for trial in trials], log=True)
    if budget:
        at = x(budget / unit)
        chart.lines.append(Line([(at, chart.top), (at, chart.height - chart.bottom)], "limit"))
        chart.texts.append(Text(at - 5, chart.top + 4, "budget", "note", "end"))
    played = {record["number"] for record in finalists}
    for trial in sorted(trials, key=lambda t: t["number"] in played):
        css = "trial"
        if trial["number"] in played:
            css = "chosen" if trial["number"] == best.get("number") else "finalist"
        radius = {"trial": 3.2, "finalist": 5.0, "chosen": 6.5}[css]
        place = x(trial["memory_bytes"] / unit), y(trial["kl"])
        chart.dots.append(Dot(*place, radius, css, _trial_title(trial)))
    return chart


def tournament(finalists: Sequence[Record], best: Record, width: float) -> Chart | None:
    """KL of every finalist after cut, repair and a short distillation."""
    if not finalists:
        return None
    chart = Chart(
        width,
        300,
        "Divergence of the finalists from the teacher as they are cut, repaired and distilled",
        y_label="KL to the teacher, nats",
        right=44,
    )
    values = [record[key] for record in finalists for key, _ in ROUNDS if record.get(key)]
    y = chart.y_scale(values, log=True)
    left, right = chart.left + 0.08 * width, chart.width - chart.right - 8
    columns = [left + i * (right - left) / 2 for i in range(3)]
    chart.x_ticks = [Tick(at, name) for at, (_, name) in zip(columns, ROUNDS, strict=True)]
    for record in sorted(finalists, key=lambda r: r["number"] == best.get("number")):
        css = "chosen" if record["number"] == best.get("number") else "finalist"
        title = _trial_title(record)
        points = [
            (at, y(record[key]))
            for at, (key, _) in zip(columns, ROUNDS, strict=True)
            if record.get(key)
        ]
        chart.lines.append(Line(points, css, title))
        chart.dots += [Dot(at, up, 4.5, css, title) for at, up in points]
        chart.texts.append(Text(points[-1][0] + 9, points[-1][1] + 4, f"#{record['number']}", css))
    chart.texts = spread(chart.texts)
    return chart


def distillation(history: Sequence[Record], width: float) -> Chart | None:
    """KL of every step and its running mean, and KL on text the training does not see."""
    steps = [entry for entry in history if entry.get("kind", "step") == "step"]
    held_out = [entry for entry in history if entry.get("kind") == "evaluation"]
    if len(steps) < 2:
        return None
    chart = Chart(
        width,
        300,
        "Divergence of the student from the teacher during distillation",
        x_label="step",
        y_label="KL to the teacher, nats",
    )
    losses = [entry["loss"] for entry in steps]
    smooth = running_mean(losses, max(1, len(losses) // 20))
    x = chart.x_scale([0, len(steps)], pad=0.01)
    y = chart.y_scale(losses + [entry["kl"] for entry in held_out])
    numbers = [entry["step"] + 1 for entry in steps]
    chart.lines += [
        Line([(x(n), y(v)) for n, v in zip(numbers, losses, strict=True)], "raw"),
        Line([(x(n), y(v)) for n, v in zip(numbers, smooth, strict=True)], "smooth"),
    ]
    for entry in held_out:
        title = f"after {entry['step']} steps, unseen text: KL {entry['kl']:.4f}"
        chart.dots.append(Dot(x(entry["step"]), y(entry["kl"]), 5, "heldout", title))
    return chart


def memory(models: Mapping[str, Record], width: float) -> Chart | None:
    """Memory at the deployment, item by item, teacher over student."""
    names = [name for name in ("teacher", "student") if name in models]
    if not names:
        return None
    chart = Chart(
        width,
        58 * len(names) + 46,
        "Memory of teacher and student at the deployment, by item",
        left=64,
        right=16,
        top=6,
    )
    unit, name = _unit(models[names[0]]["memory_bytes"])
    totals = [models[model]["memory_bytes"] / unit for model in names]
    x = chart.x_scale([0.0, *totals], pad=0.0)
    chart.x_label = f"memory, {name}"
    for row, model in enumerate(names):
        top, before = chart.top + 58 * row + 10, 0.0
        chart.texts.append(Text(chart.left - 10, top + 24, model, "name", "end"))
        for item in MEMORY_NAMES:
            size = models[model]["memory"].get(item, 0)
            at, after = x(before), x(before + size / unit)
            title = f"{model}: {MEMORY_NAMES[item]} {format_bytes(size)}"
            chart.boxes.append(Box(at, top, max(0.0, after - at), 38, item, title))
            before += size / unit
    return chart


def differences(against: Record, width: float) -> Chart | None:
    """Accuracy of the student minus the teacher's with 95 % intervals, task by task."""
    tasks: Mapping[str, Record] = against.get("tasks", {})
    if not tasks:
        return None
    rows = [*tasks.items()] + ([("mean", against["mean"])] if len(tasks) > 1 else [])
    narrow = width < 500
    chart = Chart(
        width,
        (48 if narrow else 32) * len(rows) + 52,
        "Accuracy of the student minus the teacher's, in points, with 95 % intervals",
        x_label="student minus teacher, points",
        left=14 if narrow else min(300.0, 16 + 6.7 * max(len(name) for name, _ in rows)),
        top=8,
    )
    bounds = [100 * d[key] for _, d in rows for key in ("low", "high")]
    x = chart.x_scale([*bounds, 0.0])
    zero = x(0.0)
    chart.lines.append(Line([(zero, chart.top), (zero, chart.height - chart.bottom)], "zero"))
    for row, (name, d) in enumerate(rows):
        y = chart.top + (row + 0.5) * (48 if narrow else 32) + (8 if narrow else 0)
        css = "mean" if name == "mean" else "task"
        low, mean, high = (x(100 * d[key]) for key in ("low", "mean", "high"))
        title = f"{name}: {100 * d['mean']:+.2f} [{100 * d['low']:+.2f}, {100 * d['high']:+.2f}]"
        chart.lines.append(Line([(low, y), (high, y)], f"interval {css}", title))
        chart.dots.append(Dot(mean, y, 5, css, title))
        label = (
            (chart.left, y - 14, name, css, "start")
            if narrow
            else (chart.left - 12, y + 4, name, css, "end")
        )
        chart.texts.append(Text(*label))
    return chart


def running_mean(values: Sequence[float], radius: int) -> list[float]:
    """Mean over up to `radius` neighbours on either side."""
    windows = (values[max(0, i - radius) : i + radius + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def spread(texts: Sequence[Text], distance: float = 13.0) -> list[Text]:
    """Texts of one column moved down until none covers another."""
    placed: list[Text] = []
    for text in sorted(texts, key=lambda t: t.y):
        least = placed[-1].y + distance if placed else text.y
        placed.append(replace(text, y=max(text.y, least)))
    return placed


def removed_words(removed: Mapping[str, int]) -> str:
    """`2 Mamba-2, 1 FFN`, or `no layer`."""
    parts = [f"{number} {KIND_NAMES.get(kind, kind)}" for kind, number in removed.items() if number]
    return ", ".join(parts) or "no layer"


def _trial_title(trial: Record) -> str:
    parts = [f"candidate {trial['number']}"]
    if "removed" in trial:
        parts.append(f"without {removed_words(trial['removed'])}")
    if trial.get("width"):
        parts.append(f"FFN width {trial['width']}")
    parts.append(f"{format_bytes(trial['memory_bytes'])}, KL {trial['kl']:.4f}")
    return "; ".join(parts)


def _unit(size: float) -> tuple[int, str]:
    return next(((scale, name) for scale, name in BYTE_UNITS if size >= scale), (1, "B"))
