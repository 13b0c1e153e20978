"""Architecture, table, slicing, walk: held against the stock model and against each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minipuzzle import families, model
from minipuzzle.architecture import Architecture
from minipuzzle.errors import UserError
from minipuzzle.selection import LayerSelection, Selection
from minipuzzle.walk import Walk
from tests.tiny import CONFIG, write_tiny

FULL: dict[str, Any] = {
    "model_type": "nemotron_h",
    "vocab_size": 131072,
    "mamba_head_dim": 64,
    "n_groups": 8,
    "conv_kernel": 4,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
P8 = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
P56 = (
    "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-"
    "M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
)
P47 = (
    "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-M-"
    "M-M-M-M-"
)
P9 = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"


def config(
    pattern: str, hidden: int, heads: int, state: int, ffn: int, queries: int, **more: int
) -> dict[str, Any]:
    return FULL | {
        "hybrid_override_pattern": pattern,
        "hidden_size": hidden,
        "mamba_num_heads": heads,
        "ssm_state_size": state,
        "intermediate_size": ffn,
        "num_attention_heads": queries,
        **more,
    }


PUBLISHED: dict[str, tuple[dict[str, Any], int | None]] = {
    "8B": (config(P8, 4096, 128, 128, 21504, 32), 8_100_852_736),
    "56B": (config(P56, 8192, 256, 256, 32768, 64), 56_324_350_464),
    "47B": (config(P47, 8192, 256, 256, 30720, 64), None),
    "9B-v2": (config(P9, 4480, 128, 128, 15680, 40, mamba_head_dim=80), None),
    "toy": (
        config("M*M-", 768, 24, 128, 3072, 16, head_dim=48) | {"vocab_size": 131072},
        None,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_equal_the_built_model(name: str) -> None:
    """Every pattern of facts of the family; the stock class is built without memory."""
    from transformers import AutoModelForCausalLM

    raw, known = PUBLISHED[name]
    family, architecture = families.read(raw)
    stock = model.transformers_config(family, dict(raw), architecture)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(stock)
    shapes = {n: tuple(p.shape) for n, p in built.named_parameters()}
    ours = {family.memory_name(s.name): s.shape for s in family.tensors(architecture)}
    assert ours == shapes
    if known is not None:
        assert families.parameter_count(architecture, family) == known


SPELLINGS: dict[str, dict[str, Any]] = {
    "pattern": {"hybrid_override_pattern": "M-M*-M-"},
    "old": {"layers_block_type": ["mamba", "mlp", "mamba", "attention", "mlp", "mamba", "mlp"]},
    "new": {
        "layer_types": [
            "linear_attention",
            "mlp",
            "linear_attention",
            "full_attention",
            "mlp",
            "linear_attention",
            "mlp",
        ]
    },
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_reads_and_writes(spelling: str) -> None:
    raw = {k: v for k, v in CONFIG.items() if k != "hybrid_override_pattern"} | SPELLINGS[spelling]
    family, architecture = families.read(raw)
    assert architecture.pattern == "M-M*-M-"
    written = family.write_config(
        raw | {"n_routed_experts": 8, "num_experts_per_tok": 2}, architecture
    )
    assert written["hybrid_override_pattern"] == "M-M*-M-" and written["num_hidden_layers"] == 7
    assert not [k for k in written if "expert" in k or k in ("layers_block_type", "layer_types")]
    assert families.read(written)[1] == architecture
    assert Architecture.from_json(json.loads(json.dumps(architecture.to_json()))) == architecture


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hybrid_override_pattern": "M-E-M*-"}, "layer 2 is an expert layer"),
        ({"hybrid_override_pattern": "M-X"}, "unknown type 'X'"),
        ({"num_hidden_layers": 3}, "`num_hidden_layers` is 3"),
        ({"model_type": "llama2"}, "'llama2'"),
        ({"intermediate_size": [48, 40]}, "must be one integer"),
        ({"n_groups": 3}, "`heads % groups == 0`"),
        ({"hidden_size": 0}, "`hidden >= 1`"),
    ],
)
def test_strange_configs_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match="^[^\n]*" + message.replace("*", r"\*")):
        families.read(CONFIG | change)


@st.composite
def selections(draw: st.DrawFn) -> Selection:
    """Any cut of the tiny model that keeps the family's constraints."""

    def subset(size: int, number: int) -> tuple[int, ...]:
        return tuple(sorted(draw(st.permutations(range(size)))[:number]))

    def grouped(size: int, groups: list[int], per: int, keep: int) -> tuple[int, ...]:
        return tuple(g * per + i for g in groups for i in subset(per, keep))

    width, heads, kv, queries = (draw(st.integers(1, top)) for top in (48, 4, 2, 2))
    layers: list[dict[str, tuple[int, ...]] | None] = []
    for letter in CONFIG["hybrid_override_pattern"]:
        if draw(st.integers(0, 4)) == 0:
            layers.append(None)
        elif letter == "-":
            layers.append({"width": subset(48, width)})
        elif letter == "M":
            layers.append({"heads": grouped(8, [0, 1], 4, heads)})
        else:
            groups = list(subset(2, kv))
            kept = grouped(4, groups, 2, queries)
            layers.append({"kv_heads": tuple(groups), "query_heads": kept})
    if all(axes is None for axes in layers):
        layers[0] = {}
    return Selection(layers=tuple(layers))


@settings(max_examples=60, deadline=None)
@given(selections())
def test_selections_round_trip_and_compose_with_identity(selection: Selection) -> None:
    _, architecture = families.read(CONFIG)
    assert Selection.from_json(json.loads(json.dumps(selection.to_json()))) == selection
    cut = selection.apply(architecture)
    again = selection.compose(Selection.identity(cut))
    assert again == selection
    assert Selection.identity(architecture).compose(selection) == selection


def test_cuts_that_break_a_constraint_are_refused() -> None:
    _, architecture = families.read(CONFIG)
    whole: list[LayerSelection | None] = [{} for _ in architecture.layers]
    cuts: list[tuple[int, LayerSelection, str]] = [
        (0, {"heads": (0, 1, 2, 4)}, "same number"),
        (0, {"width": (0,)}, "no axis `width`"),
        (1, {"width": (48,)}, "has 48 units"),
        (3, {"kv_heads": (0,)}, "same number"),
    ]
    for i, axes, message in cuts:
        with pytest.raises(UserError, match=message):
            Selection(tuple(axes if j == i else x for j, x in enumerate(whole))).apply(architecture)
    with pytest.raises(UserError, match="ascend"):
        Selection(({"width": (3, 1)},))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> model.Model:
    return model.load(write_tiny(tmp_path_factory.mktemp("models") / "tiny"))


IDS = torch.randint(0, 97, (3, 29), generator=torch.Generator().manual_seed(1))


def test_the_walk_is_the_model(tiny: model.Model) -> None:
    walk = Walk(tiny)
    expected = tiny.module(IDS).logits
    torch.testing.assert_close(walk.logits(walk.states(IDS)), expected, atol=1e-5, rtol=1e-5)
    whole = Selection.identity(tiny.architecture)
    assert torch.equal(walk.states(IDS, whole), walk.states(IDS))


def test_a_wrong_shape_is_refused(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"intermediate_size": 40}))
    with pytest.raises(UserError, match="up_proj.weight has shape"):
        model.load(folder)
