"""The finalists of a search: a strip of layers and a row of the table for each, best first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from minipuzzle.architecture import PATTERN_LETTERS
from minipuzzle.units import format_bytes

from .gather import Findings
from .words import KIND_NAMES, removed_words, size_words, stations

Record = Mapping[str, Any]
LETTERS_UP_TO = 40  # layers: in longer strips a letter has no room


def strips(findings: Findings, layers: Sequence[Record]) -> list[dict[str, Any]]:
    """Per finalist its number and one cell per layer of the teacher.

    Args:
        findings: the records of the run.
        layers: the cells of the teacher's own strip (`view.layers`): kind, letter, importance.
    """
    found = []
    for record in findings.finalists:
        kept = record.get("layers", ())
        if not layers or len(kept) != len(layers):
            continue
        cells = [_cell(findings, cell, sizes) for cell, sizes in zip(layers, kept, strict=True)]
        found.append({**_name(findings, record), "cells": cells})
    return found


def _cell(findings: Findings, layer: Record, sizes: Mapping[str, int] | None) -> dict[str, Any]:
    assert findings.teacher is not None
    whole = vars(findings.teacher.layers[layer["index"]])
    shares = {axis: size / whole[axis] for axis, size in (sizes or {}).items() if axis in whole}
    title = [f"layer {layer['index']}", KIND_NAMES[layer["kind"]]]
    title += ["removed"] if sizes is None else []
    title += [
        f"{axis.replace('_', ' ')} {whole[axis]} to {size}"
        for axis, size in (sizes or {}).items()
        if axis in whole and size < whole[axis]
    ]
    return {
        "rank": layer["rank"],
        "kept": sizes is not None,
        "share": min(shares.values(), default=1.0),
        "letter": PATTERN_LETTERS[layer["kind"]]
        if len(findings.teacher.layers) <= LETTERS_UP_TO
        else "",
        "title": ", ".join(title),
    }


def rows(findings: Findings) -> list[dict[str, str]]:
    """The finalists as text, best first: what they are, KL on the way, accuracy."""
    return [
        {
            **_name(findings, record),
            "removed": removed_words(record.get("point", {})),
            "sizes": size_words(record.get("point", {})),
            "memory": format_bytes(record["memory_bytes"]),
            **_course(record),
            "accuracy": _accuracy(record),
        }
        for record in findings.finalists
    ]


def _course(record: Record) -> dict[str, str]:
    """KL after cut, repair and the last rung that was played, and how far that was."""
    known = {name: f"{kl:.4f}" for name, kl in stations(record)}
    rungs = record.get("rungs", ())
    last = f"step {rungs[-1]['steps']}" if rungs else ""
    return {
        "cut": known.get("cut", ""),
        "repaired": known.get("repaired", ""),
        "distilled": known.get(last, ""),
        "steps": last,
    }


def _name(findings: Findings, record: Record) -> dict[str, str]:
    chosen = record["number"] == findings.best.get("number")
    return {"number": f"#{record['number']}", "css": "chosen" if chosen else ""}


def _accuracy(record: Record) -> str:
    tasks: Mapping[str, float] = record.get("tasks", {})
    return f"{100 * fmean(tasks.values()):.1f} %" if tasks else ""
