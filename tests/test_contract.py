"""What every family owes the rest of minipuzzle: held against its stock model and itself.

A family is one entry of `FAMILIES` here: a strategy of small configurations, and what its stock
class asks of the cut beyond the family-independent rules. Everything else comes from the table.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from minipuzzle import families, model
from minipuzzle.architecture import Architecture, AttentionLayer, Layer
from minipuzzle.checkpoint import Checkpoint
from minipuzzle.errors import UserError
from minipuzzle.masks import masked
from minipuzzle.prune.slice import slice_checkpoint
from minipuzzle.selection import CUT_AXES, Indices, LayerSelection, Selection, narrow
from minipuzzle.walk import Walk
from tests.tiny import CONFIGS, write_tiny

IDS = torch.randint(0, 97, (2, 19), generator=torch.Generator().manual_seed(6))
EXAMPLES = settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
)


@st.composite
def nemotron_h(draw: st.DrawFn) -> dict[str, Any]:
    """Changes to the tiny configuration: any pattern, sizes, biases."""
    groups, kv = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 3]))
    return {
        "hybrid_override_pattern": draw(st.text("M*-", min_size=1, max_size=5)),
        "hidden_size": draw(st.integers(2, 12)),
        "mamba_num_heads": groups * draw(st.integers(1, 3)),
        "mamba_head_dim": draw(st.integers(1, 4)),
        "n_groups": groups,
        "ssm_state_size": draw(st.sampled_from([4, 8])),
        "use_conv_bias": draw(st.booleans()),
        "use_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        "num_attention_heads": kv * draw(st.integers(1, 3)),
        "num_key_value_heads": kv,
        "head_dim": draw(st.sampled_from([2, 4])),
        "intermediate_size": draw(st.integers(1, 12)),
    }


@st.composite
def llama(draw: st.DrawFn) -> dict[str, Any]:
    """Changes to the tiny configuration; transformers wants hidden % query heads == 0."""
    kv = draw(st.sampled_from([1, 2]))
    heads = kv * draw(st.integers(1, 3))
    return {
        "num_hidden_layers": draw(st.integers(1, 3)),
        "hidden_size": 12 * draw(st.integers(1, 2)),  # 12 % any number of heads here is 0
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": draw(st.sampled_from([2, 4])),
        "intermediate_size": draw(st.integers(1, 12)),
    }


@dataclass(frozen=True)
class Contract:
    """One family: its small configurations, and what its kept hidden channels must divide by."""

    configs: Callable[[], st.SearchStrategy[dict[str, Any]]]
    hidden_multiple: Callable[[Architecture], int]


def _query_heads(architecture: Architecture) -> int:
    return next(x.query_heads for x in architecture.layers if isinstance(x, AttentionLayer))


FAMILIES = {
    "nemotron_h": Contract(nemotron_h, lambda _: 1),
    "llama": Contract(llama, _query_heads),
}
each_family = pytest.mark.parametrize("family", FAMILIES)


def test_a_tied_hybrid_is_refused() -> None:
    """The stock class does not tie: it would run with a random head, and say nothing."""
    with pytest.raises(UserError, match="^[^\n]*`tie_word_embeddings`[^\n]*$"):
        families.read(CONFIGS["nemotron_h"] | {"tie_word_embeddings": True})


def test_every_family_is_held_to_the_contract() -> None:
    assert set(FAMILIES) == set(families.FAMILIES) == set(CONFIGS)


@dataclass(frozen=True)
class Case:
    """A teacher and a cut of it, both small enough to shrink well."""

    family: str
    changes: dict[str, Any]
    selection: Selection

    @property
    def config(self) -> dict[str, Any]:
        return _config(self.family, self.changes)


def _config(family: str, changes: dict[str, Any]) -> dict[str, Any]:
    config = CONFIGS[family] | changes
    if "hybrid_override_pattern" in changes:
        config["num_hidden_layers"] = len(changes["hybrid_override_pattern"])
    return config


def _subset(draw: st.DrawFn, size: int, number: int) -> Indices:
    return tuple(sorted(draw(st.permutations(range(size)))[:number]))


def _axes(draw: st.DrawFn, layer: Layer, sizes: dict[str, int]) -> LayerSelection:
    """A random choice of `sizes` units on every axis; units of a group stay together."""
    axes: dict[str, Indices] = {}
    for axis in CUT_AXES[layer.kind]:
        size, keep = getattr(layer, axis), sizes[axis]
        if layer.grouping and axis == layer.grouping[0]:
            groups = axes[layer.grouping[1]]
            per = size // getattr(layer, layer.grouping[1])
            axes[axis] = tuple(g * per + unit for g in groups for unit in _subset(draw, per, keep))
        else:
            axes[axis] = _subset(draw, size, keep)
    return axes


@st.composite
def selections(draw: st.DrawFn, family: str, architecture: Architecture) -> Selection:
    """Any cut that the family's files can hold: one shape per kind, whole blocks removed."""
    table = families.FAMILIES[family]
    sizes: dict[str, dict[str, int]] = {}
    for layer in architecture.layers:
        if layer.kind not in sizes:
            tops = {axis: getattr(layer, axis) for axis in CUT_AXES[layer.kind]}
            if layer.grouping:
                tops[layer.grouping[0]] //= tops[layer.grouping[1]]
            sizes[layer.kind] = {axis: draw(st.integers(1, top)) for axis, top in tops.items()}
    layers: list[LayerSelection | None] = [
        _axes(draw, layer, sizes[layer.kind]) for layer in architecture.layers
    ]
    units = table.removable(architecture)
    for unit in _subset(draw, len(units), draw(st.integers(0, len(units) - 1))):
        for i in units[unit]:
            layers[i] = None
    narrowed = Selection(tuple(layers))
    multiple = FAMILIES[family].hidden_multiple(narrowed.apply(architecture))
    most = architecture.hidden // multiple
    least = 0 if architecture.hidden % multiple == 0 else 1
    keep = draw(st.integers(least, most)) * multiple
    hidden = _subset(draw, architecture.hidden, keep) if keep else None
    return Selection(narrowed.layers, hidden)


