"""Rank correlations of proxies with what candidates are worth in the end, and their drawing.

`cut`, `quick`, `repaired` and `final` are stations of a candidate, each with a KL to the teacher.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import ConstantInputWarning, pearsonr, rankdata

Rows = Sequence[Mapping[str, Any]]
Values = np.ndarray[Any, Any]
RESAMPLES = 10_000
# name -> where it stands in a candidate's record, and the sign that makes less better
PROXIES: dict[str, tuple[tuple[str, str], int]] = {
    "KL as cut": (("cut", "kl"), 1),
    "accuracy as cut": (("cut", "accuracy"), -1),
    "agreement as cut": (("cut", "agreement"), -1),
    "KL, quick repair": (("quick", "kl"), 1),
    "accuracy, quick repair": (("quick", "accuracy"), -1),
    "agreement, quick repair": (("quick", "agreement"), -1),
    "KL, full repair": (("repaired", "kl"), 1),
}
FIGURES = {
    "rank_correlation_before_repair": "KL as cut",
    "rank_correlation_after_repair": "KL, quick repair",
    "rank_correlation_full_repair": "KL, full repair",
}
COLOURS = ("#0369a1", "#b45309", "#15803d", "#7c3aed", "#be123c", "#0f766e", "#a16207", "#475569")


def column(rows: Rows, proxy: str) -> Values:
    """A proxy of all candidates, less being better."""
    (station, quantity), sign = PROXIES[proxy]
    return np.array([sign * row[station][quantity] for row in rows])


def finals(rows: Rows) -> Values:
    """The final KL of all candidates."""
    return np.array([row["final"]["kl"] for row in rows])


def spearman(left: Values, right: Values) -> Values:
    """Rank correlation along the last axis, 0 where a side is constant.

    (..., candidates) twice -> (...)
    """
    ranks = [rankdata(side, axis=-1) for side in (left, right)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        found: Values = pearsonr(*ranks, axis=-1).statistic
    return np.nan_to_num(found)


def resamples(number: int, seed: int) -> Values:
    """Candidates drawn with replacement, RESAMPLES times: (RESAMPLES, number)."""
    return np.random.default_rng(seed).integers(number, size=(RESAMPLES, number))


def correlations(rows: Rows, seed: int) -> dict[str, dict[str, float]]:
    """Proxy -> its rank correlation with the final KL, and a 95 % interval over candidates."""
    final, draws = finals(rows), resamples(len(rows), seed)
    found = {}
    for proxy in PROXIES:
        values = column(rows, proxy)
        sampled = spearman(values[draws], final[draws])
        found[proxy] = with_interval(spearman(values, final), sampled)
    return found


def difference(rows: Rows, seed: int) -> dict[str, float]:
    """Rank correlation of the KL after the quick repair minus that before, on the same draws."""
    final, draws = finals(rows), resamples(len(rows), seed)
    after, before = column(rows, "KL, quick repair"), column(rows, "KL as cut")
    sampled = spearman(after[draws], final[draws]) - spearman(before[draws], final[draws])
    return with_interval(spearman(after, final) - spearman(before, final), sampled)


def agreement(rows: Rows) -> float:
    """Rank correlation of the KL as cut with that of the quick repair."""
    return float(spearman(column(rows, "KL as cut"), column(rows, "KL, quick repair")))


def with_interval(value: Values, sampled: Values) -> dict[str, float]:
    """A value and the middle 95 % of what resamples give."""
    low, high = np.quantile(sampled, (0.025, 0.975))
    return {"rho": float(value), "low": float(low), "high": float(high)}


def picks(rows: Rows) -> dict[str, dict[str, float]]:
    """Proxy -> final KL of its first choice and of the best of its first three, above the best."""
    final = finals(rows)
    found = {}
    for proxy in PROXIES:
        order = column(rows, proxy).argsort(kind="stable")
        found[proxy] = {
            f"best_of_{first}": float(final[order[:first]].min() - final.min()) for first in (1, 3)
        }
    return found


def draw(rows: Rows, found: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Final KL by each of three proxies; one colour for each kind of cut."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "minipuzzle"
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    kinds = sorted({row["kind"] for row in rows})
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.9), sharey=True, layout="constrained")
    for axis, proxy in zip(axes, FIGURES.values(), strict=True):
        for kind, colour in zip(kinds, COLOURS * len(kinds), strict=False):
            own = [row for row in rows if row["kind"] == kind]
            axis.scatter(column(own, proxy), finals(own), s=26, color=colour, label=kind)
        entry = found[proxy]
        numbers = f"{entry['rho']:.2f} [{entry['low']:.2f}, {entry['high']:.2f}]"
        axis.set_title(f"{proxy}: rank correlation {numbers}", fontsize=9)
        axis.set_xlabel(f"{proxy}, nats", fontsize=9)
        axis.set(xscale="log", yscale="log")
        for ticks in (axis.xaxis, axis.yaxis):
            ticks.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ticks.set_major_formatter(StrMethodFormatter("{x:g}"))
            ticks.set_minor_formatter(NullFormatter())
        axis.grid(visible=True, which="both", alpha=0.2)
    axes[0].set_ylabel("KL after repair and distillation, nats", fontsize=9)
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        title="layers removed",
        loc="outside lower center",
        ncols=len(kinds),
        fontsize=8,
        title_fontsize=8,
        frameon=False,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
