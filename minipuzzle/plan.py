"""`minipuzzle plan`: what a deployment needs, and what a budget leaves to remove.

Needs only a config.json: no weights, no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from minipuzzle.architecture import Architecture, FFNLayer, Kind, Layer
from minipuzzle.errors import UserError
from minipuzzle.families import Family, parameter_count
from minipuzzle.memory import Deployment, Memory, memory
from minipuzzle.units import format_bytes, format_count, format_tokens, parse_budget

MIN_WIDTH_FRACTION = 0.25
SERVED_WIDTH_STEP = 256  # K-quants and fp8 kernels want rows in multiples of 256


@dataclass(frozen=True)
class Step:
    """One way to reach the budget alone: what is removed and what remains."""

    action: str
    total: int


@dataclass(frozen=True)
class Plan:
    """A model at a deployment, and the budget's demands."""

    model: str
    architecture: Architecture
    parameters: int
    deployment: Deployment
    memory: Memory
    budget_bytes: int | None
    steps: tuple[Step, ...]

    @property
    def to_remove(self) -> int:
        """Bytes above the budget, zero when the model fits or no budget is given."""
        return 0 if self.budget_bytes is None else max(0, self.memory.total - self.budget_bytes)

    def to_json(self) -> dict[str, Any]:
        """Everything that `render` prints, for machines."""
        return {
            "schema_version": 1,
            "model": self.model,
            "parameters": self.parameters,
            "layers": self.architecture.counts(),
            "pattern": self.architecture.pattern,
            "hidden": self.architecture.hidden,
            "vocabulary": self.architecture.vocabulary,
            "deployment": asdict(self.deployment),
            "memory_bytes": self.memory.to_json(),
            "budget_bytes": self.budget_bytes,
            "to_remove_bytes": self.to_remove,
            "single_steps": [asdict(step) for step in self.steps],
        }


def plan(
    model: str,
    *,
    revision: str | None = None,
    budget: str | None = None,
    deployment: Deployment | None = None,
) -> Plan:
    """Plan a model folder (or hub id) for a deployment.

    Raises:
        UserError: for a strange model, and for a budget below the smallest reachable size.
    """
    from minipuzzle.source import resolve_config

    deployment = deployment or Deployment()
    family, architecture = resolve_config(model, revision)
    need = memory(architecture, family, deployment)
    limit = None if budget is None else parse_budget(budget).of(need.total)
    steps: tuple[Step, ...] = ()
    if limit is not None and need.total > limit:
        require_reachable(architecture, family, deployment, limit)
        steps = tuple(_single_steps(architecture, family, deployment, limit))
    return Plan(
        model=model,
        architecture=architecture,
        parameters=parameter_count(architecture, family),
        deployment=deployment,
        memory=need,
        budget_bytes=limit,
        steps=steps,
    )


def width_step(width: int) -> int:
    """Step of FFN widths: 256 on real sizes, 16 on small ones."""
    return SERVED_WIDTH_STEP if width >= 16 * SERVED_WIDTH_STEP else 16


def with_width(architecture: Architecture, width: int) -> Architecture:
    """Every FFN layer wider than `width` narrowed to it."""
    layers = tuple(
        replace(layer, width=width)
        if isinstance(layer, FFNLayer) and layer.width > width
        else layer
        for layer in architecture.layers
    )
    return replace(architecture, layers=layers)


def without(architecture: Architecture, kind: Kind, number: int) -> Architecture:
    """The architecture with its last `number` layers of a kind left out."""
    gone = set(architecture.indices(kind)[-number:]) if number else set()
    layers = tuple(layer for i, layer in enumerate(architecture.layers) if i not in gone)
    return replace(architecture, layers=layers)


def smallest(architecture: Architecture) -> Architecture:
    """One layer of each kind, FFN at the narrowest width: the least that cuts can reach."""
    layers: dict[Kind, Layer] = {layer.kind: layer for layer in architecture.layers}
    one_each = replace(architecture, layers=tuple(layers.values()))
    return with_width(one_each, narrowest(architecture))


