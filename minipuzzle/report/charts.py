"""The report's charts, each a function of records and a width in pixels; None without data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from minipuzzle.units import format_bytes

from .plot import Box, Chart, Dot, Line, Text

Record = Mapping[str, Any]
WIDE, NARROW = 808, 358
BYTE_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
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
    unit, name = byte_unit(models[names[0]]["memory_bytes"])
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


def byte_unit(size: float) -> tuple[int, str]:
    """The largest unit that a size has one of: bytes and name."""
    return next(((scale, name) for scale, name in BYTE_UNITS if size >= scale), (1, "B"))
