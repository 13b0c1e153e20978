"""docs/how-scores-compare.md and its drawing, from the files of two scripts.

The page's prose stands in the page; what is between its markers, every number, is written here.

    python scripts/ablate_scores.py --render
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from statistics import fmean
from typing import Any

from figures import RESULTS
from jinja2 import Environment

from minipuzzle.prune.depth import LAYER_METRIC
from minipuzzle.prune.select import UNIT_METRICS
from minipuzzle.report.plot import Chart, Dot, Line, Text, Tick

DOCS = RESULTS.parent
PAGE = DOCS / "how-scores-compare.md"
DRAWING = DOCS / "images" / "scores.svg"
ABLATION, COMPARISON = RESULTS / "ablate_scores.json", RESULTS / "compare_pruners.json"

NAMES = {
    "width": "FFN channels",
    "heads": "Mamba heads",
    "head_dim": "Mamba head channels",
    "query_heads": "query heads",
    "kv_heads": "KV groups",
    "hidden": "hidden channels",
    "layers": "layers",
}
RANDOM = "random"
CONTROLS = ("order", "reverse", RANDOM)
COLOURS = {
    "activation": "#b45309",
    "flap": "#7c3aed",
    "energy": "#0369a1",
    "surgeon": "#15803d",
    "hidden_mse": "#15803d",
    "logit_mse": "#0369a1",
    "kl": "#7c3aed",
    "cosine": "#b45309",
}
GREY = "#9ca3af"
FLOOR = 1e-3  # nats; what is less is drawn here

Row = Mapping[str, Any]
Record = Mapping[str, Any]


def render() -> None:
    """Write the page's tables and the drawing from the files that are there."""
    parts: dict[str, str] = {}
    if ABLATION.exists():
        found = json.loads(ABLATION.read_text())
        parts["defaults"] = defaults_table(found["rows"])
        parts["cuts"] = "\n\n".join(axis_table(found, axis) for axis in axes(found))
        parts["repairs"] = "\n\n".join(repair_table(found, axis) for axis in axes(found))
        DRAWING.parent.mkdir(parents=True, exist_ok=True)
        DRAWING.write_text(drawing(found))
    if COMPARISON.exists():
        parts["comparison"] = comparison(json.loads(COMPARISON.read_text()))
    text = PAGE.read_text(encoding="utf-8")
    for name, new in parts.items():
        text = between(text, name, new.strip())
    PAGE.write_text(text, encoding="utf-8")


