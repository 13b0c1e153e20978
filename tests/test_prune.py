"""Scores, selection, slicing, masks, repair: fast ways against plain ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from minipuzzle import model
from minipuzzle.masks import masked
from minipuzzle.prune import repair, score, surgeon, verify
from minipuzzle.prune.select import select
from minipuzzle.prune.slice import slice_checkpoint
from minipuzzle.scores import Scores
from minipuzzle.selection import Selection
from minipuzzle.walk import Walk
from tests.test_core import selections
from tests.tiny import write_tiny

IDS = torch.randint(0, 97, (5, 24), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> model.Model:
    return model.load(write_tiny(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def scores(teacher: model.Model) -> Scores:
    return score.score(teacher, IDS, {"seed": 0})


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(selection=selections())
def test_masked_equals_sliced_equals_walked(
    teacher: model.Model, tmp_path: Path, selection: Selection
) -> None:
    slice_checkpoint(teacher.folder, tmp_path / "cut", selection)
    found = verify.verify_cut(teacher, tmp_path / "cut", selection, IDS[:2])
    sliced = model.load(tmp_path / "cut")
    assert found["parameters"] == sum(p.numel() for p in sliced.module.parameters())
    walk = Walk(teacher)
    with torch.no_grad():
        walked = walk.logits(walk.states(IDS[:2], selection))
        torch.testing.assert_close(
            walked, sliced.module(IDS[:2], use_cache=False).logits, atol=2e-4, rtol=1e-4
        )


def test_keeping_everything_is_the_identity_bit_for_bit(
    teacher: model.Model, tmp_path: Path
) -> None:
    whole = Selection.identity(teacher.architecture)
    slice_checkpoint(teacher.folder, tmp_path / "same", whole)
    same = model.load(tmp_path / "same")
    for (name, old), (_, new) in zip(
        teacher.module.named_parameters(), same.module.named_parameters(), strict=True
    ):
        assert torch.equal(old, new), name
    with torch.no_grad(), masked(teacher, whole) as module:
        assert torch.equal(module(IDS).logits, same.module(IDS).logits)


def _cut(teacher: model.Model, scores: Scores, folder: Path) -> tuple[Selection, model.Model]:
    chosen = select(scores, teacher.architecture, removed={"ffn": 1}, sizes={"width": 24})
    slice_checkpoint(teacher.folder, folder, chosen)
    return chosen, model.load(folder)


def test_repair_brings_the_stream_closer(
    teacher: model.Model, scores: Scores, tmp_path: Path
) -> None:
    chosen, student = _cut(teacher, scores, tmp_path / "cut")
    calibration = torch.randint(0, 97, (40, 32), generator=torch.Generator().manual_seed(3))
    fresh = torch.randint(0, 97, (10, 32), generator=torch.Generator().manual_seed(4))
    stock: Any = teacher.module
    cut: Any = student.module
    wanted = stock.model(fresh)[0]

    def distance() -> float:
        with torch.no_grad():
            return float((cut.model(fresh)[0] - wanted).square().mean())

    before = distance()
    refits = repair.repair(teacher, student, chosen, calibration, ridge=1e-3)
    assert distance() < 0.8 * before
    assert all(refit.after <= refit.before for refit in refits)
    first_change = next(j for j, i in enumerate(chosen.kept) if chosen.layers[i] != {})
    assert refits[0].layer == first_change


def test_repair_of_a_whole_model_changes_nothing(teacher: model.Model) -> None:
    student = model.clone(teacher)
    whole = Selection.identity(teacher.architecture)
    assert repair.repair(teacher, student, whole, IDS, ridge=1e-3) == []


def test_the_refit_is_the_least_squares_solution() -> None:
    """Against torch.linalg.lstsq of the stacked ridge problem, in fp64."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.zeros(3, 6)
    read = torch.randn(50, 6, generator=generator)
    lacks = torch.randn(50, 3, generator=generator)
    moments = repair.Moments(weight)
    moments.add(read[:20], lacks[:20])
    moments.add(read[20:], lacks[20:])
    damping = 0.1 * float((read.double().T @ read.double()).diagonal().mean())
    stacked = torch.cat([read.double(), damping**0.5 * torch.eye(6, dtype=torch.float64)])
    aims = torch.cat([lacks.double(), torch.zeros(6, 3, dtype=torch.float64)])
    expected = torch.linalg.lstsq(stacked, aims).solution.T
    torch.testing.assert_close(moments.solve(0.1), expected, rtol=1e-5, atol=1e-7)


def test_the_surgeon_is_the_plain_greedy_choice() -> None:
    """Against trying every remaining unit and re-fitting the others by least squares, fp64."""
    generator = torch.Generator().manual_seed(7)
    read = torch.randn(60, 8, generator=generator, dtype=torch.float64)
    read[:, 5] = read[:, 1] + 0.3 * read[:, 2]
    weight = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    moments = read.T @ read
    damped = moments + surgeon.DAMPING * moments.diagonal().mean() * torch.eye(8).double()

    def cost(kept: list[int]) -> float:
        """Least value of (W - W')H(W - W')^T over W' that uses only the kept columns."""
        if not kept:
            return float(torch.trace(weight @ damped @ weight.T))
        fitted = torch.linalg.solve(damped[kept][:, kept], damped[kept] @ weight.T)
        rest = weight.clone()
        rest[:, kept] -= fitted.T
        return float(torch.trace(rest @ damped @ rest.T))

    left, expected = list(range(8)), torch.zeros(8, dtype=torch.float64)
    for place in range(8):
        worst = min(left, key=lambda j: cost([k for k in left if k != j]))
        expected[worst] = place
        left.remove(worst)
    assert torch.equal(surgeon.surgeon_scores(moments, weight), expected)
