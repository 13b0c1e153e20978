"""Distillation loss from final hidden states: KL over the whole vocabulary, a few tokens at a time.

Letters: N tokens, D the student's hidden size, E the teacher's, V vocabulary, C tokens of a chunk.

With teacher log-probabilities t = log_softmax(z_t / T) and student s = log_softmax(z_s / T),
p = exp(t), q = exp(s):

    KL(teacher || student) = sum_v p_v (t_v - s_v)        d KL / d z_s = (q - p) / T

so the gradient of a chunk is at hand the moment its loss is, and the (C, V) logits are dropped
before the next chunk is made. Whole (N, V) logits never exist, forward or backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

# Fastest on two CPU cores at vocabulary 4096 (scripts/bench_distill.py): 8 MiB of fp32 logits.
DEFAULT_CHUNK = 512


def forward_kl(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    temperature: float = 1.0,
    chunk: int = DEFAULT_CHUNK,
    mask: Tensor | None = None,
) -> Tensor:
    """Forward KL divergence KL(teacher || student), the teacher's distribution being the weight.

    Both distributions are softened by `temperature`; the result is multiplied by temperature**2,
    so that gradients keep their size when it changes (Hinton et al. 2015, arXiv:1503.02531, §2).
    The sum runs over the vocabulary, the mean over tokens: the N rows where `mask` is true (all
    without a mask). Nats. Gradients reach `student_hidden` and `student_head` only; they are
    computed in the same sweep as the value and exist once, in the sizes of their inputs.

    Args:
        student_hidden: (N, D), the input of the student's head.
        student_head: (V, D), its weight; may be tied to an embedding.
        teacher_hidden: (N, E).
        teacher_head: (V, E).
        temperature: T > 0.
        chunk: tokens whose logits exist at a time.
        mask: (N,) bool, true where a token counts.

    Returns:
        A scalar in at least fp32 (softmax and sums run in fp32, or fp64 for fp64 inputs).

    Raises:
        ValueError: shapes disagree, temperature or chunk is not positive, or no token counts.
    """
    _check(student_hidden, student_head, teacher_hidden, teacher_head, temperature, chunk, mask)
    if mask is not None and not bool(mask.all()):
        student_hidden, teacher_hidden = student_hidden[mask], teacher_hidden[mask]
    apply = cast(Callable[..., Tensor], _ForwardKL.apply)
    return apply(
        student_hidden,
        student_head,
        teacher_hidden.detach(),
        teacher_head.detach(),
        temperature,
        chunk,
    )


def reference_forward_kl(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Same value as `forward_kl`, written down plainly with whole logits: for tests."""
    student = F.log_softmax(student_hidden @ student_head.T / temperature, dim=-1)
    teacher = F.log_softmax(teacher_hidden @ teacher_head.T / temperature, dim=-1)
    per_token = (teacher.exp() * (teacher - student)).sum(-1)
    if mask is not None:
        per_token = per_token[mask]
    return temperature**2 * per_token.mean()


class _ForwardKL(torch.autograd.Function):
    """Value and gradients in one sweep; backward only scales what forward left."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_head: Tensor,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        temperature: float,
        chunk: int,
    ) -> Tensor:
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        tokens = student_hidden.shape[0]
        wide = torch.promote_types(student_hidden.dtype, torch.float32)
        # Every chunk of the hidden gradient is written before it is read; the head's is a sum.
        grad_hidden = torch.empty_like(student_hidden) if wants_hidden else None
        grad_head = torch.zeros_like(student_head, dtype=wide) if wants_head else None
        total = torch.zeros((), dtype=wide, device=student_hidden.device)
        for start in range(0, tokens, chunk):
            part = slice(start, start + chunk)
            teacher = _log_probs(teacher_hidden[part], teacher_head, temperature, wide)
            student = _log_probs(student_hidden[part], student_head, temperature, wide)
            weight = teacher.exp()
            total += torch.linalg.vecdot(weight, teacher.sub_(student)).sum()
            if grad_hidden is None and grad_head is None:
                continue
            # T^2 (loss) / T (softened logits) / N (mean), folded into one factor.
            slope = student.exp_().sub_(weight).mul_(temperature / tokens)
            slope = slope.to(student_head.dtype)
            if grad_hidden is not None:
                torch.mm(slope, student_head, out=grad_hidden[part])
            if grad_head is not None:
                _add_product(grad_head, slope.T, student_hidden[part])
        if grad_head is not None:
            grad_head = grad_head.to(student_head.dtype)
        ctx.save_for_backward(grad_hidden, grad_head)
        return total * (temperature**2 / tokens)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        grad_hidden, grad_head = ctx.saved_tensors
        scaled = [
            None if grad is None else grad * grad_output.to(grad.dtype)
            for grad in (grad_hidden, grad_head)
        ]
        return (*scaled, None, None, None, None)


def _log_probs(hidden: Tensor, head: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """(C, V) log-probabilities of the softened logits, in `dtype`."""
    logits = hidden @ head.T
    if temperature != 1.0:
        logits = logits.div_(temperature)
    return F.log_softmax(logits, dim=-1, dtype=dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left @ right to `total` in place; bf16 products are summed in fp32."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def _check(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    temperature: float,
    chunk: int,
    mask: Tensor | None,
) -> None:
    tokens = student_hidden.shape[0]
    if student_hidden.shape != (tokens, student_head.shape[1]):
        raise ValueError(
            f"student: hidden {tuple(student_hidden.shape)} does not fit head "
            f"{tuple(student_head.shape)}"
        )
    if teacher_hidden.shape != (tokens, teacher_head.shape[1]):
        raise ValueError(
            f"teacher: hidden {tuple(teacher_hidden.shape)} does not fit head "
            f"{tuple(teacher_head.shape)} and {tokens} tokens"
        )
    if student_head.shape[0] != teacher_head.shape[0]:
        raise ValueError(
            f"vocabularies differ: student {student_head.shape[0]}, teacher {teacher_head.shape[0]}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    if mask is not None and mask.shape != (tokens,):
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected ({tokens},)")
    if tokens == 0 or (mask is not None and not bool(mask.any())):
        raise ValueError("no token counts: the mean over tokens is undefined")
