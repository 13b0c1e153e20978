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
        inputs, full = _states(walk, part, ())
        full_logits = walk.logits(full) if {"logit_mse", "kl"} & sums.keys() else full[..., :0]
        power += float(full_logits.double().square().sum())
        for u, layers in enumerate(units):
            if "cosine" in sums:
                before, after = inputs[layers[0]], inputs[layers[-1] + 1]
                cosine = F.cosine_similarity(before.double(), after.double(), dim=-1)
                sums["cosine"][u] += float((1 - cosine).sum())
            if sums.keys() == {"cosine"}:
                continue
            state = _states(walk, part, layers)[1]
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


def _states(
    walk: Walk, ids: torch.Tensor, without: Collection[int]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What enters every layer and leaves the last one, and the state before the head."""
    entered = [walk.embed(ids)]
    for i in range(walk.num_layers):
        entered.append(entered[-1] if i in without else walk.layer(i, entered[-1]))
    return entered, walk.final(entered[-1])