def between(text: str, name: str, new: str) -> str:
    """The text with what stands between a part's markers replaced."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    assert begin in text and end in text, f"{PAGE.name} has no markers for {name}"
    before, rest = text.split(begin)
    return f"{before}{begin}\n{new}\n{end}{rest.split(end)[1]}"


def axes(found: Record) -> list[str]:
    """The axes that were measured, in the order of NAMES."""
    return [axis for axis in NAMES if any(row["axis"] == axis for row in found["rows"])]


def rows_of(rows: Sequence[Row], axis: str, state: str) -> list[Row]:
    """Rows of one axis in one state."""
    return [row for row in rows if (row["axis"], row["state"]) == (axis, state)]


def ranking(row: Row) -> str:
    """What ranked the units; random draws are one."""
    name: str = row["by"]
    return RANDOM if name.startswith(RANDOM) else name


def means(rows: Sequence[Row]) -> dict[str, dict[int, float]]:
    """Ranking -> number removed -> excess of loss, the mean over random draws; scores first."""
    by: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        by.setdefault(ranking(row), {}).setdefault(row["removed"], []).append(row["excess"])
    order = sorted(by, key=lambda name: (name in CONTROLS, list(by).index(name)))
    return {name: {n: fmean(values) for n, values in by[name].items()} for name in order}


def best(table: Mapping[str, Mapping[int, float]], removed: int | None = None) -> str:
    """The score of least excess: at one number of units, or on average over all."""
    scores = {n: t for n, t in table.items() if n not in CONTROLS}

    def of(name: str) -> float:
        return fmean(scores[name].values()) if removed is None else scores[name][removed]

    return min(scores, key=of)


def default_of(axis: str) -> str:
    """The metric that `select` takes unless told otherwise."""
    return LAYER_METRIC if axis == "layers" else UNIT_METRICS[axis][0]


def defaults_table(rows: Sequence[Row]) -> str:
    """Axis by axis the default and what was best."""
    lines = ["| axis | default | best after the cut | best after repair |", "|---|---|---|---|"]
    for axis in NAMES:
        cut, mended = (means(rows_of(rows, axis, state)) for state in ("cut", "repaired"))
        if cut:
            after = f"`{best(mended)}`" if mended else "not measured"
            lines.append(f"| {NAMES[axis]} | `{default_of(axis)}` | `{best(cut)}` | {after} |")
    return "\n".join(lines)


def axis_table(found: Record, axis: str) -> str:
    """One axis, cut: every ranking at every number of units."""
    rows = rows_of(found["rows"], axis, "cut")
    if not rows:
        return ""
    table, units = means(rows), rows[0]["units"]
    numbers = sorted({row["removed"] for row in rows})
    where = f"{units} in all" if axis in ("layers", "hidden") else f"{units} a layer"
    lines = [
        f"| {NAMES[axis]} ({where}) | " + " | ".join(share(n, units) for n in numbers) + " |",
        "|---" * (len(numbers) + 1) + "|",
    ]
    for name, values in table.items():
        cells = [cell(values[n], name == best(table, n)) for n in numbers]
        label = "random, mean of draws" if name == RANDOM else label_of(name)
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def repair_table(found: Record, axis: str) -> str:
    """One axis, sliced and repaired: excess before and after."""
    before, after = (means(rows_of(found["rows"], axis, s)) for s in ("sliced", "repaired"))
    if not after:
        return ""
    units = next(row["units"] for row in found["rows"] if row["axis"] == axis)
    numbers = sorted(next(iter(after.values())))
    lines = [
        f"| {NAMES[axis]}, cut → repaired | " + " | ".join(share(n, units) for n in numbers) + " |",
        "|---" * (len(numbers) + 1) + "|",
    ]
    for name, values in after.items():
        cells = [
            f"{before[name][n]:+.4f} → {cell(values[n], name == best(after, n))}" for n in numbers
        ]
        lines.append(f"| {label_of(name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def share(removed: int, units: int) -> str:
    """Head of a column."""
    return f"-{removed} ({100 * removed / units:.0f} %)"


def cell(value: float, strong: bool) -> str:
    """Excess of loss in nats; the best of a column in bold."""
    return f"**{value:+.4f}**" if strong else f"{value:+.4f}"


def label_of(name: str) -> str:
    """A score in code type, a control in plain words."""
    if name in CONTROLS:
        return {"order": "the first stay", "reverse": "the last stay", RANDOM: "random"}[name]
    metric, _, how = name.partition(", ")
    return f"`{metric}`" + (f", {how}" if how else "")


def comparison(found: Record) -> str:
    """The best of every method at every share, and with which setting."""
    texts, whole = found["tokens"], found["model"]["parameters"]
    lines = [
        f"Uncut: {whole:,} parameters, loss {found['model']['loss']:.4f} nats on "
        f"{texts['measuring_tokens']:,} tokens that chose nothing. Settings were chosen on "
        f"{texts['choosing_tokens']:,} others; repair saw {texts['repair_tokens']:,} tokens. "
        "In the cells: excess of loss in nats, parameters removed, setting.",
    ]
    rows = [row for row in found["rows"] if "excess" in row]
    shares = sorted({row["share"] for row in rows})
    for cut, title in (("widths", "widths"), ("blocks", "whole blocks")):
        heads = [f"{100 * s:.0f} % asked" for s in shares]
        lines += ["", f"| {title} | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
        kinds: dict[tuple[str, str, bool], dict[float, Row]] = {}
        for row in (row for row in rows if row["cut"] == cut):
            kind = (row["method"], row["state"], row["uniform"])
            kinds.setdefault(kind, {})[row["share"]] = row
        for kind in sorted(kinds, key=lambda kind: (kind[1], kind[0] == "ours", not kind[2])):
            cells = [peer_cell(kinds[kind].get(s), whole) for s in shares]
            lines.append(f"| {method_of(*kind)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def method_of(method: str, state: str, uniform: bool) -> str:
    """A row's name; a width per layer is what no stock Llama can be."""
    repaired = "" if state == "cut" else ", repaired" if method == "ours" else ", repaired by ours"
    return method + repaired + ("" if uniform else ", a width per layer")


