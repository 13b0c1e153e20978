"""From scores and targets to selections: rankings, constraints, and what breaks them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minipuzzle import families
from minipuzzle.architecture import Architecture, AttentionLayer, FFNLayer, Kind, MambaLayer
from minipuzzle.cli import main
from minipuzzle.errors import UserError
from minipuzzle.files import atomic_write_json
from minipuzzle.prune.constraints import SERVING, SLICEABLE, Constraints
from minipuzzle.prune.depth import least_important, removed_layers
from minipuzzle.prune.select import UNIT_METRICS, select, top_units
from minipuzzle.prune.widths import share_widths
from minipuzzle.runfolder import RunFolder
from minipuzzle.scores import Removal, Scores
from minipuzzle.selection import CUT_AXES
from tests.test_core import P8, PUBLISHED
from tests.tiny import CONFIGS, write_tiny

LAYERS = (
    MambaLayer(heads=32, head_dim=16, groups=4, state=8, conv=4),
    FFNLayer(width=64),
    AttentionLayer(query_heads=8, kv_heads=4, head_dim=8),
    FFNLayer(width=64),
    MambaLayer(heads=32, head_dim=16, groups=4, state=8, conv=4),
    FFNLayer(width=64),
)
HYBRID = Architecture(hidden=32, vocabulary=97, tied=False, layers=LAYERS)
LAYER_SCORES = (6.0, 5.0, 4.0, 3.0, 2.0, 1.0)


def made_up(architecture: Architecture, seed: int = 0, **changes: Any) -> Scores:
    """Random scores of every axis of a model that does not exist."""
    generator = torch.Generator().manual_seed(seed)
    metrics = ("activation", "energy")
    units = {
        (i, axis, metric): torch.rand(getattr(layer, axis), generator=generator)
        for i, layer in enumerate(architecture.layers)
        for axis in CUT_AXES[layer.kind]
        for metric in metrics
    }
    return replace(
        Scores(
            kinds=tuple(layer.kind for layer in architecture.layers),
            layers={
                "hidden_mse": torch.tensor(LAYER_SCORES).double()
                if architecture is HYBRID
                else torch.rand(len(architecture.layers), generator=generator).double()
            },
            units=units,
            provenance={},
            hidden={m: torch.rand(architecture.hidden, generator=generator) for m in metrics},
        ),
        **changes,
    )


SCORES = made_up(HYBRID)


def kept_of(axis: str, i: int, **arguments: Any) -> tuple[int, ...]:
    axes = select(SCORES, HYBRID, **arguments).layers[i]
    assert axes is not None
    return axes[axis]


def test_top_units_keep_equal_numbers_per_group() -> None:
    values = torch.tensor([9.0, 8.0, 7.0, 6.0, 1.0, 2.0, 3.0, 4.0])
    assert top_units(values, 4, groups=2) == (0, 1, 6, 7)
    assert top_units(values, 4) == (0, 1, 2, 3)
    assert top_units(torch.zeros(4), 2) == (0, 1)


@pytest.mark.parametrize("axis", ["width", "head_dim", "hidden"])
def test_the_best_units_by_the_default_or_the_named_metric_stay(axis: str) -> None:
    i = {"width": 3, "head_dim": 4, "hidden": 0}[axis]
    for name in (None, "activation", "energy"):
        metrics = {} if name is None else {axis: name}
        metric = name or next(m for m in UNIT_METRICS[axis] if m in ("activation", "energy"))
        values = SCORES.hidden[metric] if axis == "hidden" else SCORES.units[i, axis, metric]
        best = tuple(sorted(values.argsort(descending=True)[:8].tolist()))
        chosen = select(SCORES, HYBRID, sizes={axis: 8}, metrics=metrics)
        axes = chosen.layers[i]
        assert axes is not None
        assert (chosen.hidden if axis == "hidden" else axes[axis]) == best


def test_controls_rank_without_scores() -> None:
    assert kept_of("width", 1, sizes={"width": 8}, metrics={"width": "order"}) == tuple(range(8))
    last = kept_of("width", 1, sizes={"width": 8}, metrics={"width": "reverse"})
    assert last == tuple(range(56, 64))
    drawn = [
        kept_of("width", i, sizes={"width": 8}, metrics={"width": "random"}, seed=seed)
        for i, seed in ((1, 0), (1, 1), (3, 0))
    ]
    assert len(set(drawn)) == 3


def test_heads_go_equally_from_every_group() -> None:
    heads = kept_of("heads", 0, sizes={"heads": 16})
    assert [sum(head // 8 == group for head in heads) for group in range(4)] == [4, 4, 4, 4]
    values = SCORES.units[0, "heads", "energy"]
    for group in range(4):
        own = [head for head in heads if head // 8 == group]
        rest = [h for h in range(8 * group, 8 * group + 8) if h not in own]
        assert min(values[own]) > max(values[rest])


def test_groups_take_their_units_along() -> None:
    chosen = select(SCORES, HYBRID, sizes={"kv_heads": 3, "groups": 2})
    for i, axis, by, per in ((2, "query_heads", "kv_heads", 2), (0, "heads", "groups", 8)):
        axes = chosen.layers[i]
        assert axes is not None
        assert axes[axis] == tuple(g * per + u for g in axes[by] for u in range(per))
    both = select(SCORES, HYBRID, sizes={"kv_heads": 3, "query_heads": 3}).layers[2]
    assert both is not None
    assert tuple(head // 2 for head in both["query_heads"]) == both["kv_heads"]
    with pytest.raises(UserError, match=r"4 of 6 `query_heads`.*nearest are 3 and 6"):
        select(SCORES, HYBRID, sizes={"kv_heads": 3, "query_heads": 4})


BAD_SIZES: list[tuple[Mapping[str, Any], str]] = [
    ({"heads": 12}, r"layer 0 \(mamba\) .* 12 of 32 `heads`.*multiple of 8.* 8 and 16"),
    ({"heads": 0}, "nearest is 8"),
    ({"query_heads": 6}, "multiple of 4.* 4 and 8"),
    ({"width": 12}, "multiple of 8.* 8 and 16"),
    ({"width": 65}, "nearest is 64"),
    ({"width": -8}, "nearest is 8"),
    ({"width": {1: 8, 3: 90}}, "layer 3 .* 90 of 64 .*nearest is 64"),
    ({"width": {0: 8}}, r"layer 0 has no axis `width`; layers with one: \[1, 3, 5\]"),
    ({"hidden": 31}, "the model cannot keep 31 of 32 `hidden`.* 24 and 32"),
    ({"hidden": {0: 8}}, "one number"),
    ({"head_dim": 12}, "8 and 16"),
    ({"widht": 8}, "nothing has an axis `widht`; known axes: width, "),
    ({"kv_heads": 5}, "nearest is 4"),
]


@pytest.mark.parametrize(("sizes", "message"), BAD_SIZES)
def test_bad_sizes_name_the_nearest_allowed(sizes: Mapping[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^[^\n]*{message}[^\n]*$"):
        select(SCORES, HYBRID, sizes=sizes)


def test_real_widths_are_multiples_of_256() -> None:
    assert SERVING.allowed("width", 21504)[:2] == (256, 512)
    assert SERVING.multiple("width", 4096) == SERVING.multiple("hidden", 8192) == 256
    assert SERVING.multiple("width", 4100) == SERVING.multiple("width", 2048) == 8
    assert SERVING.allowed("heads", 128, groups=8) == tuple(range(8, 129, 8))
    assert SERVING.allowed("heads", 256, groups=6)[0] == 24
    assert SERVING.allowed("width", 5) == (5,)
    _, eight_b = families.read(PUBLISHED["8B"][0])
    quick = made_up(eight_b)
    cut = select(quick, eight_b, sizes={"width": 15872, "heads": 112}).apply(eight_b)
    assert {x.width for x in cut.layers if isinstance(x, FFNLayer)} == {15872}
    with pytest.raises(UserError, match="10000 of 21504 `width`.* 9984 and 10240"):
        select(quick, eight_b, sizes={"width": 10000})
    assert cut.pattern == P8


def test_the_bundled_teachers_cuts_are_allowed() -> None:
    """16 Mamba heads in 2 groups, FFN 704 to 416, widths in steps of 16."""
    assert SERVING.allowed("heads", 16, groups=2) == (8, 16)
    allowed = SERVING.allowed("width", 704)
    assert 416 in allowed and set(range(16, 704, 16)) < set(allowed)


def test_without_constraints_anything_can_be_shown() -> None:
    free = select(
        SCORES, HYBRID, sizes={"heads": 5, "width": 3, "hidden": 7}, constraints=None
    ).layers[0]
    assert free is not None and len(free["heads"]) == 5
    values = SCORES.units[0, "heads", "energy"]
    assert set(free["heads"]) == set(values.argsort(descending=True)[:5].tolist())
    sliceable = select(SCORES, HYBRID, sizes={"heads": 12, "width": 3}, constraints=SLICEABLE)
    cut = sliceable.apply(HYBRID)
    assert cut.layers[0] == replace(LAYERS[0], heads=12)
    with pytest.raises(UserError, match="nearest is 1"):
        select(SCORES, HYBRID, sizes={"width": 0}, constraints=None)


def test_scores_that_were_not_measured_are_asked_for() -> None:
    with pytest.raises(UserError, match="not scored by flap .only by activation, energy.; add"):
        select(SCORES, HYBRID, sizes={"width": 8}, metrics={"width": "flap"})
    with pytest.raises(UserError, match="not scored by kl"):
        select(SCORES, HYBRID, removed={"ffn": 1}, layer_metric="kl")
    with pytest.raises(UserError, match="hidden channels were not scored .* none"):
        select(replace(SCORES, hidden={}), HYBRID, sizes={"hidden": 8})
    with pytest.raises(UserError, match="another model"):
        select(SCORES, replace(HYBRID, hidden=64), sizes={})


def test_the_least_important_layers_go() -> None:
    assert removed_layers(SCORES, {"ffn": 2}) == {3, 5}
    assert removed_layers(SCORES, {"mamba": 1, "ffn": 1}) == {4, 5}
    assert removed_layers(SCORES, 2) == {4, 5}
    assert removed_layers(SCORES, 3) == {5, 4, 3}
    assert removed_layers(SCORES, 3, constraints=None) == {5, 4, 3}
    assert removed_layers(SCORES, frozenset({0, 5})) == {0, 5}
    assert least_important(SCORES, "mamba", 1) == {4}
    ties = replace(SCORES, layers={"kl": torch.ones(6).double()})
    assert removed_layers(ties, {"ffn": 1}, metric="kl") == {1}


BAD_REMOVALS: list[tuple[Any, str]] = [
    ({"attention": 1}, "ask for at most 0"),
    ({"ffn": 3}, "1 must stay; ask for at most 2"),
    ({"ffn": -1}, "ask for at most 2"),
    ({"moe": 1}, "unknown layer kind 'moe'"),
    (4, "nearest is 3"),
    (frozenset({2}), "1 attention layers must stay"),
    (frozenset({6}), "layer 6 cannot be removed: layers are 0 to 5"),
]


@pytest.mark.parametrize(("removed", "message"), BAD_REMOVALS)
def test_bad_removals_name_what_is_allowed(removed: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^[^\n]*{re.escape(message)}[^\n]*$"):
        select(SCORES, HYBRID, removed=removed)


def test_layers_can_go_in_the_order_of_iterative_removal() -> None:
    steps = tuple(Removal((i,), (None,) * 6) for i in (1, 0, 5))
    iterated = replace(SCORES, removals=steps)
    by = {"metric": "removal_order"}
    assert removed_layers(iterated, {"ffn": 1}, **by) == {1}  # type: ignore[arg-type]
    assert removed_layers(iterated, 2, **by) == {0, 1}  # type: ignore[arg-type]
    with pytest.raises(UserError, match="only goes as far as it went.* ffn: 2"):
        removed_layers(iterated, {"ffn": 3}, constraints=None, metric="removal_order")
    with pytest.raises(UserError, match=r"set score\.iterative"):
        select(SCORES, HYBRID, removed={"ffn": 1}, layer_metric="removal_order")


def test_blocks_go_whole() -> None:
    family, architecture = families.read(CONFIGS["llama"])
    values = torch.tensor([3.0, 3.0, 1.0, 1.0, 2.0, 2.0]).double()
    scores = made_up(architecture, layers={"hidden_mse": values})
    units = family.removable(architecture)
    both: dict[Kind, int] = {"attention": 1, "ffn": 1}
    assert removed_layers(scores, both, units=units) == {2, 3}
    assert removed_layers(scores, 2, units=units) == {2, 3, 4, 5}
    chosen = select(scores, architecture, removed=1, sizes={"width": 16}, units=units)
    assert chosen.apply(architecture).pattern == "*-*-"
    for removed in ({"attention": 1}, {"attention": 2, "ffn": 1}):
        with pytest.raises(UserError, match="of a block go together"):
            select(scores, architecture, removed=removed, units=units)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="layers 2, 3 share a block"):
        select(scores, architecture, removed=frozenset({2}), units=units)


@st.composite
def wishes(draw: st.DrawFn) -> dict[str, int]:
    sizes = {"width": 64, "heads": 32, "head_dim": 16, "groups": 4, "kv_heads": 4, "hidden": 32}
    axes = draw(st.sets(st.sampled_from(sorted(sizes))))
    return {axis: draw(st.integers(1, sizes[axis])) for axis in sorted(axes)}


@settings(max_examples=150, deadline=None)
@given(wish=wishes(), removed=st.integers(0, 3))
def test_a_selection_has_the_wished_sizes_or_says_which_are_near(
    wish: dict[str, int], removed: int
) -> None:
    """Following the advice of every message leads to a selection."""
    for _ in range(20):
        try:
            cut = select(SCORES, HYBRID, removed=removed, sizes=wish).apply(HYBRID)
            break
        except UserError as error:
            found = re.search(r"of \d+ `(\w+)`.*nearest (?:is|are) (\d+)", str(error))
            assert found is not None, error
            wish = wish | {found[1]: int(found[2])}
    else:
        pytest.fail("the advice goes in circles")
    assert cut.hidden == wish.get("hidden", 32)
    for layer in cut.layers:
        if isinstance(layer, FFNLayer):
            assert layer.width == wish.get("width", 64)
        elif isinstance(layer, MambaLayer):
            assert layer.heads % 8 == 0 and layer.head_dim == wish.get("head_dim", 16)


def test_widths_are_shared_out_to_the_best_channels() -> None:
    """Against trying all ways to share 8 steps out to three layers."""
    shared = share_widths(SCORES, HYBRID, 64, floor=8)
    squares = {
        i: SCORES.units[i, "width", "energy"].square().sort(descending=True).values
        for i in (1, 3, 5)
    }

    def kept(widths: Mapping[int, int]) -> float:
        return sum(float(squares[i][:width].sum()) for i, width in widths.items())

    ways = [
        {1: 8 * a, 3: 8 * b, 5: 64 - 8 * a - 8 * b} for a in range(1, 7) for b in range(1, 8 - a)
    ]
    assert sum(shared.values()) == 64 and set(shared) == {1, 3, 5}
    assert kept(shared) == pytest.approx(max(kept(way) for way in ways))
    chosen = select(SCORES, HYBRID, sizes={"width": shared}).apply(HYBRID)
    assert [x.width for x in chosen.layers if isinstance(x, FFNLayer)] == list(shared.values())


def test_widths_follow_the_layers_worth_and_the_floor() -> None:
    lone = replace(SCORES, layers={"kl": torch.tensor([1, 1e3, 1, 1, 1, 1]).double()})
    assert share_widths(lone, HYBRID, 80, layer_metric="kl") == {1: 64, 3: 8, 5: 8}
    assert share_widths(lone, HYBRID, 80, layer_metric="kl", removed=[3]) == {1: 64, 5: 16}
    floored = share_widths(lone, HYBRID, 99, layer_metric="kl", floor=20)
    assert floored == {1: 48, 3: 24, 5: 24}
    free = share_widths(lone, HYBRID, 99, floor=20, constraints=None)
    assert sum(free.values()) == 99 and min(free.values()) >= 20
    with pytest.raises(UserError, match="from 24 to 192.*nearest is 192"):
        share_widths(SCORES, HYBRID, 200)
    with pytest.raises(UserError, match="surgeon does not compare"):
        share_widths(SCORES, HYBRID, 100, metric="surgeon")


def test_constraints_of_layers_can_be_raised() -> None:
    two = Constraints(least_layers=2)
    assert removed_layers(SCORES, {"ffn": 1}, constraints=two) == {5}
    with pytest.raises(UserError, match="2 must stay; ask for at most 1"):
        removed_layers(SCORES, {"ffn": 2}, constraints=two)


RECIPE = """
model: teacher
budget: 90%
data:
  calibration: {source: a.txt, block: 16}
  distillation: {source: a.txt, block: 16}
  search: {source: a.txt, block: 16}
  report: {source: a.txt, block: 16}
"""
BAD_CUTS: list[tuple[dict[str, Any], str]] = [
    ({}, "there is no selection here"),
    ({"selection": {"schema_version": 1, "layers": [{}, {}]}}, "is for 2 layers"),
    (
        {"selection": {"schema_version": 1, "layers": [{"heads": [0]}, *[{}] * 6]}},
        "same number of `heads`",
    ),
    (
        {"selection": {"schema_version": 1, "layers": [{}] * 7, "hidden": [32]}},
        "has 32 hidden channels",
    ),
]


@pytest.mark.parametrize(("best", "message"), BAD_CUTS)
def test_the_stage_refuses_what_does_not_fit_in_one_line(
    best: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path / "teacher")
    (tmp_path / "r.yaml").write_text(RECIPE)
    run = tmp_path / "run"
    RunFolder(run).run_stage(
        "search", "search", {}, lambda work: atomic_write_json(work / "best.json", best)
    )
    capsys.readouterr()
    assert main(["prune", "r.yaml", "--run", "run"]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and "Traceback" not in said
    assert not list(run.glob("pruned*"))
