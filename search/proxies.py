"""What a candidate is worth before any healing, measured in the teacher without building it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from minipuzzle.model import Model
from minipuzzle.selection import Selection
from minipuzzle.walk import Walk, chunks


@dataclass(frozen=True)
class Proxies:
    """Means over the search text.

    `kl`: forward KL(teacher || candidate) in nats per token; `accuracy`: share of next tokens that
    the candidate's first choice names; `agreement`: share of positions where teacher and candidate
    have the same first choice (MiniPuzzle ranks by the last two: arXiv 2504.03624, section 3.3).
    """

    kl: float
    accuracy: float
    agreement: float


class ProxyEvaluator:
    """Evaluates selections of one teacher on fixed ids (B, T)."""

    def __init__(self, teacher: Model, ids: torch.Tensor) -> None:
        self.walk = Walk(teacher)
        self.parts = list(chunks(ids))
        with torch.no_grad():
            self.reference = [self.walk.states(part) for part in self.parts]

    @torch.no_grad()
    def __call__(self, selection: Selection) -> Proxies:
        """The proxies of a candidate."""
        sums = torch.zeros(3, dtype=torch.float64)
        for part, reference in zip(self.parts, self.reference, strict=True):
            state = self.walk.states(part, selection)
            for ids, ours, theirs in zip(part, state, reference, strict=True):
                sums += self._sums(ids, ours, theirs)
        self.walk.forget()
        positions = sum(part.numel() for part in self.parts)
        sequences = sum(len(part) for part in self.parts)
        kl, right, same = sums.tolist()
        return Proxies(kl / positions, right / (positions - sequences), same / positions)

    def _sums(self, ids: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        """KL, right next tokens and agreeing positions of one sequence: ids (T,), states (T, D)."""
        candidate = F.log_softmax(self.walk.logits(ours), dim=-1)
        teacher = F.log_softmax(self.walk.logits(theirs), dim=-1)
        first = candidate.argmax(-1)
        kl = F.kl_div(candidate, teacher, reduction="sum", log_target=True)
        right = (first[:-1] == ids[1:]).sum()
        same = (first == teacher.argmax(-1)).sum()
        return torch.stack([kl.double(), right.double(), same.double()]).cpu()
