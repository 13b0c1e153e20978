"""Safetensors checkpoints, read without trust; `minipuzzle.writer` writes them.

Files from others are hostile: headers and sizes are checked against the file before any memory is
taken, shard names may not leave the folder, pickles are refused.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from minipuzzle.errors import UserError
from minipuzzle.jsonfile import read_json
from minipuzzle.shards import DTYPES, INDEX, SINGLE, Entry, read_header, tensor_bytes

SAMPLE_BYTES = 64 * 2**10
SAMPLES = 64


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
        """One tensor, as stored: mapped, so that what is used of it is read."""
        with safe_open(self._entries[name].shard, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of a tensor's first dimension."""
        inner = self.shape(name)[1:]
        tensor = torch.empty((stop - start, *inner), dtype=self.dtype(name))
        row_bytes = math.prod(inner) * tensor.itemsize
        self.read_into(name, start * row_bytes, tensor_bytes(tensor))
        return tensor

    def read_into(self, name: str, offset: int, raw: memoryview) -> None:
        """Fill `raw` with a tensor's bytes from `offset` on. UserError when the file ends."""
        entry = self._entries[name]
        place = entry.start + offset
        assert 0 <= offset and place + len(raw) <= entry.stop
        file = os.open(entry.shard, os.O_RDONLY)
        try:
            while raw:
                count = os.preadv(file, [raw], place)
                if count == 0:
                    raise UserError(f"{entry.shard} ended while tensor {name} was read; try again")
                raw, place = raw[count:], place + count
        finally:
            os.close(file)

    def will_need(self, name: str, offset: int, count: int) -> None:
        """Have the system fetch a tensor's bytes from `offset` on while others are worked on."""
        entry = self._entries[name]
        count = min(count, entry.stop - entry.start - offset)
        if count <= 0 or not hasattr(os, "posix_fadvise"):
            return
        file = os.open(entry.shard, os.O_RDONLY)
        try:
            os.posix_fadvise(file, entry.start + offset, count, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(file)

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
