"""What a channel is worth to the model's loss, so that layers compete for width.

Taking a channel away and re-fitting the others leaves an error e in the stream (surgeon.py says how
much, channel after channel). To second order the loss rises by half of e^T G e, with G the second
moments of the loss's gradient in the stream after that layer (the empirical Fisher matrix: Amari,
1998; for whole layers' outputs: K-FAC, arXiv 1503.05671). Seen through G, prices of channels of
different layers compare, and the cheapest of all go first.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch.nn import functional as F

from minipuzzle.model import Model
from minipuzzle.streams import Stream
from minipuzzle.walk import Walk, chunks

from .moments import Moments
from .refit import capturing, matrices, module_of
from .surgeon import surgeon_order

GRADIENT_TOKENS = 1024  # a backward pass at once: all layers' activations are kept


def loss_metrics(model: Model, ids: torch.Tensor) -> list[torch.Tensor]:
    """G after every layer: (D, D) each, fp64, from the next-token loss on ids (B, T).

    One backward pass; the model must be resident.
    """
    assert model.store is None, "a backward pass needs every layer"
    walk, hidden_size = Walk(model), model.architecture.hidden
    sums = [Moments(hidden_size, 0, walk.device) for _ in range(walk.num_layers)]
    for part in chunks(ids, GRADIENT_TOKENS):
        for total, gradient in zip(sums, _gradients(walk, part), strict=True):
            flat = gradient.flatten(0, 1)
            total.add(flat, flat[:, :0])
    return [total.gram / ids.numel() for total in sums]


def _gradients(walk: Walk, ids: torch.Tensor) -> list[torch.Tensor]:
    """The gradient of the summed loss on ids (B, T) in the stream after each layer: (B, T, D)."""
    states = []
    with torch.enable_grad():
        hidden = walk.embed(ids).detach().requires_grad_(True)
        for i in range(walk.num_layers):
            hidden = walk.layer(i, hidden)
            states.append(hidden)
        logits = walk.logits(walk.final(hidden))[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits, ids[:, 1:].flatten().to(logits.device), reduction="sum")
        return list(torch.autograd.grad(loss, states))


@torch.no_grad()
def channel_prices(
    model: Model, ids: torch.Tensor, metrics: list[torch.Tensor]
) -> dict[int, torch.Tensor]:
    """FFN layer -> price of each further channel in the order in which they go: (width,), fp64."""
    walk = Walk(model)
    stream = walk.stream(ids)
    prices = {}
    for i in walk.layers():
        if model.architecture.layers[i].kind == "ffn":
            moments = _read_by_writer(walk, i, stream) / ids.numel()
            weight = model.parameter(matrices(model, i, "writes")[0].name)
            _, prices[i] = surgeon_order(moments, _root(metrics[i]) @ weight.to(metrics[i]))
        else:
            stream.advance(partial(walk.layer, i))
    return prices


def _read_by_writer(walk: Walk, i: int, stream: Stream) -> torch.Tensor:
    """Take the stream through layer i; second moments of what its writer reads, (width, width)."""
    (spec,) = matrices(walk.model, i, "writes")
    moments = Moments(spec.shape[1], 0, walk.device)

    def through(hidden: torch.Tensor) -> torch.Tensor:
        with capturing(module_of(walk.model, spec)) as seen:
            output = walk.layer(i, hidden)
        for read in seen:
            flat = read.flatten(0, 1)
            moments.add(flat, flat[:, :0])
        return output

    stream.advance(through)
    return moments.gram


def _root(metric: torch.Tensor) -> torch.Tensor:
    """The symmetric square root of a positive matrix."""
    values, vectors = torch.linalg.eigh(metric)
    root: torch.Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return root


def widths_by_price(
    prices: Mapping[int, torch.Tensor], total: int, *, floor: int = 64
) -> dict[int, int]:
    """FFN widths that add up to `total`: the cheapest channels of all layers go.

    Args:
        prices: layer -> price of each further channel, in the order in which they go.
        total: sum of the widths that stay.
        floor: no layer is left narrower.
    """
    offers = []
    for i, costs in prices.items():
        rising = costs.cummax(0).values[: max(0, len(costs) - floor)]
        offers += [(float(price), i) for price in rising]
    widths = {i: len(costs) for i, costs in prices.items()}
    gone = sum(widths.values()) - total
    assert 0 <= gone <= len(offers), (total, floor)
    for _, i in sorted(offers)[:gone]:
        widths[i] -= 1
    return widths
