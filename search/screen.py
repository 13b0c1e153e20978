"""Cheaper screens: candidates are judged on few sequences first, and only survivors on more.

Stages of 1, 2, 4, ... sequences. After each, a candidate is given up whose KL is worse than the
incumbent's (the best one judged on all sequences so far) beyond doubt: by the differences on the
sequences that both have seen. Texts differ far more from each other than two candidates do on one
of them, which is why the differences are what is tested.

The test is a moderated t-test (Smyth, "Linear models and empirical Bayes methods for assessing
differential expression in microarray experiments", 2004, section 3): one sequence says nothing of
how much differences vary, so the variance is pooled with a prior one, which counts as so many more
sequences. For n differences d with mean m, prior standard deviation s0 with v degrees of freedom,

    s^2 = (v s0^2 + sum (d - m)^2) / (v + n - 1),    t = m sqrt(n) / s

and the candidate goes if t is above the one-sided quantile of Student's t with v + n - 1 degrees.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from scipy.special import stdtrit

from minipuzzle.selection import Selection

from .proxies import Proxies, mean_proxies

LEVEL = 0.05  # chance, at each stage, that a candidate just as good as the incumbent is given up
# Standard deviation of a sequence's difference, of the candidate's KL: the median over pairs of the
# demo's candidates on its search text is 0.14.
PRIOR_SPREAD = 0.15
PRIOR_SEQUENCES = 8.0  # that the prior counts for
KL = 0  # column of the sums


class SequenceEvaluator(Protocol):
    """What the screen asks of a `ProxyEvaluator`."""

    @property
    def tokens(self) -> int:
        """Tokens of a sequence."""

    def sums(self, selections: Sequence[Selection], blocks: slice | None = None) -> torch.Tensor:
        """KL, right next tokens, agreeing positions per sequence: (candidates, sequences, 3)."""


class Screen:
    """Judges candidates; keeps the incumbent from call to call.

    Only for studies with KL as their one objective: a candidate of a Pareto front may be worth
    more than its KL says.
    """

    def __init__(
        self,
        evaluate: SequenceEvaluator,
        total_blocks: int,
        *,
        incumbent: Selection | None = None,
        level: float = LEVEL,
    ) -> None:
        """Nothing is evaluated yet.

        Args:
            evaluate: of the proxies.
            total_blocks: sequences of a candidate that is not given up.
            incumbent: the best one of a study that is resumed.
            level: of the one-sided test.
        """
        self.evaluate, self.total, self.level = evaluate, total_blocks, level
        self.incumbent = incumbent
        self._sums: torch.Tensor | None = None  # the incumbent's: (total, 3)

    def remind(self, incumbent: Selection) -> None:
        """Compare with this one from now on: the best of a study that others work on, or resumed.

        It is evaluated again, on all sequences, unless it is the incumbent anyhow.
        """
        if incumbent != self.incumbent:
            self.incumbent, self._sums = incumbent, None

    def __call__(self, selections: Sequence[Selection]) -> list[tuple[Proxies, bool]]:
        """Proxies of candidates, in their order, and whether they are estimates of ones given up.

        Those of a candidate given up after `blocks` sequences are what it shows there, times what
        the incumbent is worth on all sequences over what it is worth on these.
        """
        if not selections:
            return []
        if self.incumbent is not None and self._sums is None:
            self._sums = self.evaluate.sums([self.incumbent], slice(0, self.total))[0]
        found: list[tuple[Proxies, bool] | None] = [None] * len(selections)
        sums = self.evaluate.sums(selections, slice(0, 1))
        seen = {c: sums[c] for c in range(len(selections))}
        self._run_ahead(selections, seen)
        for start, stop in stages(self.total):
            alive = [c for c, each in seen.items() if len(each) == start]
            if start and alive:
                more = self.evaluate.sums([selections[c] for c in alive], slice(start, stop))
                for place, c in enumerate(alive):
                    seen[c] = torch.cat([seen[c], more[place]])
            for c in [c for c in seen if stop < self.total and len(seen[c]) == stop]:
                if self._is_worse(seen[c]):
                    found[c] = self._estimate(seen.pop(c)), True
        for c, each in seen.items():
            found[c] = mean_proxies(each, self.evaluate.tokens), False
            self._crown(selections[c], each)
        return [each for each in found if each is not None]

    def _run_ahead(self, selections: Sequence[Selection], seen: dict[int, torch.Tensor]) -> None:
        """The best one on the first sequence sees all of them if it beats the incumbent there.

        The others are then measured against the better one.
        """
        first = min(seen, key=lambda c: float(seen[c][0, KL]))
        ahead = self._sums is None or bool(seen[first][0, KL] < self._sums[0, KL])
        if ahead and self.total > 1:
            more = self.evaluate.sums([selections[first]], slice(1, self.total))[0]
            seen[first] = torch.cat([seen[first], more])
        if ahead:
            self._crown(selections[first], seen[first])

    def _crown(self, selection: Selection, sums: torch.Tensor) -> None:
        if self._sums is None or float(sums[:, KL].sum()) < float(self._sums[:, KL].sum()):
            self.incumbent, self._sums = selection, sums

    def _is_worse(self, sums: torch.Tensor) -> bool:
        assert self._sums is not None
        ours, best = sums[:, KL], self._sums[: len(sums), KL]
        return worse_beyond_doubt(ours, best, level=self.level)

    def _estimate(self, sums: torch.Tensor) -> Proxies:
        """What a candidate that saw some of the sequences would show on all of them."""
        assert self._sums is not None
        here = mean_proxies(self._sums[: len(sums)], self.evaluate.tokens)
        whole = mean_proxies(self._sums, self.evaluate.tokens)
        own = mean_proxies(sums, self.evaluate.tokens)
        return Proxies(
            kl=_scaled(own.kl, here.kl, whole.kl),
            accuracy=min(1.0, _scaled(own.accuracy, here.accuracy, whole.accuracy)),
            agreement=min(1.0, _scaled(own.agreement, here.agreement, whole.agreement)),
            blocks=own.blocks,
        )


def _scaled(value: float, here: float, whole: float) -> float:
    return value * whole / here if here > 0 else value


def stages(total: int) -> Iterator[tuple[int, int]]:
    """(first, behind the last) sequence of each stage; 1, 2, 4, ..., `total` are seen after it."""
    start, stop = 0, 1
    while start < total:
        yield start, min(stop, total)
        start, stop = stop, 2 * stop


def worse_beyond_doubt(ours: torch.Tensor, best: torch.Tensor, *, level: float) -> bool:
    """Whether KL sums of sequences (n,) are above those of another on the same ones: see above."""
    differences, n = ours - best, len(ours)
    mean = float(differences.mean())
    prior = PRIOR_SPREAD * float(ours.mean())
    degrees = PRIOR_SEQUENCES + n - 1
    squares = float((differences - mean).square().sum()) + PRIOR_SEQUENCES * prior**2
    bound = float(stdtrit(degrees, 1 - level)) * (squares / degrees / n) ** 0.5
    return bool(mean > bound)