def narrowest(architecture: Architecture) -> int:
    """The narrowest FFN width: a quarter of the widest layer's, in whole steps."""
    width = max((x.width for x in architecture.layers if isinstance(x, FFNLayer)), default=0)
    step = width_step(width)
    return max(step, int(width * MIN_WIDTH_FRACTION) // step * step)


def require_reachable(
    architecture: Architecture, family: Family, deployment: Deployment, limit: int
) -> None:
    """UserError when even the smallest reachable architecture is above the budget."""
    least = memory(smallest(architecture), family, deployment)
    if least.total <= limit:
        return
    items = {name: size for name, size in least.to_json().items() if name != "total"}
    binding = max(items, key=lambda name: items[name])
    raise UserError(
        f"the budget of {format_bytes(limit)} cannot be reached: one layer of each kind with the "
        f"narrowest FFN still needs {format_bytes(least.total)}, and {binding} binds with "
        f"{format_bytes(items[binding])}; raise the budget or lower that item"
    )


def _single_steps(
    architecture: Architecture, family: Family, deployment: Deployment, limit: int
) -> Iterator[Step]:
    """For each lever alone, the least use of it that meets the budget, or its full use."""

    def total(cut: Architecture) -> int:
        return memory(cut, family, deployment).total

    widest = max((x.width for x in architecture.layers if isinstance(x, FFNLayer)), default=0)
    if widest:
        step, least = width_step(widest), narrowest(architecture)
        widths = range(widest // step * step, least - 1, -step)
        width = next((w for w in widths if total(with_width(architecture, w)) <= limit), least)
        yield Step(f"FFN width {widest} -> {width}", total(with_width(architecture, width)))
    for kind, number in architecture.counts().items():
        if number > 1:
            fits = (n for n in range(1, number) if total(without(architecture, kind, n)) <= limit)
            gone = next(fits, number - 1)
            yield Step(
                f"{gone} of {number} {kind} layers", total(without(architecture, kind, gone))
            )


ITEMS = ("weights", "embeddings", "kv_cache", "ssm_state", "conv_state", "reserve", "total")


def render(plan: Plan) -> str:
    """The plan as text of at most 80 columns."""
    a, d = plan.architecture, plan.deployment
    counts = ", ".join(f"{number} {kind}" for kind, number in a.counts().items())
    lines = [
        f"{plan.model}",
        f"  {format_count(plan.parameters)} parameters ({plan.parameters:,})",
        f"  {len(a.layers)} layers: {counts}; hidden {a.hidden}, vocabulary {a.vocabulary}",
        *(f"  {line}" for line in _shapes(a)),
        f"Memory at {format_tokens(d.context)} tokens of context, batch {d.batch}",
    ]
    precisions = {
        "weights": d.weights,
        "embeddings": d.embeddings,
        "kv_cache": d.kv,
        "ssm_state": d.state,
        "conv_state": d.conv,
    }
    for item in ITEMS:
        size = plan.memory.to_json()[item]
        lines.append(
            f"  {item:<11}{precisions.get(item) or '':<6}{format_bytes(size):>12}"
            f"{size / max(1, plan.memory.total):>8.1%}"
        )
    if plan.budget_bytes is not None:
        lines += _budget_lines(plan, plan.budget_bytes)
    return "\n".join(lines)


def _budget_lines(plan: Plan, limit: int) -> list[str]:
    if plan.memory.total <= limit:
        room = format_bytes(limit - plan.memory.total)
        return [f"Budget {format_bytes(limit)}: fits, {room} to spare"]
    share = plan.to_remove / plan.memory.total
    lines = [
        f"Budget {format_bytes(limit)}: {format_bytes(plan.to_remove)} ({share:.1%}) to remove",
        "  any of these alone leaves:",
    ]
    for step in plan.steps:
        verdict = "fits" if step.total <= limit else "not enough alone"
        lines.append(f"    {step.action:<34}{format_bytes(step.total):>12}  {verdict}")
    return lines


def _shapes(architecture: Architecture) -> list[str]:
    shapes = []
    for kind in architecture.counts():
        for layer in dict.fromkeys(x for x in architecture.layers if x.kind == kind):
            values = ", ".join(f"{name} {value}" for name, value in vars(layer).items())
            shapes.append(f"{kind}: {values}")
    return shapes
