"""What the search decided, in words: of a point, of a candidate, of a tournament."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from minipuzzle.units import format_bytes

Record = Mapping[str, Any]
KIND_NAMES = {"mamba": "Mamba-2", "attention": "attention", "ffn": "FFN", "block": "blocks"}
AXIS_NAMES = {
    "width": "FFN width",
    "heads": "Mamba heads",
    "head_dim": "Mamba head channels",
    "query_heads": "query heads",
    "kv_heads": "KV heads",
    "hidden": "hidden size",
}


def removed_words(point: Mapping[str, int]) -> str:
    """`2 Mamba-2, 1 FFN`; `layers 3, 8` where layers go freely; or `no layer`."""
    parts = []
    for name, number in point.items():
        stem, _, kind = name.partition(".")
        if stem == "removed" and number:
            parts.append(f"{number} {KIND_NAMES.get(kind, kind)}")
    single = [name.partition(".")[2] for name, gone in point.items() if name.startswith("layer.")]
    gone = [layer for layer in single if point[f"layer.{layer}"]]
    if gone:
        parts.append(f"layer{'s' if len(gone) > 1 else ''} {', '.join(gone)}")
    return ", ".join(parts) or "no layer"


def size_words(point: Mapping[str, int]) -> str:
    """`FFN width 448, Mamba heads 12`; `FFN width 192 to 448` where layers differ."""
    sizes: dict[str, list[int]] = {}
    for name, size in point.items():
        axis = name.partition(".")[0]
        if axis not in ("removed", "layer"):
            sizes.setdefault(axis, []).append(size)
    return ", ".join(f"{AXIS_NAMES.get(axis, axis)} {_range(s)}" for axis, s in sizes.items())


def _range(sizes: Sequence[int]) -> str:
    least, most = min(sizes), max(sizes)
    return str(most) if least == most else f"{least} to {most}"


def point_words(point: Mapping[str, int]) -> str:
    """What is removed and what is narrowed."""
    return "; ".join(filter(None, [f"without {removed_words(point)}", size_words(point)]))


def trial_words(trial: Record) -> str:
    """A candidate with its costs and its KL."""
    parts = [f"candidate {trial['number']}", point_words(trial.get("point", {}))]
    if trial.get("latency"):
        parts.append(f"{1000 * trial['latency']:.3g} ms a step")
    parts.append(f"{format_bytes(trial['memory_bytes'])}, KL {trial['kl']:.4f}")
    if trial.get("screened"):
        parts.append("given up after few sequences")
    return "; ".join(parts)


def stations(record: Record) -> list[tuple[str, float]]:
    """Where a finalist came by, and its KL there: cut, repaired, after every rung."""
    found = [(name, record.get(name, {}).get("kl")) for name in ("cut", "repaired")]
    found += [(f"step {rung['steps']}", rung["kl"]) for rung in record.get("rungs", ())]
    return [(name, kl) for name, kl in found if kl is not None and math.isfinite(kl) and kl > 0]


def tournament_words(finalists: Sequence[Record]) -> str:
    """How they played, and where the first choice before healing ended; "" if nobody did."""
    played = [record for record in finalists if record.get("rungs")]
    if not played:
        return ""
    rungs = max((record["rungs"] for record in played), key=len)
    steps = _listed(
        [f"step {rung['steps']} ({_players(played, i)})" for i, rung in enumerate(rungs)]
    )
    tasks = sorted({name for record in played for name in record.get("tasks", {})})
    last = (
        f"The last were ranked by their accuracy on {len(tasks)} tasks."
        if tasks
        else ("They were ranked by their divergence from the teacher.")
    )
    text = f"The {len(played)} finalists were cut, repaired and distilled up to {steps}. {last}"
    first = [i for i, record in enumerate(finalists) if record.get("ranks", {}).get("proxy") == 1]
    if not first:
        return text
    number = finalists[first[0]]["number"]
    if first[0] == 0:
        return f"{text} The first before healing, #{number}, stayed the first."
    return f"{text} The first before healing, #{number}, came in as number {first[0] + 1}."


def _players(played: Sequence[Record], rung: int) -> str:
    number = sum(len(record["rungs"]) > rung for record in played)
    return "all" if number == len(played) else f"{number} of them"


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
