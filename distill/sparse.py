"""Distillation loss from a few stored values a token instead of the teacher's hidden states.

Letters: N tokens, D the student's hidden size, V vocabulary, K stored values of a token, C tokens
of a chunk.

Both kinds of cache are a target y over the vocabulary, of sum 1, and the loss is the cross-entropy
against it, whose gradient with respect to the student's logits is q - y, q being the student's
probabilities. Logits of C tokens exist at a time, gradients are made in the same sweep.

- Sampled ids: y_v = (times v was drawn) / draws. The expectation of y is the teacher's p, so that
  of the gradient is q - p, the one of full KL (RS-KD, arXiv:2503.16870).
- Top-k with a residual: y_v = p_v for the k stored ids, and all other ids are one bucket of mass
  r = 1 - sum p_v, for which the student has u = 1 - sum q_v. Within the bucket the student is left
  alone: y_v = r q_v / u there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from .loss import DEFAULT_CHUNK


def sampled_cross_entropy(
    hidden: Tensor, head: Tensor, ids: Tensor, weights: Tensor, *, chunk: int = DEFAULT_CHUNK
) -> Tensor:
    """Mean over tokens of -sum_k weights_k log q(ids_k), q the student's softmax. Nats.

    With weights of draws from the teacher (counts / draws) this estimates KL(teacher || student)
    + the teacher's entropy without bias; the entropy is not known here and has no gradient.

    Args:
        hidden: (N, D), the input of the student's head.
        head: (V, D), its weight.
        ids: (N, K) int64; where there are fewer than K, filled up with any id and weight 0.
        weights: (N, K), each row of sum 1.
        chunk: tokens whose logits exist at a time.

    Returns:
        A scalar in at least fp32. Gradients reach `hidden` and `head`.

    Raises:
        ValueError: shapes disagree, chunk is not positive, or there are no tokens.
    """
    _check(hidden, head, ids, weights, chunk)
    return _apply(hidden, head, ids, weights, None, chunk)


def topk_kl(
    hidden: Tensor, head: Tensor, ids: Tensor, probabilities: Tensor, *, chunk: int = DEFAULT_CHUNK
) -> Tensor:
    """KL(teacher || student) over K + 1 buckets: each of `ids` and all others together.

    sum_k p_k log(p_k / q_k) + r log(r / u) with the rests r = 1 - sum p and u = 1 - sum q, mean
    over tokens, nats: a lower bound of the KL over the vocabulary, equal to it at K = V.

    Args:
        hidden: (N, D), the input of the student's head.
        head: (V, D), its weight.
        ids: (N, K) int64, distinct in a row.
        probabilities: (N, K), the teacher's; sums above 1 (rounding) are scaled back to 1.
        chunk: tokens whose logits exist at a time.

    Returns and raises like `sampled_cross_entropy`.
    """
    _check(hidden, head, ids, probabilities, chunk)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    probabilities, rest = _with_rest(probabilities.to(wide), head.shape[0])
    entropy = -torch.xlogy(probabilities, probabilities).sum() - torch.xlogy(rest, rest).sum()
    crossed = _apply(hidden, head, ids, probabilities, rest, chunk)
    return crossed - entropy / len(hidden)


def reference_sampled_cross_entropy(
    hidden: Tensor, head: Tensor, ids: Tensor, weights: Tensor
) -> Tensor:
    """Same value as `sampled_cross_entropy`, written down plainly with whole logits: for tests."""
    log_q = F.log_softmax(hidden @ head.T, dim=-1)
    return -(weights * log_q.gather(-1, ids)).sum(-1).mean()


def reference_topk_kl(hidden: Tensor, head: Tensor, ids: Tensor, probabilities: Tensor) -> Tensor:
    """Same value as `topk_kl` for K < V, written down plainly with whole logits: for tests."""
    q = F.softmax(hidden @ head.T, dim=-1).gather(-1, ids)
    rest, student_rest = 1 - probabilities.sum(-1), 1 - q.sum(-1)
    inside = (probabilities * (probabilities / q).log()).sum(-1)
    return (inside + rest * (rest / student_rest).log()).mean()


def _apply(
    hidden: Tensor, head: Tensor, ids: Tensor, weights: Tensor, rest: Tensor | None, chunk: int
) -> Tensor:
    apply = cast(Callable[..., Tensor], _SparseCrossEntropy.apply)
    return apply(hidden, head, ids, weights, rest, chunk)


class _SparseCrossEntropy(torch.autograd.Function):
    """Value and gradients in one sweep; backward only scales what forward left."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        ids: Tensor,
        weights: Tensor,
        rest: Tensor | None,
        chunk: int,
    ) -> Tensor:
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        tokens = len(hidden)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_head = torch.zeros_like(head, dtype=wide) if wants_head else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        for start in range(0, tokens, chunk):
            part = slice(start, start + chunk)
            log_q = F.log_softmax(hidden[part] @ head.T, dim=-1, dtype=wide)
            left = None if rest is None else rest[part]
            value, slope = _chunk(log_q, ids[part], weights[part].to(wide), left)
            total += value
            slope = slope.div_(tokens).to(head.dtype)
            if grad_hidden is not None:
                torch.mm(slope, head, out=grad_hidden[part])
            if grad_head is not None:
                grad_head += slope.T @ hidden[part]
        if grad_head is not None:
            grad_head = grad_head.to(head.dtype)
        ctx.save_for_backward(grad_hidden, grad_head)
        return total / tokens

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        scaled = [
            None if grad is None else grad * grad_output.to(grad.dtype)
            for grad in ctx.saved_tensors
        ]
        return (*scaled, None, None, None, None)


def _chunk(
    log_q: Tensor, ids: Tensor, weights: Tensor, rest: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(summed loss, (C, V) slope of the logits); overwrites `log_q` (C, V)."""
    value = -(weights * log_q.gather(-1, ids)).sum()
    if rest is None:
        return value, log_q.exp_().scatter_add_(-1, ids, -weights)
    # log u over what is left when the stored ids are taken out: 1 - sum q would cancel.
    outside = log_q.scatter(-1, ids, -math.inf)
    log_u = outside.logsumexp(-1)
    some = rest > 0
    value -= torch.where(some, rest * log_u, 0).sum()
    share = torch.where(some, rest, 0)[:, None] * outside.sub_(log_u[:, None]).exp_()
    share.nan_to_num_(0.0)  # no id is outside: -inf less -inf
    return value, log_q.exp_().scatter_add_(-1, ids, -weights).sub_(share)


def _with_rest(probabilities: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """((N, K), (N,)): probabilities and the mass outside, of sum 1 together."""
    sums = probabilities.sum(-1)
    if probabilities.shape[1] == vocabulary:
        return probabilities / sums[:, None], torch.zeros_like(sums)
    return probabilities / sums.clamp(min=1)[:, None], (1 - sums).clamp(min=0)


def _check(hidden: Tensor, head: Tensor, ids: Tensor, weights: Tensor, chunk: int) -> None:
    tokens = len(hidden)
    if hidden.shape != (tokens, head.shape[1]):
        raise ValueError(f"hidden {tuple(hidden.shape)} does not fit head {tuple(head.shape)}")
    if ids.shape != weights.shape or ids.dim() != 2 or len(ids) != tokens:
        raise ValueError(
            f"ids {tuple(ids.shape)} and weights {tuple(weights.shape)} must both be ({tokens}, K)"
        )
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    if tokens == 0:
        raise ValueError("no token counts: the mean over tokens is undefined")
