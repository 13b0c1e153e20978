"""One FFN width per layer: a total shared out to where channels are worth most."""

from __future__ import annotations

from collections.abc import Collection
from heapq import heapify, heappop, heappush
from math import inf

import torch

from minipuzzle.architecture import Architecture, FFNLayer
from minipuzzle.errors import UserError
from minipuzzle.scores import Scores

from .constraints import SERVING, Constraints, nearest

COMPARABLE = ("activation", "flap", "energy")  # `surgeon` is a place in each layer's own order


def share_widths(
    scores: Scores,
    architecture: Architecture,
    total: int,
    *,
    removed: Collection[int] = (),
    metric: str = "energy",
    layer_metric: str | None = None,
    floor: int = 1,
    constraints: Constraints | None = SERVING,
) -> dict[int, int]:
    """FFN widths that add up to `total`, for `select(sizes={"width": ...})`.

    Every layer gets the floor; then blocks of one step go to the layer whose next best channels
    are worth most, until the total is used up. (Channels in falling order give blocks of falling
    worth, so that greedy is best.) Worth is the square of the score: that of an energy is what the
    layer's output loses.

    Args:
        scores: of the uncut model.
        architecture: of the uncut model.
        total: sum of the widths; the result is less by under one step where steps do not meet it.
        removed: layers that get none.
        metric: of the channels.
        layer_metric: if given, a layer's channels together are worth what the layer is worth by
            this metric, instead of their own sum.
        floor: least width of a layer; it is rounded up to a step.
        constraints: their multiple is the step; None: one channel.

    Raises:
        UserError: for a total out of reach (the message names the nearest), and for scores that
            were not measured or cannot be compared between layers.
    """
    scores.check(architecture)
    if metric not in COMPARABLE:
        raise UserError(
            f"{metric} does not compare channels of different layers; "
            f"choose one of {', '.join(COMPARABLE)}"
        )
    sizes = {
        i: layer.width
        for i, layer in enumerate(architecture.layers)
        if isinstance(layer, FFNLayer) and i not in removed
    }
    steps = {i: _steps(size, floor, constraints) for i, size in sizes.items()}
    least, most = sum(s[0] for s in steps.values()), sum(sizes.values())
    if not least <= total <= most:
        raise UserError(
            f"{len(sizes)} FFN layers cannot have {total} channels together: from {least} to "
            f"{most} can be shared out; {nearest(total, (least, most))}"
        )
    blocks = {
        i: _blocks(_worth(scores, i, metric, layer_metric), allowed) for i, allowed in steps.items()
    }
    queue = [(own[0], i, 0) for i, own in blocks.items()]
    heapify(queue)
    widths, left = dict.fromkeys(steps, 0), total
    while queue:
        (_, width), i, place = heappop(queue)
        if width - widths[i] <= left:
            left -= width - widths[i]
            widths[i] = width
            if place + 1 < len(blocks[i]):
                heappush(queue, (blocks[i][place + 1], i, place + 1))
    return widths


def _steps(size: int, floor: int, constraints: Constraints | None) -> tuple[int, ...]:
    """Allowed widths of a layer from the floor up."""
    allowed = tuple(range(1, size + 1))
    if constraints is not None:
        allowed = constraints.allowed("width", size)
    return tuple(width for width in allowed if width >= min(floor, size))


def _worth(scores: Scores, i: int, metric: str, layer_metric: str | None) -> torch.Tensor:
    """Summed worth of layer i's best 0, 1, 2, ... channels: (width + 1,), fp64."""
    if (i, "width", metric) not in scores.units:
        raise UserError(
            f"`width` of layer {i} was not scored by {metric}; add it to score.unit_metrics and "
            "run `minipuzzle score` again"
        )
    values = scores.units[i, "width", metric].double().square().sort(descending=True).values
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), values.cumsum(0)])
    if layer_metric is None:
        return sums
    whole = float(scores.layer_metric(layer_metric)[i])
    return sums * whole / sums[-1].clamp_min(torch.finfo(torch.float64).tiny)


def _blocks(worth: torch.Tensor, steps: tuple[int, ...]) -> list[tuple[float, int]]:
    """(minus its worth per channel, width with it) of each step; the first one always comes."""
    ends = worth[list(steps)]
    gains = (ends[1:] - ends[:-1]) / torch.tensor(steps).diff()
    return [(-inf, steps[0]), *zip((-gains).tolist(), steps[1:], strict=True)]
