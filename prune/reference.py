"""Layer scores the plain way: one forward pass per removed layer. sweep.py is held against it."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch.nn import functional as F

from minipuzzle.metrics import LAYER_METRICS, LayerMetric
from minipuzzle.model import Model
from minipuzzle.walk import Walk, chunks


@torch.no_grad()
def layer_scores_reference(
    model: Model, ids: torch.Tensor, metrics: Collection[LayerMetric] = LAYER_METRICS
) -> dict[LayerMetric, torch.Tensor]:
    """What every removable unit of a resident model is worth on ids (B, T).

    Returns:
        metric -> (U,), fp64 on the CPU, one entry per unit of `family.removable`.
    """
    walk = Walk(model)
    units = model.family.removable(model.architecture)
    sums = {metric: torch.zeros(len(units), dtype=torch.float64) for metric in metrics}
    power = 0.0
    for part in chunks(ids, walk.tokens_per_chunk):
        if "cosine" in sums:
            sums["cosine"] += _block_influence(walk, part, units)
        if sums.keys() == {"cosine"}:
            continue
        full = _state(walk, part, ())
        full_logits = walk.logits(full) if {"logit_mse", "kl"} & sums.keys() else full[..., :0]
        power += float(full_logits.double().square().sum())
        for u, layers in enumerate(units):
            state = _state(walk, part, layers)
            if "hidden_mse" in sums:
                sums["hidden_mse"][u] += float((state.double() - full.double()).square().sum())
            if "logit_mse" in sums:
                error = walk.logits(state).double() - full_logits.double()
                sums["logit_mse"][u] += float(error.square().sum())
            if "kl" in sums:
                log_q = F.log_softmax(walk.logits(state).double(), dim=-1)
                log_p = F.log_softmax(full_logits.double(), dim=-1)
                sums["kl"][u] += float(F.kl_div(log_q, log_p, reduction="sum", log_target=True))
    tokens = ids.numel()
    whole = {"hidden_mse": tokens * model.architecture.hidden, "logit_mse": power}
    return {metric: values / whole.get(metric, tokens) for metric, values in sums.items()}


def _state(walk: Walk, ids: torch.Tensor, without: Collection[int]) -> torch.Tensor:
    """The state before the head of the model without these layers."""
    hidden = walk.embed(ids)
    for i in range(walk.num_layers):
        if i not in without:
            hidden = walk.layer(i, hidden)
    return walk.final(hidden)


def _block_influence(
    walk: Walk, ids: torch.Tensor, units: tuple[tuple[int, ...], ...]
) -> torch.Tensor:
    """1 - cos(what enters a unit, what leaves it), summed over the tokens: (U,)."""
    stream = [walk.embed(ids)]
    for i in range(walk.num_layers):
        stream.append(walk.layer(i, stream[-1]))
    ends = ((stream[layers[0]].double(), stream[layers[-1] + 1].double()) for layers in units)
    return torch.stack([(1 - F.cosine_similarity(a, b, dim=-1)).sum().cpu() for a, b in ends])
