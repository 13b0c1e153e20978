"""Charts of the search: its candidates, its finalists, and how their ranks changed.

Each is a function of records and a width in pixels; None without data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from .charts import byte_unit
from .plot import Chart, Dot, Line, Text, Tick
from .words import point_words, stations, trial_words

Record = Mapping[str, Any]
Cost = Literal["memory_bytes", "latency"]
COST_NAMES: dict[Cost, str] = {"memory_bytes": "memory", "latency": "latency"}
RADIUS = {"screened": 2.6, "trial": 3.2, "front": 4.2, "finalist": 5.0, "chosen": 6.5}
MANY_COLUMNS = 5  # of a narrow chart, where words become numbers


def candidates(
    trials: Sequence[Record],
    finalists: Sequence[Record],
    front: Record,
    best: Record,
    width: float,
    cost: Cost = "memory_bytes",
) -> Chart | None:
    """A cost against the KL of every trial, the more important ones on top."""
    shown = [trial for trial in trials if isinstance(trial.get(cost), int | float)]
    if not shown:
        return None
    budget = best.get("budget_bytes") if cost == "memory_bytes" else None
    values = [trial[cost] for trial in shown] + ([budget] if budget else [])
    scale, name = byte_unit(max(values)) if cost == "memory_bytes" else (1e-3, "ms a step")
    chart = Chart(
        width,
        320,
        f"Candidates by {COST_NAMES[cost]} and by divergence from the teacher before any healing",
        x_label=f"{COST_NAMES[cost]}, {name}",
        y_label="KL to the teacher, nats",
    )
    x = chart.x_scale([value / scale for value in values])
    y = chart.y_scale([trial["kl"] for trial in shown], log=True)
    if budget:
        at = x(budget / scale)
        chart.lines.append(Line([(at, chart.top), (at, chart.height - chart.bottom)], "limit"))
        chart.texts.append(Text(at - 5, chart.top + 4, "budget", "note", "end"))
    roles = _roles(shown, finalists, front, best)
    places = {trial["number"]: (x(trial[cost] / scale), y(trial["kl"])) for trial in shown}
    # with a third objective its points do not lie on a line of this plane
    if len(front.get("objectives", ())) == 2:
        ends = sorted(places[number] for number, role in roles.items() if role[1])
        chart.lines.append(Line(ends, "front", "Pareto front"))
    for trial in sorted(shown, key=lambda t: list(RADIUS).index(roles[t["number"]][0])):
        css, in_front = roles[trial["number"]]
        dot = Dot(*places[trial["number"]], RADIUS[css], css, trial_words(trial))
        chart.dots.append(replace(dot, css=f"{css} edge") if in_front else dot)
    return chart


def _roles(
    trials: Sequence[Record], finalists: Sequence[Record], front: Record, best: Record
) -> dict[int, tuple[str, bool]]:
    """Number of a trial -> what it became, and whether it lies on the Pareto front.

    A study with one objective has no front but its best candidate, which is not marked.
    """
    played = {record["number"] for record in finalists}
    several = len(front.get("objectives", ())) > 1
    ahead = set(front.get("numbers", ())) if several else set()
    roles = {}
    for trial in trials:
        number = trial["number"]
        css = "screened" if trial.get("screened") else "trial"
        css = "front" if number in ahead else css
        css = "finalist" if number in played else css
        css = "chosen" if number == best.get("number") else css
        roles[number] = css, number in ahead
    return roles


def divergences(finalists: Sequence[Record], best: Record, width: float) -> Chart | None:
    """KL of every finalist after cut, repair and every rung that it played."""
    played = [record for record in finalists if len(stations(record)) > 1]
    if not played:
        return None
    chart = Chart(
        width,
        300,
        "Divergence of the finalists from the teacher as they are cut, repaired and distilled",
        y_label="KL to the teacher, nats",
        right=44,
    )
    names = [name for name, _ in max(map(stations, played), key=len)]
    columns = _columns(chart, names, left=chart.left + 0.06 * width)
    y = chart.y_scale([kl for record in played for _, kl in stations(record)], log=True)
    for record in _chosen_last(played, best):
        css, title = _css(record, best), trial_words(record)
        points = [(columns[name], y(kl)) for name, kl in stations(record)]
        chart.lines.append(Line(points, css, title))
        chart.dots += [Dot(at, up, 4.5, css, title) for at, up in points]
        chart.texts.append(Text(points[-1][0] + 9, points[-1][1] + 4, f"#{record['number']}", css))
    chart.texts = spread(chart.texts)
    return chart


def ranks(finalists: Sequence[Record], best: Record, width: float) -> Chart | None:
    """Rank of every finalist at every station of the tournament, first on top.

    A line ends where a finalist was dropped.
    """
    played = [record for record in finalists if len(record.get("ranks", {})) > 1]
    if len(played) < 2:
        return None
    step = 30.0
    chart = Chart(
        width,
        step * len(played) + 62,
        "Ranks of the finalists from the proxy through every rung of the tournament",
        y_label="rank",
        right=44,
    )
    names = max((list(record["ranks"]) for record in played), key=len)
    columns = _columns(chart, names, left=chart.left + 44)
    places = {n + 1: chart.top + 12 + step * n for n in range(len(played))}
    chart.y_ticks = [Tick(at, str(rank)) for rank, at in places.items()]
    for record in _chosen_last(played, best):
        css, name = _css(record, best), f"#{record['number']}"
        course = [f"{column}: {rank}" for column, rank in record["ranks"].items()]
        title = f"{name}; {point_words(record.get('point', {}))}; " + ", ".join(course)
        points = [(columns[column], places[rank]) for column, rank in record["ranks"].items()]
        chart.lines.append(Line(points, css, title))
        chart.dots += [Dot(at, up, 6, css, title) for at, up in points]
        chart.texts.append(Text(points[0][0] - 11, points[0][1] + 4, name, css, "end"))
        chart.texts.append(Text(points[-1][0] + 11, points[-1][1] + 4, name, css))
    return chart


def _columns(chart: Chart, names: Sequence[str], *, left: float) -> dict[str, float]:
    """Places of columns, with their names below."""
    right = chart.width - chart.right - 8
    apart = (right - left) / max(1, len(names) - 1)
    columns = {name: left + i * apart for i, name in enumerate(names)}
    short = chart.narrow and len(names) > MANY_COLUMNS
    chart.x_ticks = [
        Tick(at, name.removeprefix("step ") if short else name) for name, at in columns.items()
    ]
    return columns


def _chosen_last(records: Sequence[Record], best: Record) -> list[Record]:
    """The chosen one is drawn over the others."""
    return sorted(records, key=lambda record: bool(record["number"] == best.get("number")))


def _css(record: Record, best: Record) -> str:
    return "chosen" if record["number"] == best.get("number") else "finalist"


def spread(texts: Sequence[Text], distance: float = 13.0) -> list[Text]:
    """Texts of one column moved down until none covers another."""
    placed: list[Text] = []
    for text in sorted(texts, key=lambda t: (t.x, t.y)):
        above = placed[-1] if placed and placed[-1].x == text.x else None
        placed.append(replace(text, y=max(text.y, above.y + distance)) if above else text)
    return placed
