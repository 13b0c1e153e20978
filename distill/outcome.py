"""What distill.json says: how near the student came, and how much of the gap it made up for."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from .best import best_of
from .history import Evaluation, History

SCHEMA_VERSION = 1


def gap_recovered(
    student: Evaluation, pruned: Evaluation, teacher: Evaluation
) -> dict[str, float | None]:
    """(student - pruned) / (teacher - pruned): 0 is the cut model, 1 the teacher itself.

    For KL (the teacher's is zero), agreement (one) and next-token loss; None where the cut model
    is the teacher's equal. Below 0 the student is worse than the cut model, above 1 better than
    the teacher.
    """
    gaps: dict[str, float | None] = {}
    for name in ("kl", "agreement", "loss"):
        ours, cut, goal = (getattr(e, name) for e in (student, pruned, teacher))
        gaps[name] = (ours - cut) / (goal - cut) if goal != cut else None
    return gaps


def outcome(
    history: History,
    *,
    start: str,
    tokens_per_step: int,
    held_out_tokens: int,
    pruned: Evaluation | None,
    teacher: Evaluation,
    range_test: dict[str, Any] | None,
) -> dict[str, Any]:
    """The content of distill.json.

    Args:
        history: of the training, with an evaluation of the start at least.
        start: name of the artefact that was trained.
        tokens_per_step: tokens of a batch.
        held_out_tokens: tokens that measures are means over.
        pruned: the cut model on the same text; None where there is none to compare with.
        teacher: the teacher on the same text.
        range_test: the record of the rate's choice, None for a rate that was given.
    """
    steps = history.evaluations[-1].step
    return {
        "schema_version": SCHEMA_VERSION,
        "start": start,
        "steps": steps,
        "tokens": steps * tokens_per_step,
        "held_out_tokens": held_out_tokens,
        "before": asdict(history.evaluations[0]),
        "after": asdict(best_of(history)),
        "last": asdict(history.evaluations[-1]),
        "pruned": None if pruned is None else asdict(pruned),
        "teacher": asdict(teacher),
        "curve": [
            {
                **asdict(entry),
                "tokens": entry.step * tokens_per_step,
                "gap_recovered": pruned and gap_recovered(entry, pruned, teacher),
            }
            for entry in history.evaluations
        ],
        "range_test": range_test,
    }
