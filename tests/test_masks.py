"""Cuts shown by masks: what they hide, axis by axis, and what is checked after every real cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from minipuzzle import model
from minipuzzle.errors import UserError
from minipuzzle.masks import masked
from minipuzzle.prune import verify
from minipuzzle.prune.slice import slice_checkpoint
from minipuzzle.selection import LayerSelection, Selection
from tests.tiny import write_tiny

IDS = torch.randint(0, 97, (2, 24), generator=torch.Generator().manual_seed(8))
PATTERN = "M*-M-"
KEPT_HIDDEN = tuple(i for i in range(32) if i % 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("m") / "teacher", hybrid_override_pattern=PATTERN)


@pytest.fixture
def teacher(folder: Path) -> model.Model:
    return model.load(folder)


def cut_at(axes: dict[int, LayerSelection | None], hidden: Any = None) -> Selection:
    return Selection(tuple(axes.get(i, {}) for i in range(len(PATTERN))), hidden)


@torch.no_grad()
def shown(teacher: model.Model, selection: Selection) -> torch.Tensor:
    with masked(teacher, selection) as module:
        logits: torch.Tensor = module(IDS, use_cache=False).logits
    return logits


@torch.no_grad()
def plain(loaded: model.Model) -> torch.Tensor:
    logits: torch.Tensor = loaded.module(IDS, use_cache=False).logits
    return logits


def half(size: int) -> tuple[int, ...]:
    return tuple(range(1, size, 2))


CUTS: dict[str, Selection] = {
    "width": cut_at({2: {"width": half(48)}, 4: {"width": tuple(range(24))}}),
    "heads": cut_at({0: {"heads": (1, 2, 5, 7)}, 3: {"heads": (0, 3, 4, 6)}}),
    "head_dim": cut_at({i: {"head_dim": half(8)} for i in (0, 3)}),
    "groups": cut_at({i: {"groups": (1,), "heads": (4, 5, 6, 7)} for i in (0, 3)}),
    "groups, heads, head_dim": cut_at(
        {i: {"groups": (0,), "heads": (0, 2), "head_dim": half(8)} for i in (0, 3)}
    ),
    "query_heads": cut_at({1: {"query_heads": (0, 3)}}),
    "kv_heads": cut_at({1: {"kv_heads": (1,), "query_heads": (2, 3)}}),
    "layers": cut_at({0: None, 2: None}),
    "hidden": cut_at({}, KEPT_HIDDEN),
    "one channel": cut_at({}, (13,)),
    "all": cut_at({0: None, 2: None, 3: {"heads": (1, 6)}, 4: {"width": half(48)}}, KEPT_HIDDEN),
}


@pytest.mark.parametrize("name", CUTS)
def test_every_axis_masked_equals_sliced(name: str, teacher: model.Model, tmp_path: Path) -> None:
    slice_checkpoint(teacher.folder, tmp_path / "cut", CUTS[name])
    sliced = plain(model.load(tmp_path / "cut"))
    torch.testing.assert_close(shown(teacher, CUTS[name]), sliced, atol=1e-4, rtol=1e-4)
    assert (sliced - plain(teacher)).abs().max() > 0.05, "the cut must be seen at all"


def test_nothing_but_norms_reads_the_stream(teacher: model.Model) -> None:
    """Whatever is written to cut hidden channels, the masked model does not see it."""
    selection = CUTS["hidden"]
    before = shown(teacher, selection)
    gone = [i for i in range(32) if i not in KEPT_HIDDEN]
    with torch.no_grad():
        for spec in teacher.family.tensors(teacher.architecture):
            parameter = teacher.parameter(spec.name)
            if spec.role == "embedding":
                parameter[:, gone] += 7.0
            elif spec.role == "writes":
                parameter[gone] -= 3.0
            elif spec.role in ("reads", "head"):
                parameter[:, gone] *= -2.0
            elif spec.role == "norm":
                parameter[gone] = 11.0
    assert (plain(teacher) - before).abs().max() > 0.05
    assert torch.equal(shown(teacher, selection), before)


def test_masks_of_ungrouped_heads_are_the_norm_over_each_groups_own(
    teacher: model.Model,
) -> None:
    """What no file can hold can be shown: 3 heads of one group, 1 of the other."""
    heads = (0, 1, 3, 6)
    inner = torch.zeros(8, 8)
    inner[list(heads)] = 1.0
    selection = cut_at({0: {"heads": heads}})
    with pytest.raises(UserError, match="same number"):
        selection.apply(teacher.architecture)
    norm: Any = teacher.layer(0).get_submodule("mixer.norm")

    def by_hand(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> Any:
        gated = args[0] * torch.nn.functional.silu(args[1]) * inner.reshape(-1)
        grouped = gated.reshape(*gated.shape[:-1], 2, 32)
        kept = torch.tensor([3 * 8, 1 * 8])[:, None]
        mean = grouped.square().sum(-1, keepdim=True) / kept
        return norm.weight * (grouped * torch.rsqrt(mean + norm.variance_epsilon)).flatten(-2)

    handle = norm.register_forward_hook(by_hand)
    expected = plain(teacher)
    handle.remove()
    torch.testing.assert_close(shown(teacher, selection), expected, atol=1e-4, rtol=1e-4)


def test_masks_leave_no_trace_even_after_an_error(teacher: model.Model) -> None:
    before = plain(teacher)
    with pytest.raises(RuntimeError, match="stop"), masked(teacher, CUTS["all"]):
        raise RuntimeError("stop")
    assert torch.equal(plain(teacher), before)
    with pytest.raises(UserError, match="48 units"), masked(teacher, cut_at({2: {"width": (48,)}})):
        pass
    assert torch.equal(plain(teacher), before)


@pytest.fixture
def pruned(folder: Path, tmp_path: Path) -> Path:
    slice_checkpoint(folder, tmp_path / "cut", CUTS["all"])
    return tmp_path / "cut"


@pytest.mark.parametrize(
    ("free", "how", "tokens"),
    [(10**10, "resident", 48), (200_000, "streamed", 24), (1, "skipped", 0)],
)
def test_logits_are_compared_as_far_as_memory_goes(
    free: int,
    how: str,
    tokens: int,
    folder: Path,
    pruned: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(verify, "free_bytes", lambda device: free)
    found = verify.verify_cut(folder, pruned, CUTS["all"], IDS)
    assert (found["how"], found["tokens"]) == (how, tokens)
    difference = found["masked_vs_sliced_max_difference"]
    assert difference is None if how == "skipped" else 0 <= difference < 1e-4
    assert json.loads(json.dumps(found)) == found
    said = "".join(capsys.readouterr())
    assert ("logits are" in said) == (how != "resident")


def test_a_wrong_slice_is_found(
    folder: Path, pruned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the bits of the file; and by the logits, should the comparison of bits miss it."""
    other = cut_at({0: None, 2: None, 3: {"heads": (1, 5)}, 4: {"width": half(48)}}, KEPT_HIDDEN)
    with pytest.raises(AssertionError, match="is not the slice"):
        verify.verify_cut(folder, pruned, other, IDS)
    monkeypatch.setattr(verify, "differing_tensor", lambda *_: None)
    for free in (10**10, 200_000):
        monkeypatch.setattr(verify, "free_bytes", lambda device, free=free: free)
        with pytest.raises(AssertionError, match="logits differ"):
            verify.verify_cut(folder, pruned, other, IDS)


