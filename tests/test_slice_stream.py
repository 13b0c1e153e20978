"""Streamed slicing and writing: against `take` of whole tensors and files of the library."""

from __future__ import annotations

import json
import os
import signal
import sys
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from minipuzzle import families, model
from minipuzzle.checkpoint import Checkpoint
from minipuzzle.errors import UserError
from minipuzzle.prune.slice import (
    COMPARED_BLOCKS,
    COMPARED_BYTES,
    _compared_rows,
    compared_share,
    differing_tensor,
    slice_checkpoint,
)
from minipuzzle.selection import LayerSelection, Selection
from minipuzzle.shards import DTYPES, INDEX, SINGLE, TensorPlan, lay_out, tensor_bytes
from minipuzzle.slicing import plan_tensors, sliced_blocks, take
from minipuzzle.writer import CheckpointWriter, write_checkpoint
from tests.tiny import CONFIG, write_tiny

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import bench_prune
import make_checkpoint

MANY = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
PLANS = [TensorPlan("a", (4, 3), torch.float32), TensorPlan("b", (5,), torch.bfloat16)]
TENSORS = {plan.name: torch.randn(plan.shape).to(plan.dtype) for plan in PLANS}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and tensor_bytes(a) == tensor_bytes(b)


def noise(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Random bits: NaN, infinities and negative zero among them."""
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (count,), dtype=torch.uint8).view(dtype).reshape(shape)


@st.composite
def subsets(draw: st.DrawFn, size: int) -> torch.Tensor | None:
    """None, scattered positions, or runs of neighbours (what heads leave)."""
    unit = draw(st.sampled_from([u for u in (1, 2, 3, 4, 8) if size % u == 0]))
    kept = draw(st.none() | st.sets(st.integers(0, size // unit - 1), min_size=1))
    if kept is None:
        return None
    return torch.tensor([u * unit + i for u in sorted(kept) for i in range(unit)])


@MANY
@given(
    data=st.data(),
    shape=st.lists(st.integers(1, 24), min_size=0, max_size=3).map(tuple),
    dtype=st.sampled_from(list(DTYPES.values())),
    block_bytes=st.integers(1, 400),
)
def test_blocks_together_are_the_slice(
    tmp_path: Path,
    data: st.DataObject,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    block_bytes: int,
) -> None:
    tensor = noise(shape, dtype)
    index = tuple(data.draw(subsets(size)) for size in shape)
    save_file({"before": torch.zeros(3), "t": tensor}, tmp_path / SINGLE)
    blocks = [
        block.clone()
        for block in sliced_blocks(Checkpoint.open(tmp_path), "t", index, block_bytes=block_bytes)
    ]
    found = torch.cat(blocks) if shape else blocks[0]
    assert same_bits(found, take(tensor.view(INTEGERS[dtype.itemsize]), index).view(dtype))
    if shape:
        row = tensor[0].numel() * dtype.itemsize
        assert all(len(block) <= max(1, block_bytes // row) for block in blocks)


INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Cut:
    """A tiny hybrid and what is kept of it."""

    changes: dict[str, Any]
    selection: Selection


@st.composite
def cuts(draw: st.DrawFn) -> Cut:
    """Random tiny hybrids and random cuts of layers, units and hidden channels."""

    def subset(size: int, number: int) -> tuple[int, ...]:
        return tuple(sorted(draw(st.permutations(range(size)))[:number]))

    pattern = draw(st.text("M*-", min_size=1, max_size=5))
    hidden, width = draw(st.sampled_from([8, 20, 32])), draw(st.integers(1, 48))
    groups, per = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    kept_width, kept_heads = draw(st.integers(1, width)), draw(st.integers(1, per))
    layers: list[LayerSelection | None] = []
    for letter in pattern:
        heads = tuple(g * per + i for g in range(groups) for i in subset(per, kept_heads))
        axes = {"-": {"width": subset(width, kept_width)}, "M": {"heads": heads}}.get(letter, {})
        layers.append(None if draw(st.integers(0, 4)) == 0 else axes)
    if all(axes is None for axes in layers):
        layers[0] = {}
    channels = draw(st.none() | st.integers(1, hidden))
    changes = {
        "hybrid_override_pattern": pattern,
        "hidden_size": hidden,
        "intermediate_size": width,
        "n_groups": groups,
        "mamba_num_heads": groups * per,
    }
    kept = None if channels is None else subset(hidden, channels)
    return Cut(changes, Selection(tuple(layers), hidden=kept))


@MANY
@given(
    cut=cuts(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn]),
    block_bytes=st.sampled_from([1, 64, 500, 2**20]),
    shard_bytes=st.sampled_from([1, 3000, 2**30]),
)
def test_the_streamed_cut_is_take_of_whole_tensors(
    tmp_path: Path, cut: Cut, dtype: torch.dtype, block_bytes: int, shard_bytes: int
) -> None:
    source = write_tiny(tmp_path / "model", dtype=dtype, **cut.changes)
    target = tmp_path / "cut"
    slice_checkpoint(
        source,
        target,
        cut.selection,
        block_bytes=block_bytes,
        max_shard_bytes=shard_bytes,
        sync=False,
    )
    family, architecture = families.read(CONFIG | cut.changes | {"num_hidden_layers": None})
    parent, written = Checkpoint.open(source), Checkpoint.open(target)
    planned = list(plan_tensors(family, architecture, cut.selection))
    assert set(written.names) == {new.name for new, _, _ in planned}
    for new, old, index in planned:
        whole = parent.tensor(old.name).view(INTEGERS[dtype.itemsize])
        assert same_bits(written.tensor(new.name), take(whole, index).view(dtype)), new.name
    assert differing_tensor(source, target, cut.selection) is None
    assert compared_share(target) == 1.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "model"]


@MANY
@given(
    plans=st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(list(DTYPES.values())), st.lists(st.integers(0, 3), max_size=3)),
        max_size=8,
    )
)
def test_files_are_those_of_the_library(
    tmp_path: Path, plans: dict[str, tuple[torch.dtype, list[int]]]
) -> None:
    """Byte for byte, so that runs of former versions and ours have the same fingerprints."""
    tensors = {name: noise(tuple(shape), dtype) for name, (dtype, shape) in plans.items()}
    save_file(tensors, tmp_path / "expected", metadata={"format": "pt"})
    write_checkpoint(tmp_path / "model", {}, tensors.items(), sync=False)
    assert (tmp_path / "model" / SINGLE).read_bytes() == (tmp_path / "expected").read_bytes()


def test_peak_memory_is_a_few_blocks(tmp_path: Path) -> None:
    """A matrix of 24 MB, rows and columns gathered; numpy's buffers are traced."""
    torch.manual_seed(0)
    save_file({"w": torch.randn(3000, 2000)}, tmp_path / SINGLE)
    checkpoint = Checkpoint.open(tmp_path)
    index = (torch.arange(0, 3000, 2), torch.arange(0, 2000, 3))
    tracemalloc.start()
    count = sum(len(b) for b in sliced_blocks(checkpoint, "w", index, block_bytes=2**18))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 1500
    assert 2**18 * 0.5 < peak < 2**18 * 4


def test_tensors_may_come_in_any_order_and_in_blocks(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", {"x": 1}, PLANS, max_shard_bytes=1) as writer:
        assert set(writer.order) == {"a", "b"}
        writer.write("b", [TENSORS["b"]])
        assert not (tmp_path / "out").exists()
        writer.write("a", (TENSORS["a"][i : i + 1] for i in range(4)))
    written = Checkpoint.open(tmp_path / "out")
    assert all(same_bits(written.tensor(name), tensor) for name, tensor in TENSORS.items())
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == 4 * 3 * 4 + 5 * 2
    assert list(index["weight_map"]) == ["a", "b"]
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"x": 1}


WRONG: dict[str, list[tuple[str, torch.Tensor]]] = {
    "planned and not written": [("a", TENSORS["a"])],
    "is written twice": [("a", TENSORS["a"])] * 2,
    "is larger than planned": [("a", torch.zeros(5, 3))],
    "is smaller than planned": [("a", torch.zeros(3, 3))],
    "float64, planned": [("a", TENSORS["a"].double())],
}


@pytest.mark.parametrize("told", WRONG)
def test_content_that_is_not_as_planned_leaves_nothing(told: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=told):
        write_checkpoint(tmp_path / "out", {}, WRONG[told], plans=PLANS)
    assert list(tmp_path.iterdir()) == []


def _write_until_killed(folder: Path, victims: list[str]) -> None:
    """In a forked child: write the tensors named, then die like a killed process."""
    child = os.fork()
    if child == 0:
        try:
            with CheckpointWriter(folder, {"new": True}, PLANS) as writer:
                for name in victims:
                    writer.write(name, [TENSORS[name]])
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.skipif(sys.platform == "win32", reason="no fork there")
@pytest.mark.parametrize("victims", [[], ["a"], ["a", "b"]], ids=len)
@pytest.mark.parametrize("existing", [False, True], ids=["fresh", "existing"])
def test_a_killed_writer_leaves_nothing_that_can_be_read(
    victims: list[str], existing: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "out[1]"  # brackets mean something to glob
    if existing:
        write_checkpoint(folder, {"old": True}, TENSORS.items())
    old = {path.name: path.read_bytes() for path in folder.glob("*")}
    (tmp_path / "out[1].tmp-4711").mkdir()  # what former versions left
    _write_until_killed(folder, victims)
    left = [path for path in tmp_path.iterdir() if path != folder]
    assert [path.name for path in left] == ["out[1].tmp-writing"]
    assert not (left[0] / "config.json").exists()
    with pytest.raises(UserError, match="not a whole safetensors file"):
        Checkpoint.open(left[0])
    assert {path.name: path.read_bytes() for path in folder.glob("*")} == old
    write_checkpoint(folder, {"new": True}, TENSORS.items())
    assert list(tmp_path.iterdir()) == [folder]
    assert json.loads((folder / "config.json").read_text()) == {"new": True}


def test_a_replaced_checkpoint_is_never_a_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after any number of moved files, the old config.json does not stand beside them."""
    folder, moves = tmp_path / "out", 0
    original = Path.replace

    def replace(path: Path, target: Path) -> Path:
        nonlocal moves
        moves += 1
        assert not (folder / "config.json").exists()
        return original(path, target)

    write_checkpoint(folder, {"old": True}, TENSORS.items(), max_shard_bytes=1)
    monkeypatch.setattr(Path, "replace", replace)
    write_checkpoint(folder, {"new": True}, TENSORS.items())
    assert moves == 2 and sorted(os.listdir(folder)) == ["config.json", SINGLE]


@pytest.mark.skipif(sys.platform == "win32", reason="no such lock there")
def test_two_writers_of_one_folder_do_not_meet(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", {}, PLANS) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, [tensor])
        with pytest.raises(UserError, match="another process is writing"):
            write_checkpoint(tmp_path / "out", {}, TENSORS.items())
    assert set(Checkpoint.open(tmp_path / "out").names) == {"a", "b"}


def _spoil(folder: Path, how: str) -> None:
    names = Checkpoint.open(folder).names
    tensors = {name: Checkpoint.open(folder).tensor(name).clone() for name in names}
    if how == "lacks":
        tensors.pop("backbone.norm_f.weight")
    elif how == "unexpected":
        tensors["backbone.stranger"] = torch.zeros(2)
    elif how == "shape":
        tensors["backbone.norm_f.weight"] = torch.zeros(31)
    save_file(tensors, folder / SINGLE)
    if how == "truncated":
        os.truncate(folder / SINGLE, (folder / SINGLE).stat().st_size - 1)


@pytest.mark.parametrize("how", ["lacks", "unexpected", "shape", "truncated"])
def test_a_source_that_is_not_whole_is_refused_before_anything_is_written(
    how: str, tmp_path: Path
) -> None:
    source = write_tiny(tmp_path / "model")
    _spoil(source, how)
    whole = Selection(tuple({} for _ in range(7)))
    with pytest.raises(UserError, match=how) as told:
        slice_checkpoint(source, tmp_path / "cut", whole)
    assert "\n" not in str(told.value)
    assert list(tmp_path.iterdir()) == [source]


def test_a_source_that_shrinks_while_it_is_read_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_tiny(tmp_path / "model")
    original = Checkpoint.read_into

    def read_into(self: Checkpoint, name: str, offset: int, raw: memoryview) -> None:
        os.truncate(source / SINGLE, 10_000)
        original(self, name, offset, raw)

    monkeypatch.setattr(Checkpoint, "read_into", read_into)
    with pytest.raises(UserError, match="ended while tensor"):
        slice_checkpoint(source, tmp_path / "cut", Selection(tuple({} for _ in range(7))))
    assert list(tmp_path.iterdir()) == [source]


def _flips(plan: dict[str, tuple[int, int]]) -> Iterator[tuple[str, int]]:
    for name, (start, stop) in plan.items():
        for place in {start, (start + stop) // 2, stop - 1}:
            yield name, place


def test_every_changed_byte_of_a_small_cut_is_found(tmp_path: Path) -> None:
    source, target = write_tiny(tmp_path / "model", dtype=torch.bfloat16), tmp_path / "cut"
    axes: list[LayerSelection | None] = [{}, {"width": (0, 3, 9)}, {}, {}, None, {}, {}]
    axes[-1] = axes[1]
    selection = Selection(tuple(axes))
    slice_checkpoint(source, target, selection)
    written = Checkpoint.open(target)
    entries = {name: written.entry(name) for name in written.names}
    for name, place in _flips({name: (e.start, e.stop) for name, e in entries.items()}):
        with (target / SINGLE).open("r+b") as file:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1]))
            file.flush()
            assert differing_tensor(source, target, selection) == name
            file.seek(place)
            file.write(bytes([byte]))
    assert differing_tensor(source, target, selection) is None


@given(
    shape=st.lists(st.integers(1, 3000), max_size=3).map(tuple),
    itemsize=st.sampled_from([1, 2, 8]),
)
def test_compared_rows_reach_both_ends_and_are_few(shape: tuple[int, ...], itemsize: int) -> None:
    blocks = list(_compared_rows(shape, itemsize))
    rows = shape[0] if shape else 1
    row = torch.Size(shape).numel() * itemsize // rows
    assert blocks[0].start == 0 and blocks[-1].stop == rows
    assert all(block.start < block.stop <= rows for block in blocks)
    assert len(blocks) <= COMPARED_BLOCKS
    assert all((b.stop - b.start) * row <= max(COMPARED_BYTES, row) for b in blocks)
    if rows * row <= COMPARED_BYTES:
        assert sum(block.stop - block.start for block in blocks) == rows


def test_a_header_is_as_long_as_it_says() -> None:
    header, entries = lay_out(Path("x"), PLANS)
    assert len(header) % 8 == 0 and int.from_bytes(header[:8], "little") == len(header) - 8
    assert [(e.start - len(header), e.stop - len(header)) for e in entries.values()] == [
        (0, 48),
        (48, 58),
    ]


def test_made_checkpoints_run_and_no_two_tensors_are_equal(tmp_path: Path) -> None:
    make_checkpoint.make("tiny", tmp_path / "model", seed=3, max_shard_bytes=200_000)
    loaded = model.load(tmp_path / "model")
    ids = torch.arange(64)[None]
    with torch.no_grad():
        logits = loaded.module(ids, use_cache=False).logits
    assert logits.isfinite().all() and 0.1 < float(logits.std()) < 100
    written = Checkpoint.open(tmp_path / "model")
    assert len({written.entry(name).shard for name in written.names}) > 1
    contents = {bytes(tensor_bytes(written.tensor(name))) for name in written.names}
    assert len(contents) == len(written.names)
    selection = bench_prune.example_selection(loaded.architecture)
    slice_checkpoint(tmp_path / "model", tmp_path / "cut", selection)
    assert differing_tensor(tmp_path / "model", tmp_path / "cut", selection) is None


def test_the_share_that_is_compared_is_told(tmp_path: Path) -> None:
    rows = 4 * COMPARED_BLOCKS
    large = torch.zeros(rows, COMPARED_BYTES // 4)  # a block holds one row
    write_checkpoint(tmp_path / "large", {}, {"large": large}.items(), sync=False)
    assert compared_share(tmp_path / "large") == 0.25
