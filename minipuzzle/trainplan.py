"""`minipuzzle plan --train`: what a distillation needs in memory, and what fits in a card.

Needs only config.json files: no weights, no torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from minipuzzle.architecture import Architecture, FFNLayer
from minipuzzle.errors import UserError
from minipuzzle.families import Family, parameter_count
from minipuzzle.plan import narrowest, width_step, with_width
from minipuzzle.training_memory import Training, TrainingMemory, largest_micro, training_memory
from minipuzzle.units import format_bytes, format_count

ABOUT = {
    "student": "weights of the student",
    "gradients": "its gradients",
    "moments": "AdamW's two moments",
    "computed_copy": "bf16 copies of its weights",
    "teacher": "weights of the teacher",
    "unsharded": "gathered: blocks, embeddings",
    "activations": "kept for the backward pass",
    "loss_chunk": "loss: logits, gradients",
    "states": "the teacher's final states",
    "reserve": "kept free",
    "total": "total of a process",
}


@dataclass(frozen=True)
class TrainingPlan:
    """A teacher, its student, and what training needs on one process.

    `card` is the memory of a card in bytes, None where none was named; `largest` the largest
    micro-batch that fits in it; `ways` what would make room and the total then.
    """

    model: str
    teacher: int
    student: int
    training: Training
    memory: TrainingMemory
    checkpointed: TrainingMemory
    card: int | None
    largest: int
    largest_checkpointed: int
    ways: tuple[tuple[str, int], ...]

    def to_json(self) -> dict[str, Any]:
        """Everything that `render` prints, for machines."""
        return {
            "schema_version": 1,
            "model": self.model,
            "parameters": {"teacher": self.teacher, "student": self.student},
            "training": asdict(self.training),
            "memory_bytes": self.memory.to_json(),
            "checkpointed_memory_bytes": self.checkpointed.to_json(),
            "card_bytes": self.card,
            "largest_micro": self.largest,
            "largest_micro_checkpointed": self.largest_checkpointed,
            "ways": [{"change": change, "total": total} for change, total in self.ways],
        }


def plan_training(
    model: str,
    *,
    revision: str | None = None,
    student: str = "83%",
    card: tuple[int | None, int] = (None, 0),
    **fields: Any,
) -> TrainingPlan:
    """Plan the distillation of a model; `fields` are those of `Training`.

    Raises:
        UserError: a strange model, or a student that cannot be made or is of another family.
    """
    from minipuzzle.source import resolve_config

    family, teacher = resolve_config(model, revision)
    taught = _student(student, teacher, family)
    limit, reserve = card
    training = Training(reserve_bytes=reserve, **fields)
    again = replace(training, checkpointing=True)

    def fits(how: Training) -> int:
        return 0 if limit is None else largest_micro(taught, teacher, family, how, limit)

    need = training_memory(taught, teacher, family, training)
    changes = _changes(training) if limit is not None and need.total > limit else {}
    ways = {name: training_memory(taught, teacher, family, how) for name, how in changes.items()}
    return TrainingPlan(
        model=model,
        teacher=parameter_count(teacher, family),
        student=parameter_count(taught, family),
        training=training,
        memory=need,
        checkpointed=training_memory(taught, teacher, family, again),
        card=limit,
        largest=fits(training),
        largest_checkpointed=fits(again),
        ways=tuple((name, memory.total) for name, memory in ways.items()),
    )


def _changes(training: Training) -> dict[str, Training]:
    """What can be changed alone to need less."""
    ways = {
        "half the tokens of a sequence": replace(training, tokens=max(1, training.tokens // 2)),
        "gradient checkpointing": replace(training, checkpointing=True),
        f"{2 * training.processes} processes": replace(training, processes=2 * training.processes),
        f"{8 * training.processes} processes": replace(training, processes=8 * training.processes),
    }
    if training.micro > 1:
        ways["--micro 1"] = replace(training, micro=1)
    if not training.teacher_offload:
        ways["--teacher-offload"] = replace(training, teacher_offload=True)
    return ways


def _student(student: str, teacher: Architecture, family: Family) -> Architecture:
    """The architecture in a folder, or the teacher's with its FFN narrowed to a share."""
    from minipuzzle.source import resolve_config

    if not student.endswith("%") or Path(student).exists():
        found, architecture = resolve_config(student, None)
        if found is not family or architecture.vocabulary != teacher.vocabulary:
            raise UserError(f"{student} is of another family or vocabulary than the teacher")
        return architecture
    try:
        share = float(student[:-1]) / 100
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UserError(f"--student {student!r}: give a folder, or a share like 83%")
    whole, narrow = parameter_count(teacher, family), teacher
    widths = [layer.width for layer in teacher.layers if isinstance(layer, FFNLayer)]
    width, step = max(widths, default=0), width_step(max(widths, default=0))
    while parameter_count(narrow, family) > share * whole and width - step >= narrowest(teacher):
        width -= step
        narrow = with_width(teacher, width)
    left = parameter_count(narrow, family)
    if left > share * whole:  # what depth would do is close to what every layer narrower does
        raise UserError(
            f"--student {student}: with the narrowest FFN {left / whole:.0%} remain; "
            f"give the folder of a student"
        )
    return narrow


def render(plan: TrainingPlan) -> str:
    """The plan as text of at most 80 columns."""
    how, plain, again = plan.training, plan.memory.to_json(), plan.checkpointed.to_json()
    lines = [
        plan.model,
        f"  teacher {format_count(plan.teacher)}, student {format_count(plan.student)} parameters",
        f"Training on {how.processes} process(es), {how.micro} x {how.tokens} tokens at a time",
        f"  {'':<42}{'':>12}  checkpointed",
    ]
    for item, about in ABOUT.items():
        sizes = f"{format_bytes(plain[item]):>12}{format_bytes(again[item]):>14}"
        lines.append(f"  {item:<14}{about:<28}{sizes}")
    if plan.card is not None:
        lines += _card_lines(plan, plan.card)
    return "\n".join(lines)


def _card_lines(plan: TrainingPlan, card: int) -> list[str]:
    lines = [f"Card of {format_bytes(card)}"]
    for name, largest in (("", plan.largest), (" checkpointed", plan.largest_checkpointed)):
        told = f"--micro {largest} is the largest that fits" if largest else "not one fits"
        lines.append(f"  {'as it is' if not name else name.strip():<14}{told}")
    if plan.ways:
        lines.append("  any of these alone needs:")
    for change, total in plan.ways:
        verdict = "fits" if total <= card else "not enough alone"
        lines.append(f"    {change:<34}{format_bytes(total):>12}  {verdict}")
    return lines
