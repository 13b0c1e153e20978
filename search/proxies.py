"""What candidates are worth before any healing, measured in the teacher without building them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from minipuzzle.model import Model
from minipuzzle.selection import Indices, Selection
from minipuzzle.walk import Walk

from .trie import CutMaker, Maker, Trie, decisions, passes, room_for_states, walk_together

LOGIT_BYTES = {"cpu": 2 * 2**20, "cuda": 256 * 2**20}  # of one fp32 piece of the logits


@dataclass(frozen=True)
class Proxies:
    """Means over the search text.

    `kl`: forward KL(teacher || candidate) in nats per token; `accuracy`: share of next tokens that
    the candidate's first choice names; `agreement`: share of positions where teacher and candidate
    have the same first choice (MiniPuzzle ranks by the last two: arXiv 2504.03624, section 3.3);
    `blocks`: sequences that they were measured on.
    """

    kl: float
    accuracy: float
    agreement: float
    blocks: int


class ProxyEvaluator:
    """Evaluates selections of one teacher on fixed ids (B, T).

    Candidates that begin alike share those layers (search/trie.py), and the teacher's distribution
    is computed once for all candidates of a call.
    """

    def __init__(
        self,
        teacher: Model,
        ids: torch.Tensor,
        *,
        maker: Maker | None = None,
        state_bytes: int | None = None,
    ) -> None:
        """Walk the teacher over the text, and keep its states before the head.

        Args:
            teacher: resident, or streamed if the maker's layers can be made on the way.
            ids: (B, T); every sequence counts the same.
            maker: what the layers of candidates are; None: the teacher's, cut.
            state_bytes: memory that the states of candidates may take; None: what there is.
        """
        self.walk, self.ids = Walk(teacher), ids
        cut = CutMaker(self.walk)
        self.maker = maker or cut
        self.state_bytes = state_bytes or room_for_states(self.walk.device)
        whole = [Selection.identity(teacher.architecture)]
        trie = Trie.of(decisions(whole, cut.key))
        with torch.no_grad():
            parts = [
                self.walk.final(walk_together(self.walk, whole, trie, self.ids[rows], cut)[0])
                for rows, _ in self._passes(ids, 1)
            ]
        self.reference = torch.cat(parts)

    @property
    def tokens(self) -> int:
        """Tokens of a sequence."""
        return self.ids.shape[1]

    def __call__(
        self, selections: Sequence[Selection], *, blocks: slice | None = None
    ) -> list[Proxies]:
        """The proxies of candidates, in their order, on all sequences or some."""
        return [mean_proxies(each, self.tokens) for each in self.sums(selections, blocks)]

    @torch.no_grad()
    def sums(self, selections: Sequence[Selection], blocks: slice | None = None) -> torch.Tensor:
        """KL, right next tokens and agreeing positions of every sequence, summed over its tokens.

        (candidates, sequences, 3), fp64 on the CPU.
        """
        ids, reference = self.ids[blocks or slice(None)], self.reference[blocks or slice(None)]
        found = torch.zeros(len(selections), len(ids), 3, dtype=torch.float64)
        if not selections:
            return found
        decided = decisions(selections, self.maker.key)
        order = sorted(range(len(selections)), key=lambda c: decided[c])
        for rows, group in self._passes(ids, len(order)):
            members = order[group]
            candidates = [selections[c] for c in members]
            trie = Trie.of([decided[c] for c in members])
            states = walk_together(self.walk, candidates, trie, ids[rows], self.maker)
            channels = [selection.hidden for selection in candidates]
            part = self.compare(ids[rows], reference[rows], states, channels)
            for place, c in enumerate(members):
                found[c, rows] = part[place]
        return found

    def _passes(self, ids: torch.Tensor, candidates: int) -> Iterator[tuple[slice, slice]]:
        width = self.walk.model.architecture.hidden
        itemsize = next(self.walk.model.part("norm").parameters()).element_size()
        return passes(
            len(ids),
            candidates,
            row_bytes=ids.shape[1] * width * itemsize,
            chunk_rows=self.walk.rows_per_chunk(ids.shape[1]),
            state_bytes=self.state_bytes,
        )

    def compare(
        self,
        ids: torch.Tensor,
        reference: torch.Tensor,
        states: Sequence[torch.Tensor],
        channels: Sequence[Indices | None],
    ) -> torch.Tensor:
        """Sums of all candidates on ids (B, T), as of `sums`: (candidates, B, 3).

        `reference` are the teacher's states before the head, `states` those of the candidates
        before the final norm, `channels` what they keep of the stream.
        """
        rows, tokens = ids.shape
        table = torch.empty(len(states), 3, rows * tokens, device=self.walk.device)
        targets = F.pad(ids[:, 1:], (0, 1), value=-1).flatten().to(self.walk.device)
        most = LOGIT_BYTES.get(self.walk.device.type, LOGIT_BYTES["cpu"])
        step = max(1, most // (4 * self.walk.model.architecture.vocabulary))
        flat = [state.flatten(0, 1) for state in states]
        for start in range(0, rows * tokens, step):
            piece = slice(start, start + step)
            teacher = TeacherPiece(self.walk.logits(reference.flatten(0, 1)[piece]), targets[piece])
            for place, state in enumerate(flat):
                final = self.walk.final(state[None, piece], channels[place])[0]
                table[place, :, piece] = teacher.compare(self.walk.logits(final))
        return table.view(len(states), 3, rows, tokens).sum(3, dtype=torch.float64).mT.cpu()


class TeacherPiece:
    """The teacher's distribution on a piece of tokens: logits (N, V), targets (N,), -1 for none."""

    def __init__(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        log_p = F.log_softmax(logits, dim=-1)
        self.p = log_p.exp()
        self.negative_entropy = torch.linalg.vecdot(self.p, log_p)
        self.first = logits.argmax(-1)
        self.targets = targets

    def compare(self, logits: torch.Tensor) -> torch.Tensor:
        """KL, next token right, first choice as the teacher's, of logits (N, V): (3, N)."""
        first = logits.argmax(-1)
        log_q = F.log_softmax(logits, dim=-1)
        kl = self.negative_entropy - torch.linalg.vecdot(self.p, log_q)
        return torch.stack([kl, (first == self.targets).float(), (first == self.first).float()])


def mean_proxies(sums: torch.Tensor, tokens: int) -> Proxies:
    """Means from the sums (B, 3) of sequences of so many tokens."""
    blocks = len(sums)
    kl, right, same = sums.sum(0).tolist()
    positions = blocks * tokens
    return Proxies(kl / positions, right / (positions - blocks), same / positions, blocks)