def test_weights_that_are_not_finite_are_an_error_of_the_model(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_tiny(tmp_path / "nan")
    tensors = load_file(folder / "model.safetensors")
    tensors["backbone.layers.1.mixer.down_proj.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    whole = Selection.identity(model.read_architecture(folder)[2])
    slice_checkpoint(folder, tmp_path / "cut", whole)
    with pytest.raises(UserError, match="^[^\n]*not finite[^\n]*$"):
        verify.verify_cut(folder, tmp_path / "cut", whole, IDS)


BAD_RECORDS: list[tuple[dict[str, Any], str]] = [
    ({}, "schema version None"),
    ({"schema_version": 1}, "no list of `layers`"),
    ({"schema_version": 1, "layers": [{"width": "all"}]}, "layer 0, `width` .* but is all"),
    ({"schema_version": 1, "layers": [{}, 3]}, "layer 1 .* but is 3"),
    ({"schema_version": 1, "layers": [{"width": [2, 1]}]}, "must ascend"),
    ({"schema_version": 1, "layers": [{"width": []}]}, "keeps nothing"),
    ({"schema_version": 1, "layers": [{}], "hidden": [0.5]}, "`hidden` .* list of indices"),
    ({"schema_version": 1, "layers": [{}], "hidden": [-1, 2]}, "must ascend from 0"),
]


@pytest.mark.parametrize(("record", "message"), BAD_RECORDS)
def test_selections_that_are_not_selections_are_refused(
    record: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=f"^[^\n]*{message}[^\n]*$"):
        Selection.from_json(record)


def test_a_later_cut_must_fit_what_the_earlier_one_leaves() -> None:
    first = Selection(({"width": (1, 5)}, None), hidden=(0, 3))
    assert first.compose(Selection(({"width": (1,)},), hidden=(1,))) == Selection(
        ({"width": (5,)}, None), hidden=(3,)
    )
    with pytest.raises(UserError, match="asks for 2 of `width`.*leaves 2"):
        first.compose(Selection(({"width": (2,)},)))
    with pytest.raises(UserError, match="asks for 4 of `hidden`"):
        first.compose(Selection(({},), hidden=(4,)))
    with pytest.raises(UserError, match="is for 2 layers"):
        first.compose(Selection(({}, {})))
