"""The screen keeps the best, gives up clear losers, and its estimates are near."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from minipuzzle import model
from minipuzzle.search.proxies import ProxyEvaluator, mean_proxies
from minipuzzle.search.screen import PRIOR_SPREAD, Screen, stages, worse_beyond_doubt
from minipuzzle.selection import LayerSelection, Selection
from tests.tiny import write_tiny

TOKENS, BLOCKS = 100, 8


class Landscape:
    """Made-up candidates: candidate c keeps unit c of its one layer and has the KL `kls[c]`.

    Sequences differ in difficulty by a factor that all candidates share; each candidate's own
    noise is a share of its KL.
    """

    tokens = TOKENS

    def __init__(self, kls: Sequence[float], seed: int, share: float = 0.1) -> None:
        generator = torch.Generator().manual_seed(seed)
        difficulty = torch.rand(1, BLOCKS, generator=generator) + 0.5
        noise = 1 + share * torch.randn(len(kls), BLOCKS, generator=generator)
        kl = TOKENS * torch.tensor(kls)[:, None] * difficulty * noise
        right = (TOKENS * (0.6 - 0.1 * torch.tensor(kls))).round()[:, None].expand(-1, BLOCKS)
        self.table = torch.stack([kl, right, right], -1).double()
        self.sequences = 0

    def sums(self, selections: Sequence[Selection], blocks: slice | None = None) -> torch.Tensor:
        chosen = [(each.layers[0] or {})["width"][0] for each in selections]
        found = self.table[chosen][:, blocks or slice(None)]
        self.sequences += found.shape[0] * found.shape[1]
        return found

    def kl(self, c: int) -> float:
        return mean_proxies(self.table[c], TOKENS).kl


def candidates(number: int) -> list[Selection]:
    return [Selection(({"width": (c,)},)) for c in range(number)]


@pytest.mark.parametrize("seed", range(20))
def test_the_best_stays_and_clear_losers_go(seed: int) -> None:
    kls = [1.0, 0.12, 0.9, 0.10, 0.5, 2.0, 0.11, 0.7]
    landscape = Landscape(kls, seed)
    found = Screen(landscape, BLOCKS)(candidates(len(kls)))
    best = min(range(len(kls)), key=landscape.kl)
    whole = {c for c, (_, screened) in enumerate(found) if not screened}
    assert best in whole and whole <= {1, 3, 6}
    assert min(range(len(kls)), key=lambda c: found[c][0].kl) == best
    assert landscape.sequences < 0.6 * len(kls) * BLOCKS
    for c, (proxies, screened) in enumerate(found):
        assert (proxies.blocks < BLOCKS) == screened
        near = 0.6 if screened else 1e-9
        assert proxies.kl == pytest.approx(landscape.kl(c), rel=near)
        assert proxies.accuracy == pytest.approx(0.6 - 0.1 * kls[c], rel=0.1)


def test_near_equals_are_seen_whole() -> None:
    landscape = Landscape([0.1, 0.104, 0.098, 0.102], seed=0, share=0.02)
    assert not any(screened for _, screened in Screen(landscape, BLOCKS)(candidates(4)))


def test_an_estimate_is_the_ratio_on_what_both_have_seen() -> None:
    landscape = Landscape([0.1, 5.0], seed=1)
    (_, _), (estimate, screened) = Screen(landscape, BLOCKS)(candidates(2))
    assert screened and estimate.blocks == 1
    here, whole = landscape.table[0, 0, 0], landscape.table[0, :, 0].mean()
    assert estimate.kl == pytest.approx(float(landscape.table[1, 0, 0] * whole / here) / TOKENS)


def test_the_incumbent_is_kept_between_calls_and_restored() -> None:
    landscape = Landscape([0.1, 3.0, 4.0], seed=2)
    first = Screen(landscape, BLOCKS)
    assert first([]) == []
    first(candidates(1))
    before = landscape.sequences
    later = first(candidates(3)[1:])
    assert all(screened for _, screened in later) and landscape.sequences == before + 2
    assert first.incumbent == candidates(1)[0]
    restored = Screen(landscape, BLOCKS, incumbent=first.incumbent)
    assert restored(candidates(3)[1:]) == later
    before = landscape.sequences
    restored.remind(candidates(1)[0])
    assert restored(candidates(3)[1:]) == later and landscape.sequences == before + 2
    restored.remind(candidates(3)[2])
    assert not restored(candidates(2)[1:])[0][1]  # the other one is no match for it


def test_the_better_one_becomes_the_incumbent() -> None:
    landscape = Landscape([1.0, 0.5, 0.1], seed=3)
    screen = Screen(landscape, BLOCKS)
    for c, candidate in enumerate(candidates(3)):
        (proxies, screened), *_ = screen([candidate])
        assert not screened and proxies.kl == pytest.approx(landscape.kl(c))
        assert screen.incumbent == candidate


@pytest.mark.parametrize(
    ("total", "expected"),
    [(1, [(0, 1)]), (3, [(0, 1), (1, 2), (2, 3)]), (8, [(0, 1), (1, 2), (2, 4), (4, 8)])],
)
def test_stages_double(total: int, expected: list[tuple[int, int]]) -> None:
    assert list(stages(total)) == expected


def test_one_sequence_needs_a_large_difference_and_more_need_less() -> None:
    best = torch.full((8,), 0.1, dtype=torch.float64)
    noise = 1 + 0.05 * torch.tensor([1, -1, 1, -1, 1, -1, 1, -1], dtype=torch.float64)
    ours = 0.16 * noise
    assert not worse_beyond_doubt(ours[:1], best[:1], level=0.01)
    assert worse_beyond_doubt(ours, best, level=0.01)
    assert worse_beyond_doubt(20 * best[:1], best[:1], level=0.01)
    assert not worse_beyond_doubt(best, ours, level=0.01)


def test_equals_are_given_up_seldom() -> None:
    """Hardly more often than the level says, where differences spread as the prior has it."""
    generator = torch.Generator().manual_seed(0)
    for n in (1, 2, 4):
        best = torch.ones(4000, n, dtype=torch.float64)
        ours = best + PRIOR_SPREAD * torch.randn(4000, n, generator=generator, dtype=torch.float64)
        share = sum(
            worse_beyond_doubt(a, b, level=0.01) for a, b in zip(ours, best, strict=True)
        ) / len(best)
        assert share < 0.015


def test_screened_candidates_of_a_model(tmp_path: Path) -> None:
    """With the real evaluator: what is not given up has the whole evaluation's proxies."""
    teacher = model.load(write_tiny(tmp_path / "tiny"))
    ids = torch.randint(0, 97, (4, 24), generator=torch.Generator().manual_seed(6))
    layers: list[LayerSelection] = [{} for _ in teacher.architecture.layers]
    some = [
        Selection(tuple({"width": tuple(range(width))} if i == 6 else {} for i in range(7)))
        for width in (47, 40, 8)
    ]
    some.append(Selection((None, None, None, *layers[3:])))
    evaluate = ProxyEvaluator(teacher, ids)
    found = Screen(evaluate, 4)(some)
    assert [screened for _, screened in found][0] is False and found[3][1]
    for (proxies, screened), whole in zip(found, evaluate(some), strict=True):
        if not screened:
            assert proxies.kl == pytest.approx(whole.kl, rel=1e-5)
        assert proxies.kl == pytest.approx(whole.kl, rel=1.0)
