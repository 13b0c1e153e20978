"""Slicing and masks: fast ways against plain ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from minipuzzle import model
from minipuzzle.masks import masked
from minipuzzle.prune import verify
from minipuzzle.prune.slice import slice_checkpoint
from minipuzzle.selection import Selection
from minipuzzle.walk import Walk
from tests.test_core import selections
from tests.tiny import write_tiny

IDS = torch.randint(0, 97, (5, 24), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> model.Model:
    return model.load(write_tiny(tmp_path_factory.mktemp("models") / "tiny"))


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