@st.composite
def cases(draw: st.DrawFn, family: str) -> Case:
    changes = draw(FAMILIES[family].configs())
    _, architecture = families.read(_config(family, changes))
    return Case(family, changes, draw(selections(family, architecture)))


@contextmanager
def folders() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def _write(case: Case, folder: Path) -> Path:
    return write_tiny(folder / "teacher", family=case.family, **case.changes)


def _same_files(one: Path, other: Path) -> None:
    first, second = Checkpoint.open(one), Checkpoint.open(other)
    assert sorted(first.names) == sorted(second.names)
    for name in first.names:
        assert torch.equal(first.tensor(name), second.tensor(name)), name


@each_family
@EXAMPLES
@given(data=st.data())
def test_the_table_is_the_built_model(family: str, data: st.DataObject) -> None:
    """Names, shapes and the number of parameters, tied or not, with and without biases."""
    from transformers import AutoModelForCausalLM

    config = _config(family, data.draw(FAMILIES[family].configs()))
    table, architecture = families.read(config)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(
            model.transformers_config(table, config, architecture)
        )
    stock = {name: tuple(parameter.shape) for name, parameter in built.named_parameters()}
    assert {table.memory_name(s.name): s.shape for s in table.tensors(architecture)} == stock
    number = sum(parameter.numel() for parameter in built.parameters())
    assert families.parameter_count(architecture, table) == number


