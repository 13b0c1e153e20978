"""Safetensors checkpoints: read without trust, written whole or not at all.

Files from others are hostile: headers and sizes are checked against the file before any memory is
taken, shard names may not leave the folder, pickles are refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from minipuzzle.errors import UserError
from minipuzzle.jsonfile import read_json

MAX_HEADER_BYTES = 100 * 2**20  # the limit of the safetensors format itself
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SAMPLE_BYTES = 64 * 2**10
SAMPLES = 64


@dataclass(frozen=True)
class Entry:
    """One tensor as a shard's header describes it; `start` and `stop` are bytes in the file."""

    shard: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(shard: Path) -> dict[str, Entry]:
    """The checked header of one safetensors file."""
    try:
        size = shard.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{shard} is missing; download the model again") from None
    with shard.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise UserError(
                f"{shard} is not a whole safetensors file: its header claims {length} bytes, "
                f"the file has {size}; download it again"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
        items = {name: value for name, value in header.items() if name != "__metadata__"}
        return {
            name: _entry(shard, name, value, base=8 + length, size=size)
            for name, value in items.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{shard} has a broken safetensors header ({error})") from None


def _entry(shard: Path, name: str, value: dict[str, Any], *, base: int, size: int) -> Entry:
    dtype, shape = str(value["dtype"]), tuple(int(n) for n in value["shape"])
    start, stop = (base + int(offset) for offset in value["data_offsets"])
    if dtype not in DTYPES:
        raise UserError(
            f"{shard}: tensor {name} is stored as {dtype}; minipuzzle reads {', '.join(DTYPES)}"
        )
    if min(shape, default=0) < 0 or start < base or stop < start:
        raise UserError(f"{shard}: tensor {name} has impossible sizes; download it again")
    if stop - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise UserError(f"{shard}: tensor {name} claims {stop - start} bytes for shape {shape}")
    if stop > size:
        raise UserError(
            f"{shard} is truncated: tensor {name} ends at byte {stop}, the file has {size}; "
            "download it again"
        )
    return Entry(shard, dtype, shape, start, stop)


def _shards(folder: Path) -> list[Path]:
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{folder / INDEX} has no `weight_map`; download the model again")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if Path(name).name != name or name in ("", ".", ".."):
                raise UserError(f"{folder / INDEX}: shard name {name!r} leaves the model's folder")
        return [folder / name for name in names]
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise UserError(
            f"{folder} holds pickled weights, which can run code when read; "
            "convert them to safetensors first"
        )
    raise UserError(f"{folder} holds no model.safetensors; give the folder of a complete model")


class Checkpoint:
    """The tensors of a model folder, read one at a time or by rows."""

    def __init__(self, folder: Path, entries: dict[str, Entry]) -> None:
        self.folder = folder
        self._entries = entries

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Check every header of the folder; UserError for anything that is not whole."""
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder; give a model folder or a hub id")
        entries: dict[str, Entry] = {}
        for shard in _shards(folder):
            for name, entry in read_header(shard).items():
                if name in entries:
                    raise UserError(f"{shard}: tensor {name} is in two shards")
                entries[name] = entry
        return cls(folder, entries)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""
        return tuple(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._entries[name].shape

    def entry(self, name: str) -> Entry:
        """Where a tensor lies on disk."""
        return self._entries[name]

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a tensor."""
        return DTYPES[self._entries[name].dtype]

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.stop - entry.start for entry in self._entries.values())

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, as stored."""
        with safe_open(self._entries[name].shard, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of a tensor's first dimension."""
        with safe_open(self._entries[name].shard, framework="pt") as file:
            tensor: torch.Tensor = file.get_slice(name)[start:stop]
        return tensor

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """UserError unless the folder holds exactly these tensors."""
        missing = sorted(shapes.keys() - self._entries.keys())
        strange = sorted(self._entries.keys() - shapes.keys())
        if missing or strange:
            name, what = (missing[0], "lacks") if missing else (strange[0], "has an unexpected")
            raise UserError(f"{self.folder}: the checkpoint {what} tensor {name}")
        for name, shape in shapes.items():
            if self.shape(name) != shape:
                raise UserError(
                    f"{self.folder}: tensor {name} has shape {self.shape(name)}, "
                    f"config.json asks for {shape}"
                )

    def fingerprint(self) -> str:
        """Hash of config, tokenizer, headers and evenly spaced samples of every shard."""
        digest = hashlib.sha256()
        for name in ("config.json", "tokenizer.json"):
            path = self.folder / name
            digest.update(path.read_bytes() if path.exists() else b"none")
        for shard in sorted({entry.shard for entry in self._entries.values()}):
            for block in _samples(shard):
                digest.update(block)
        return digest.hexdigest()


def _samples(path: Path) -> Iterator[bytes]:
    """The whole of a small file; of a large one its size, head, tail and evenly spaced blocks."""
    size = path.stat().st_size
    yield f"{path.name}:{size}".encode()
    with path.open("rb") as file:
        if size <= SAMPLES * SAMPLE_BYTES * 16:
            while block := file.read(2**20):
                yield block
            return
        for i in range(SAMPLES):
            file.seek((size - SAMPLE_BYTES) * i // (SAMPLES - 1))
            yield file.read(SAMPLE_BYTES)


def write_checkpoint(
    folder: Path,
    config: dict[str, Any],
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    total_bytes: int,
    carry_from: Path | None = None,
    max_shard_bytes: int = 4 * 2**30,
) -> None:
    """Write a model folder: shards as tensors arrive, then config.json, then one rename.

    Args:
        folder: never seen half-written; in one that exists a former checkpoint is replaced and
            config.json comes last.
        config: contents of config.json.
        tensors: (name on disk, tensor), consumed once; at most one shard is in memory.
        total_bytes: of all tensors; checked against the free disk before anything is written.
        carry_from: folder whose tokenizer, generation config and chat template travel along.
        max_shard_bytes: a new shard is begun when the next tensor would not fit.

    Raises:
        UserError: when the disk has too little room.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < total_bytes * 1.01 + 2**20:
        raise UserError(
            f"{folder} needs {total_bytes / 2**30:.2f} GiB, the disk has {free / 2**30:.2f} GiB "
            "free; make room or choose another --run folder"
        )
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        _write_shards(temporary, tensors, max_shard_bytes)
        _write_json(temporary / "config.json", config)
        if carry_from is not None:
            carry_files(carry_from, temporary)
        _publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(temporary: Path, folder: Path) -> None:
    """Move finished files into place: a rename of the folder, or of each file, config.json last."""
    if not folder.exists():
        temporary.rename(folder)
        return
    for stale in [*folder.glob("*.safetensors"), folder / INDEX]:
        stale.unlink(missing_ok=True)
    for path in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):
        path.replace(folder / path.name)


def _write_shards(
    folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int
) -> None:
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    pending_bytes = total = 0

    def flush() -> None:
        nonlocal pending, pending_bytes
        path = folder / f"shard-{len(shards):05d}"
        save_file(pending, path, metadata={"format": "pt"})
        shards.append(list(pending))
        pending, pending_bytes = {}, 0

    for name, tensor in tensors:
        if pending and pending_bytes + tensor.nbytes > max_shard_bytes:
            flush()
        pending[name] = tensor.contiguous()
        pending_bytes += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / "shard-00000").rename(folder / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        final = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{i:05d}").rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template.jinja",
)


def carry_files(source: Path, target: Path) -> None:
    """Copy tokenizer, generation config and chat template from one model folder to another."""
    for name in CARRIED:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
