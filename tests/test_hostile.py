"""Wrong and hostile model folders: one clear line, exit code 2, nothing half-written."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from minipuzzle.checkpoint import Checkpoint
from minipuzzle.cli import main
from minipuzzle.errors import UserError
from minipuzzle.shards import INDEX, TensorPlan
from minipuzzle.writer import write_checkpoint
from tests.tiny import write_tiny

SHARD = "model.safetensors"


def missing_folder(folder: Path) -> Path:
    return folder / "nowhere"


def no_config(folder: Path) -> Path:
    (folder / "config.json").unlink()
    return folder


def broken_config(folder: Path) -> Path:
    (folder / "config.json").write_text("{")
    return folder


def another_family(folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return folder


def truncated(folder: Path) -> Path:
    with (folder / SHARD).open("r+b") as file:
        file.truncate((folder / SHARD).stat().st_size - 100)
    return folder


def cut_header(folder: Path) -> Path:
    with (folder / SHARD).open("r+b") as file:
        file.truncate(20)
    return folder


def greedy_header(folder: Path) -> Path:
    with (folder / SHARD).open("r+b") as file:
        file.write(struct.pack("<Q", 2**62))
    return folder


def greedy_tensor(folder: Path) -> Path:
    return rewrite(folder, lambda entry: entry.update(shape=[2**40, 32]))


def negative_tensor(folder: Path) -> Path:
    return rewrite(folder, lambda entry: entry.update(shape=[-1, 32]))


def backward_offsets(folder: Path) -> Path:
    return rewrite(folder, lambda entry: entry.update(data_offsets=entry["data_offsets"][::-1]))


def strange_dtype(folder: Path) -> Path:
    return rewrite(folder, lambda entry: entry.update(dtype="F4"))


def header_is_a_list(folder: Path) -> Path:
    (folder / SHARD).write_bytes(struct.pack("<Q", 2) + b"[]")
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Change the first tensor's entry in the header, the data left as they are."""
    raw = (folder / SHARD).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(next(entry for name, entry in header.items() if name != "__metadata__"))
    new = json.dumps(header).encode()
    (folder / SHARD).write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :])
    return folder


def escaping_shard(folder: Path) -> Path:
    (folder / SHARD).rename(folder.parent / "outside.safetensors")
    index = {"weight_map": {"lm_head.weight": "../outside.safetensors"}}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def missing_shard(folder: Path) -> Path:
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def pickled(folder: Path) -> Path:
    (folder / SHARD).unlink()
    torch.save({}, folder / "pytorch_model.bin")
    return folder


def no_tokenizer(folder: Path) -> Path:
    return folder


CASES: dict[Callable[[Path], Path], str] = {
    missing_folder: "give a model folder, a hub id or `demo`|does not exist",
    no_config: "config.json does not exist",
    broken_config: "is not valid JSON",
    another_family: "model_type 'gpt2'",
    truncated: "is truncated",
    cut_header: "not a whole safetensors file",
    greedy_header: "not a whole safetensors file",
    greedy_tensor: "claims .* bytes for shape",
    negative_tensor: "impossible sizes",
    backward_offsets: "impossible sizes",
    strange_dtype: "stored as F4",
    header_is_a_list: "broken safetensors header",
    escaping_shard: "leaves the model's folder",
    missing_shard: "is missing",
    pickled: "pickled weights",
    no_tokenizer: "has no tokenizer.json",
}


@pytest.mark.parametrize("spoil", CASES, ids=lambda spoil: spoil.__name__)
def test_a_bad_folder_is_one_line(
    spoil: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = spoil(write_tiny(tmp_path / "model"))
    run = tmp_path / "run"
    assert main(["score", str(model), "--run", str(run)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("Error: ") and told.count("\n") == 1 and "Traceback" not in told
    assert re.search(CASES[spoil], told), told
    assert not (run / "scores").exists()


def test_no_memory_is_taken_for_a_lie(tmp_path: Path) -> None:
    """A header may claim terabytes: reading it must not allocate them."""
    with pytest.raises(UserError):
        Checkpoint.open(greedy_tensor(write_tiny(tmp_path / "model")))


def test_an_impossible_budget_stops_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_tiny(tmp_path / "model")
    for budget in ("1%", "3 parsecs", "0GiB"):
        options = ["--run", str(tmp_path / "run"), "--set", f"budget={budget}"]
        assert main(["run", str(folder), *options]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and "budget" in told
    assert not (tmp_path / "run" / "search").exists()


def test_a_full_disk_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    tensors = iter([("a", torch.zeros(1000))])
    with pytest.raises(UserError, match="the disk has .* GiB free"):
        write_checkpoint(tmp_path / "out", {}, tensors)
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_breaks_leaves_nothing(tmp_path: Path) -> None:
    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.zeros(1000)
        raise OSError(28, "No space left on device")

    plans = [TensorPlan("a", (1000,), torch.float32)]
    with pytest.raises(OSError, match="No space"):
        write_checkpoint(tmp_path / "out", {}, tensors(), plans=plans)
    assert list(tmp_path.iterdir()) == []


def test_shards_are_cut_where_the_next_tensor_would_not_fit(tmp_path: Path) -> None:
    items = [(f"t{i}", torch.full((100,), float(i))) for i in range(5)]
    write_checkpoint(tmp_path / "out", {}, iter(items), max_shard_bytes=900)
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert names == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    written = Checkpoint.open(tmp_path / "out")
    assert all(torch.equal(written.tensor(name), tensor) for name, tensor in items)
    assert torch.equal(written.rows("t3", 10, 20), items[3][1][10:20])