@each_family
@EXAMPLES
@given(data=st.data())
def test_configurations_round_trip(family: str, data: st.DataObject) -> None:
    """Of the uncut model and of the cut one, through config.json's text."""
    case = data.draw(cases(family))
    table, architecture = families.read(case.config)
    for shape in (architecture, case.selection.apply(architecture)):
        written = json.loads(json.dumps(table.write_config(case.config, shape)))
        again, read = families.read(written)
        assert (again.name, read) == (family, shape)


@each_family
@EXAMPLES
@given(data=st.data())
def test_masked_equals_sliced_equals_planned(family: str, data: st.DataObject) -> None:
    case = data.draw(cases(family))
    with folders() as folder, torch.no_grad():
        teacher = model.load(_write(case, folder))
        slice_checkpoint(teacher.folder, folder / "cut", case.selection)
        cut = model.load(folder / "cut")
        planned = case.selection.apply(teacher.architecture)
        assert cut.architecture == planned
        number = sum(parameter.numel() for parameter in cut.module.parameters())
        assert number == families.parameter_count(planned, cut.family)
        sliced = cut.module(IDS, use_cache=False).logits
        before = teacher.module(IDS, use_cache=False).logits
        with masked(teacher, case.selection) as module:
            shown = module(IDS, use_cache=False).logits
        torch.testing.assert_close(shown, sliced, atol=2e-4, rtol=1e-4)
        assert torch.equal(teacher.module(IDS, use_cache=False).logits, before), "hooks stayed"


@each_family
@EXAMPLES
@given(data=st.data())
def test_two_cuts_are_their_composition_bit_for_bit(family: str, data: st.DataObject) -> None:
    first = data.draw(cases(family))
    table, architecture = families.read(first.config)
    cut = first.selection.apply(architecture)
    later = data.draw(selections(family, cut))
    both = first.selection.compose(later)
    assert both.apply(architecture) == later.apply(cut)
    assert Selection.from_json(json.loads(json.dumps(both.to_json()))) == both
    with folders() as folder:
        source = _write(first, folder)
        slice_checkpoint(source, folder / "one", first.selection)
        slice_checkpoint(folder / "one", folder / "two", later)
        slice_checkpoint(source, folder / "both", both)
        _same_files(folder / "two", folder / "both")
        assert families.read(json.loads((folder / "two" / "config.json").read_text())) == (
            table,
            both.apply(architecture),
        )


@each_family
@EXAMPLES
@given(data=st.data())
def test_keeping_everything_is_the_identity_bit_for_bit(family: str, data: st.DataObject) -> None:
    """Said by keeping quiet about every axis, and by naming all of its units."""
    changes = data.draw(FAMILIES[family].configs())
    _, architecture = families.read(_config(family, changes))
    named = Selection(
        tuple(
            {axis: tuple(range(getattr(layer, axis))) for axis in CUT_AXES[layer.kind]}
            for layer in architecture.layers
        ),
        hidden=tuple(range(architecture.hidden)),
    )
    with folders() as folder, torch.no_grad():
        source = _write(Case(family, changes, named), folder)
        slice_checkpoint(source, folder / "quiet", Selection.identity(architecture))
        slice_checkpoint(source, folder / "named", named)
        _same_files(source, folder / "quiet")
        _same_files(source, folder / "named")
        teacher, same = model.load(source), model.load(folder / "quiet")
        with masked(teacher, Selection.identity(architecture)) as module:
            assert torch.equal(
                module(IDS, use_cache=False).logits, same.module(IDS, use_cache=False).logits
            )


@each_family
@EXAMPLES
@given(data=st.data())
def test_the_walk_is_the_stock_forward(family: str, data: st.DataObject) -> None:
    """Of the uncut model; and under a cut of its layers, of the sliced one."""
    case = data.draw(cases(family))
    narrowed = Selection(case.selection.layers)
    with folders() as folder, torch.no_grad():
        teacher = model.load(_write(case, folder))
        walk = Walk(teacher)
        expected = teacher.module(IDS, use_cache=False).logits
        torch.testing.assert_close(walk.logits(walk.states(IDS)), expected, atol=1e-5, rtol=1e-5)
        with masked(teacher, narrowed) as module:
            shown = module(IDS, use_cache=False).logits
        walked = walk.logits(walk.states(IDS, narrowed))
        torch.testing.assert_close(walked, shown, atol=2e-4, rtol=1e-4)


