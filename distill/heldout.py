"""How near a student is to its teacher on blocks neither was fitted to."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .history import Evaluation
from .loss import DEFAULT_CHUNK
from .teacher import Teacher, final_hidden, head_weight


@torch.no_grad()
def evaluate(
    student: nn.Module,
    teacher: Teacher,
    blocks: Tensor,
    *,
    step: int = 0,
    batch: int = 8,
    chunk: int = DEFAULT_CHUNK,
) -> Evaluation:
    """KL, agreement and next-token loss over `blocks` (B, T), which `teacher` is a teacher of.

    KL and agreement are means over all B x T positions; the loss is the mean over the B x (T - 1)
    positions whose next token is in the block. Nats, temperature 1. Logits of `chunk` tokens at a
    time; sums in fp64.
    """
    student.eval()
    head = head_weight(student)
    sums = torch.zeros(3, dtype=torch.float64)
    for rows in torch.split(torch.arange(len(blocks)), batch):
        ids = blocks[rows].to(head.device)
        # The last position of a block predicts nothing: its target is ignored.
        targets = F.pad(ids[:, 1:], (0, 1), value=-100).flatten()
        hidden = final_hidden(student, ids).flatten(0, 1)
        teacher_hidden = teacher.hidden(rows).flatten(0, 1)
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            sums += _sums(
                hidden[part], teacher_hidden[part], targets[part], head, teacher.head
            ).cpu()
    kl, agreeing, loss = sums.tolist()
    positions = blocks.numel()
    return Evaluation(
        step=step,
        kl=kl / positions,
        agreement=agreeing / positions,
        loss=loss / (positions - len(blocks)),
    )


def _sums(
    hidden: Tensor, teacher_hidden: Tensor, targets: Tensor, head: Tensor, teacher_head: Tensor
) -> Tensor:
    """(3,): KL, number of agreeing positions and next-token loss, summed over one chunk."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    student = F.log_softmax(hidden @ head.T, dim=-1, dtype=wide)
    teacher = F.log_softmax(teacher_hidden @ teacher_head.T, dim=-1, dtype=wide)
    agreeing = (student.argmax(-1) == teacher.argmax(-1)).sum()
    loss = F.nll_loss(student, targets, reduction="sum", ignore_index=-100)
    kl = torch.linalg.vecdot(teacher.exp(), teacher - student).sum(dtype=torch.float64)
    return torch.stack([kl, agreeing.double(), loss.double()])
