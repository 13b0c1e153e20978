"""Cuts of ours for compare_pruners.py: plans, the selections they make, and the models left.

A stock Llama has one width for all its FFN layers and no checkpoint holds another; models with a
width per layer are therefore made in memory here, like those of Torch-Pruning's global ranking.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peer_pruners import attentions
from torch import nn

from minipuzzle.architecture import Architecture
from minipuzzle.families import parameter_count
from minipuzzle.model import Model, clone, load
from minipuzzle.prune.constraints import SLICEABLE
from minipuzzle.prune.prices import widths_by_price
from minipuzzle.prune.select import select
from minipuzzle.prune.slice import slice_checkpoint
from minipuzzle.prune.widths import share_widths
from minipuzzle.scores import Scores
from minipuzzle.selection import Selection
from minipuzzle.slicing import plan_tensors, take


def sliced(teacher: Model, selection: Selection) -> Model:
    """The model that a selection leaves, by way of a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        slice_checkpoint(teacher.folder, Path(folder) / "cut", selection)
        return load(Path(folder) / "cut", device=str(teacher.device))


def narrowed(teacher: Model, selection: Selection) -> Model:
    """The model that a selection of units leaves, in memory: layers may differ in width."""
    left = clone(teacher)
    module: Any = left.module
    for _, old, index in plan_tensors(teacher.family, teacher.architecture, selection):
        name = teacher.family.memory_name(old.name)
        holder, _, attribute = name.rpartition(".")
        tensor = take(teacher.parameter(old.name).detach(), index)
        parameter = nn.Parameter(tensor.clone(), requires_grad=False)
        setattr(module.get_submodule(holder), attribute, parameter)
    for attention in attentions(module):
        queries, keys = len(attention.q_proj.weight), len(attention.k_proj.weight)
        attention.num_key_value_groups = queries // keys
    return replace(left, architecture=selection.apply(teacher.architecture))


def uniform(module: Any) -> bool:
    """Whether a Llama's FFN layers have one width, without which no stock class loads it."""
    return len({len(block.mlp.gate_proj.weight) for block in module.model.layers}) == 1


def selection_of(teacher: Model, module: nn.Module) -> Selection:
    """What a pruned Llama has kept, by the rows of its projections; the stream is whole."""
    layers: list[dict[str, tuple[int, ...]]] = []
    old: Any = teacher.module
    new: Any = module
    for before, after, attention in zip(
        old.model.layers, new.model.layers, attentions(old), strict=True
    ):
        dim = attention.head_dim
        rows = kept_rows(before.self_attn.q_proj.weight, after.self_attn.q_proj.weight)
        layers.append({"query_heads": tuple(sorted({row // dim for row in rows}))})
        width = kept_rows(before.mlp.gate_proj.weight, after.mlp.gate_proj.weight)
        layers.append({"width": tuple(width)})
    return Selection(tuple(layers))


def kept_rows(before: torch.Tensor, after: torch.Tensor) -> list[int]:
    """Positions in `before` of the rows of `after`, which are some of them in order."""
    rows = torch.cdist(after.double(), before.double()).argmin(1).tolist()
    assert rows == sorted(set(rows)), "rows were kept in order and once"
    assert torch.equal(before[rows], after), "rows were kept as they are"
    return rows


def without(
    architecture: Architecture, units: Sequence[Sequence[int]], gone: Sequence[int]
) -> Selection:
    """Everything but some blocks."""
    out = {i for block in gone for i in units[block]}
    return Selection(tuple(None if i in out else {} for i in range(len(architecture.layers))))


PRICES = "prices"
FLOOR = 1  # channels that every layer keeps
Prices = Mapping[int, torch.Tensor]


@dataclass(frozen=True)
class Plan:
    """What of ours is cut beside FFN channels, which make up the rest.

    `metric`: of the channels. `widths`: (metric of channels, of layers or None) by which the layers
    share the channels, or (PRICES, None): by what each channel costs the loss; None: the same
    number each.
    """

    metric: str = "surgeon"
    widths: tuple[str, str | None] | None = None
    query_heads: int | None = None
    kv_heads: int | None = None
    blocks: int = 0


def plans(architecture: Architecture) -> Iterator[Plan]:
    """Channels by each score; by the best known with own widths, or with more than channels."""
    yield from (Plan(metric) for metric in ("surgeon", "energy", "flap"))
    yield from (Plan(widths=("flap", layers)) for layers in (None, "hidden_mse", "kl"))
    yield Plan(widths=("energy", "kl"))
    yield Plan(widths=(PRICES, None))
    attention = architecture.layers[architecture.indices("attention")[0]]
    queries, keys = (getattr(attention, axis) for axis in ("query_heads", "kv_heads"))
    if queries > keys:
        yield Plan(query_heads=max(keys, queries // 2 // keys * keys))
    if keys > 1:
        yield Plan(kv_heads=keys // 2)
    yield from (Plan(blocks=number) for number in (1, 2))


def selection_by(
    teacher: Model, scores: Scores, prices: Prices, plan: Plan, share: float
) -> Selection | None:
    """The plan's selection nearest to `share` of the parameters; None if it cannot be had."""
    architecture, family = teacher.architecture, teacher.family
    ffns = architecture.indices("ffn")

    def of_total(channels: int) -> Selection:
        """With so many channels in all FFN layers (of whole layers, rounded down)."""
        return select(
            scores,
            architecture,
            removed=plan.blocks,
            sizes=heads_of(plan)
            | {"width": widths_of(architecture, scores, prices, plan, channels)},
            metrics={"width": plan.metric},
            units=family.removable(architecture),
            constraints=SLICEABLE,
        )

    def parameters(channels: int) -> int:
        return parameter_count(of_total(channels).apply(architecture), family)

    wanted = (1 - share) * parameter_count(architecture, family)
    step = 1 if plan.widths else len(ffns)
    low, high = len(ffns) // step, sum(vars(architecture.layers[i])["width"] for i in ffns) // step
    if not parameters(low * step) <= wanted <= parameters(high * step):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if parameters(middle * step) <= wanted else (low, middle)
    nearest = min((low, high), key=lambda n: abs(parameters(n * step) - wanted))
    return of_total(nearest * step)


def heads_of(plan: Plan) -> dict[str, int]:
    """The sizes of the axes of heads that a plan cuts."""
    sizes = {"query_heads": plan.query_heads, "kv_heads": plan.kv_heads}
    return {axis: size for axis, size in sizes.items() if size is not None}


def widths_of(
    architecture: Architecture, scores: Scores, prices: Prices, plan: Plan, channels: int
) -> int | dict[int, int]:
    """The width of all FFN layers, or of each, of so many channels in all."""
    if plan.widths is None:
        return channels // len(architecture.indices("ffn"))
    metric, layer_metric = plan.widths
    if metric == PRICES:
        return widths_by_price(prices, channels, floor=FLOOR)
    return share_widths(
        scores,
        architecture,
        channels,
        metric=metric,
        layer_metric=layer_metric,
        constraints=SLICEABLE,
    )