@each_family
@EXAMPLES
@given(data=st.data())
def test_groups_stay_whole(family: str, data: st.DataObject) -> None:
    """A choice of units fits exactly when all kept groups keep as many and cut ones none.

    What fits leaves every unit in the group that it was in.
    """
    _, architecture = families.read(_config(family, data.draw(FAMILIES[family].configs())))
    grouped = [layer for layer in architecture.layers if layer.grouping]
    if not grouped:
        return
    layer = data.draw(st.sampled_from(grouped))
    assert layer.grouping is not None
    axis, by = layer.grouping
    size, groups = getattr(layer, axis), getattr(layer, by)
    kept_groups = tuple(sorted(data.draw(st.sets(st.integers(0, groups - 1), min_size=1))))
    kept = tuple(sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1))))
    per = size // groups
    counts = [sum(unit // per == g for unit in kept) for g in range(groups)]
    fits = {counts[g] for g in kept_groups} == {max(counts)} and sum(counts) == max(counts) * len(
        kept_groups
    )
    if not fits:
        with pytest.raises(UserError, match="same number"):
            narrow(layer, {axis: kept, by: kept_groups}, where="layer 0")
        return
    left = narrow(layer, {axis: kept, by: kept_groups}, where="layer 0")
    own = getattr(left, axis) // getattr(left, by)
    assert [kept_groups[place // own] for place in range(len(kept))] == [u // per for u in kept]


@each_family
@EXAMPLES
@given(data=st.data())
def test_a_choice_of_groups_takes_their_units_along(family: str, data: st.DataObject) -> None:
    _, architecture = families.read(_config(family, data.draw(FAMILIES[family].configs())))
    layers: list[LayerSelection] = []
    for layer in architecture.layers:
        groups = getattr(layer, layer.grouping[1]) if layer.grouping else 1
        number = data.draw(st.integers(1, groups))
        kept = tuple(range(groups))[-number:]
        layers.append({layer.grouping[1]: kept} if layer.grouping else {})
    cut = Selection(tuple(layers)).completed(architecture).apply(architecture)
    for old, new, axes in zip(architecture.layers, cut.layers, layers, strict=True):
        if old.grouping is not None:
            axis, by = old.grouping
            assert getattr(new, by) == len(axes[by])
            assert getattr(new, axis) * getattr(old, by) == getattr(old, axis) * getattr(new, by)


@each_family
def test_what_does_not_fit_is_refused(family: str) -> None:
    """One line, before anything is written."""
    _, architecture = families.read(CONFIGS[family])
    for layer in architecture.layers:
        for axis in CUT_AXES[layer.kind]:
            size = getattr(layer, axis)
            with pytest.raises(UserError, match=f"^layer 7: [^\n]*{size} units[^\n]*$"):
                narrow(layer, {axis: tuple(range(size + 1))}, where="layer 7")
        for axis in ("depth", "state", "conv", "gated", "hidden"):
            with pytest.raises(UserError, match=f"^layer 7: [^\n]*no axis `{axis}`[^\n]*$"):
                narrow(layer, {axis: (0,)}, where="layer 7")
    whole: list[LayerSelection] = [{} for _ in architecture.layers]
    with pytest.raises(UserError, match="is for"):
        Selection(tuple(whole[1:])).apply(architecture)
    with pytest.raises(UserError, match="hidden channels"):
        Selection(tuple(whole), hidden=(architecture.hidden,)).apply(architecture)
    with pytest.raises(UserError, match="every layer"):
        Selection((None,) * len(whole)).apply(architecture)