def peer_cell(row: Row | None, whole: int) -> str:
    """Excess of loss, what is really gone, and the setting."""
    if row is None:
        return ""
    gone = 100 * (1 - row["parameters"] / whole)
    return f"{row['excess']:+.4f} (-{gone:.1f} %; {setting_of(row['how'])})"


def setting_of(how: Mapping[str, Any]) -> str:
    """A setting in words."""
    if "importance" in how:
        return f"{how['importance']}, {how['scope']}, {how['ranking']}"
    if isinstance(how["blocks"], list):
        return f"{how['metric']}: {', '.join(map(str, how['blocks']))}"
    words = [how["metric"]]
    if how["widths"]:
        words.append("widths by " + " and ".join(filter(None, how["widths"])))
    names = {"query_heads": "query heads", "kv_heads": "KV groups", "blocks": "blocks out"}
    words += [f"{how[key]} {name}" for key, name in names.items() if how[key]]
    return ", ".join(words)


def drawing(found: Record) -> str:
    """All axes as small charts side by side, one SVG of its own."""
    template = resources.files("minipuzzle.report").joinpath("charts.html").read_text()
    macro: Callable[[Any], str] = Environment(autoescape=True).from_string(template).module.chart  # type: ignore[attr-defined]
    width, height = 404, 250
    charts = [chart for axis in axes(found) if (chart := axis_chart(found, axis, width, height))]
    parts = []
    for k, chart in enumerate(charts):
        svg = re.search(r"<svg.*?</svg>", macro((chart,)), re.DOTALL)
        assert svg is not None
        place = f'<svg x="{k % 2 * width}" y="{k // 2 * height}" '
        parts.append(place + re.sub(r"\n\s*", "", svg[0]).removeprefix("<svg "))
    total = (len(charts) + 1) // 2 * height
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * width} {total}" '
        f'width="{2 * width}" height="{total}">\n<style>{style()}</style>\n'
        f'<rect width="{2 * width}" height="{total}" fill="#fff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def style() -> str:
    """Colours of lines, dots and words by score."""
    rules = [
        "text{font:11px sans-serif;fill:#374151}.grid{stroke:#e5e7eb}.axis{stroke:#6b7280}",
        f".line{{fill:none;stroke:{GREY};stroke-width:1.2}}.dot{{fill:{GREY}}}",
        ".iterative{stroke-dasharray:4 3}.head{font-weight:600;font-size:12px}",
    ]
    for name, colour in COLOURS.items():
        rules.append(f".line.{name}{{stroke:{colour};stroke-width:2}}.dot.{name}{{fill:{colour}}}")
        rules.append(f"text.{name}{{fill:{colour}}}")
    return "".join(rules)


def axis_chart(found: Record, axis: str, width: float, height: float) -> Chart | None:
    """Excess of loss by the share of units that are gone, one line for every ranking."""
    rows = rows_of(found["rows"], axis, "cut")
    if not rows:
        return None
    table, units = means(rows), rows[0]["units"]
    chart = Chart(
        width,
        height,
        f"Excess of loss after cutting {NAMES[axis]} by each ranking",
        x_label=f"{NAMES[axis]} removed, %",
        y_label="nats above the teacher",
        right=96,
    )
    x = chart.x_scale([100 * row["removed"] / units for row in rows], pad=0.08)
    y = chart.y_scale([max(FLOOR, row["excess"]) for row in rows], log=True)
    chart.x_ticks = [
        Tick(x(100 * n / units), f"{100 * n / units:.0f}") for n in sorted(rows_numbers(rows))
    ]
    for k, (name, values) in enumerate(table.items()):
        css = name.replace(", ", " ")
        points = [(x(100 * n / units), y(max(FLOOR, v))) for n, v in sorted(values.items())]
        chart.lines.append(Line(points, css, name))
        chart.dots += [Dot(at, up, 2.5, css) for at, up in points]
        word = name.replace(", iterative", ", iter.")
        chart.texts.append(Text(width - 90, 40 + 15 * k, word, css))
    chart.texts.append(Text(width / 2, 12, NAMES[axis], "head", "middle"))
    return chart


def rows_numbers(rows: Sequence[Row]) -> set[int]:
    """Numbers of units removed."""
    return {row["removed"] for row in rows}
