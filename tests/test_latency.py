"""The latency table: parts are recovered from whole times, sizes interpolated, records kept.

No time is asserted: a clock that gives made-up times stands in for the device.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minipuzzle import decoding, families
from minipuzzle.architecture import Architecture, AttentionLayer, FFNLayer, Layer, MambaLayer
from minipuzzle.decoding import Decoder, Pool, memory_is_a_user_error, needed_bytes, step_seconds
from minipuzzle.errors import UserError
from minipuzzle.latency import LatencyTable, fingerprint
from minipuzzle.latencygrid import Grid, grids, thinned
from minipuzzle.latencyplan import Plan
from minipuzzle.memory import Deployment
from minipuzzle.plan import with_width, without
from tests.tiny import CONFIGS

AT = Deployment(context=24, batch=2)
CPU = torch.device("cpu")
SIZES = {
    "width": [16, 24, 32, 48],
    "heads": [4, 8],
    "kv_heads": [1, 2],
    "query_heads": [2, 4],
    "hidden": [24, 32],
}


def true_seconds(architecture: Architecture) -> float:
    """An invented machine on which time is additive and linear along every axis."""

    def layer_seconds(layer: Layer) -> float:
        if isinstance(layer, MambaLayer):
            return 3e-3 + 1e-4 * layer.heads * architecture.hidden
        if isinstance(layer, AttentionLayer):
            return 2e-3 + 1e-4 * layer.kv_heads + 1e-4 * layer.query_heads
        return 1e-3 + 1e-5 * layer.width * architecture.hidden

    return 5e-3 + 1e-4 * architecture.hidden + sum(map(layer_seconds, architecture.layers))


def made_up_table(family: str, sizes: Mapping[str, Any] = SIZES) -> LatencyTable:
    table, architecture = families.read(CONFIGS[family])
    plan = Plan.make(architecture, table, AT, sizes)
    times = {name: true_seconds(probe.architecture) for name, probe in plan.probes.items()}
    return LatencyTable.fit(plan, times, CPU, torch.float32)


def test_the_parts_of_an_additive_machine_are_found_exactly() -> None:
    _, whole = families.read(CONFIGS["nemotron_h"])
    table = made_up_table("nemotron_h")
    assert table.misfit < 1e-9
    half = FFNLayer(28)  # between two sizes that were measured
    for other in (
        whole,
        without(whole, "mamba", 2),
        with_width(whole, 40),
        replace(whole, hidden=24),
        replace(whole, layers=(*whole.layers, half, MambaLayer(4, 8, 2, 16, 4))),
        replace(whole, layers=(*whole.layers[:4], AttentionLayer(2, 1, 8), half), hidden=28),
        replace(whole, layers=(*whole.layers, AttentionLayer(2, 2, 8))),
    ):
        assert table.of(other) == pytest.approx(true_seconds(other), rel=1e-6)
    assert table.base() == pytest.approx(5e-3 + 32e-4)
    assert table.layer(half) == pytest.approx(1e-3 + 1e-5 * 28 * 32)


def test_layers_that_come_in_blocks_share_a_blocks_time() -> None:
    _, whole = families.read(CONFIGS["llama"])
    sizes = {"width": [16, 32, 48], "kv_heads": [1, 2]}
    table = made_up_table("llama", sizes)
    for blocks in (1, 2, 3):
        for width in (16, 40, 48):
            cut = with_width(replace(whole, layers=whole.layers[: 2 * blocks]), width)
            assert table.of(cut) == pytest.approx(true_seconds(cut), rel=1e-6)
    assert table.layer(whole.layers[0]) > 0 and table.layer(whole.layers[1]) > 0


@given(
    heads=st.integers(1, 4).map(lambda n: 2 * n),
    width=st.integers(16, 48),
    hidden=st.integers(24, 32),
)
def test_interpolation_stays_between_its_neighbours(heads: int, width: int, hidden: int) -> None:
    table = made_up_table("nemotron_h", SIZES | {"heads": [2, 8]})
    mamba = MambaLayer(heads, 8, 2, 16, 4)
    for layer in (mamba, FFNLayer(width)):
        known = table.seconds[layer.kind].values()
        assert min(known) - 1e-12 <= table.layer(layer, hidden) <= max(known) + 1e-12


@pytest.mark.parametrize(
    ("layer", "hidden", "message"),
    [
        (FFNLayer(64), 32, "ffn layers of width 16 to 48, not 64"),
        (FFNLayer(8), 32, "not 8; measure it again"),
        (FFNLayer(48), 64, "of hidden 24 to 32, not 64"),
        (FFNLayer(48, gated=True), 32, "holds layers like"),
        (MambaLayer(16, 8, 2, 16, 4), 32, "heads 2 to 4 per group, not 8"),
    ],
)
def test_what_was_not_measured_is_refused(layer: Layer, hidden: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        made_up_table("nemotron_h").layer(layer, hidden)
    with pytest.raises(UserError, match="hidden sizes 24 to 32, not 23"):
        made_up_table("nemotron_h").base(23)


def test_a_kind_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(UserError, match="no mamba layers"):
        made_up_table("llama", {}).layer(MambaLayer(8, 8, 2, 16, 4))


def test_records_are_read_back_equal(tmp_path: Path) -> None:
    table = made_up_table("nemotron_h")
    record = json.loads(json.dumps(table.to_json()))
    assert LatencyTable.from_json(record) == table
    table.save(tmp_path / "latency.json")
    assert LatencyTable.load(tmp_path / "latency.json") == table
    with pytest.raises(UserError, match="schema version 9"):
        LatencyTable.from_json(record | {"schema_version": 9})
    (tmp_path / "latency.json").write_text('{"schema_version": 1}')
    with pytest.raises(UserError, match="is not a latency table"):
        LatencyTable.load(tmp_path / "latency.json")


def test_the_fingerprint_is_of_what_times_depend_on() -> None:
    family, whole = families.read(CONFIGS["nemotron_h"])

    def mark(at: Deployment = AT, sizes: Mapping[str, Any] = SIZES, dtype: Any = None) -> str:
        return fingerprint(whole, family, at, sizes, CPU, dtype or torch.float32)

    assert mark() == made_up_table("nemotron_h").fingerprint
    assert mark(replace(AT, reserve_bytes=2**30, weights="nvfp4")) == mark()
    others = [
        mark(replace(AT, batch=3)),
        mark(replace(AT, context=25)),
        mark(sizes={"width": [16, 48]}),
        mark(dtype=torch.bfloat16),
    ]
    assert len({mark(), *others}) == 5


def test_a_grid_has_the_models_own_layer_and_only_layers_that_exist() -> None:
    _, whole = families.read(CONFIGS["nemotron_h"])
    for kind, grid in grids(whole, SIZES | {"heads": range(1, 9)}, [32]).items():
        layers = [grid.layer_at(place) for place in grid.places()]
        assert grid.layer in layers and len(set(layers)) == len(layers), kind
        assert [grid.place(layer, 32) for layer in layers] == list(grid.places())
    grid = Grid.spanning(FFNLayer(704), [192], {"width": range(176, 705, 16)})
    assert len(grid.knots["width"]) == 5 and grid.knots["width"][0] == 176


def test_thinning_keeps_the_ends_and_the_own_size() -> None:
    assert thinned(set(range(0, 100)), 7, 5) == (0, 7, 25, 50, 74, 99)
    assert thinned({3, 1, 2}, 2, 5) == (1, 2, 3)


@pytest.mark.parametrize("family", ["nemotron_h", "llama"])
@pytest.mark.parametrize("tied", [False, True])
def test_measuring_gives_a_table_of_real_models(family: str, tied: bool) -> None:
    if tied and family == "nemotron_h":
        pytest.skip("the stock class does not tie")
    config = CONFIGS[family] | {"tie_word_embeddings": tied}
    table, whole = families.read(config)
    sizes = {"width": [16, 48]}
    measured = LatencyTable.measure(whole, table, config, AT, sizes, "cpu", torch.float32, rounds=2)
    assert measured.of(whole) > 0 and measured.of(with_width(whole, 20)) > 0
    assert measured.fingerprint == fingerprint(whole, table, AT, sizes, CPU, torch.float32)


def test_a_step_is_at_the_deployments_context_every_time() -> None:
    family, whole = families.read(CONFIGS["nemotron_h"])
    decoder = Decoder(whole, family, CONFIGS["nemotron_h"], AT, Pool(CPU, torch.float32))
    for _ in range(3):
        decoder.step()
        assert decoder._cache.get_seq_length() == AT.context
        assert decoder._cache.layers[3].keys.shape == (AT.batch, 2, AT.context, 8)


def test_models_share_the_tensors_of_equal_parts() -> None:
    family, whole = families.read(CONFIGS["nemotron_h"])
    smaller = without(whole, "ffn", 1)
    both = needed_bytes([whole, smaller], family, AT, torch.float32)
    assert both < 1.5 * needed_bytes([whole], family, AT, torch.float32)
    pool = Pool(CPU, torch.float32)
    one, other = (
        decoding.stock_model(x, family, CONFIGS["nemotron_h"], pool) for x in (whole, smaller)
    )
    pointers = {parameter.data_ptr() for parameter in one.parameters()}
    assert {parameter.data_ptr() for parameter in other.parameters()} <= pointers
    assert len(pointers) == len(list(one.parameters()))


def test_needed_memory_is_what_a_decoder_holds() -> None:
    family, whole = families.read(CONFIGS["llama"])
    decoder = Decoder(whole, family, CONFIGS["llama"], AT, pool := Pool(CPU, torch.float32))
    held = sum(tensor.nbytes for tensor in pool._tensors.values())
    weights = sum(parameter.nbytes for parameter in decoder._module.parameters())
    cached = AT.batch * (AT.context - 1) * 3 * 2 * 2 * 8 * 4
    assert held == weights + cached
    assert held <= needed_bytes([whole], family, AT, torch.float32) < 1.5 * held


def test_no_room_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    family, whole = families.read(CONFIGS["nemotron_h"])
    far = Deployment(context=2**45)
    with pytest.raises(UserError, match="a latency table needs .* on cpu, and .* are free; use"):
        LatencyTable.measure(whole, family, CONFIGS["nemotron_h"], far, {}, "cpu", torch.float32)
    with (
        pytest.raises(UserError, match="smaller deployment.context"),
        memory_is_a_user_error(1, CPU, "a table"),
    ):
        raise torch.OutOfMemoryError("no more")


class Clockwork:
    """Stands in for a decoder: gives prepared times."""

    def __init__(self, *times: float) -> None:
        self.times = list(times)

    def step(self) -> float:
        return self.times.pop(0) if len(self.times) > 1 else self.times[0]


def test_slow_steps_and_the_first_of_a_turn_do_not_count() -> None:
    busy: Any = Clockwork(*(9.0 if i % 4 in (0, 3) else 1.0 for i in range(40)))
    quiet: Any = Clockwork(2.0)
    found = step_seconds({"busy": busy, "quiet": quiet}, rounds=10, limit=60)
    assert found == {"busy": 1.0, "quiet": 2.0}
    assert len(busy.times) == 1
