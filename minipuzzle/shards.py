"""The safetensors format: headers read without trust, and laid out before any tensor is there."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minipuzzle.errors import UserError

MAX_HEADER_BYTES = 100 * 2**20  # the limit of the format itself
# In the order in which the safetensors library lays dtypes into a file.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Entry:
    """One tensor as a shard's header describes it; `start` and `stop` are bytes in the file."""

    shard: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class TensorPlan:
    """A tensor that is going to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


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


def lay_out(shard: Path, tensors: Sequence[TensorPlan]) -> tuple[bytes, dict[str, Entry]]:
    """Header of a file that is to hold these tensors, and where each one goes in it.

    The bytes are those that the safetensors library writes: wide dtypes first, then by name, the
    header filled up with blanks to a multiple of 8.
    """
    rank = {dtype: i for i, dtype in enumerate(DTYPES.values())}
    ordered = sorted(tensors, key=lambda tensor: (rank[tensor.dtype], tensor.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in ordered:
        header[tensor.name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    base = 8 + len(raw)
    entries = {}
    for tensor in ordered:
        start, stop = (base + place for place in header[tensor.name]["data_offsets"])
        entries[tensor.name] = Entry(shard, NAMES[tensor.dtype], tensor.shape, start, stop)
    return struct.pack("<Q", len(raw)) + raw, entries


def split(tensors: Iterable[TensorPlan], max_bytes: int) -> list[list[TensorPlan]]:
    """Tensors per shard: a new shard begins where the next tensor would not fit."""
    shards: list[list[TensorPlan]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


def shard_names(count: int) -> list[str]:
    """File names of a checkpoint of so many shards."""
    if count == 1:
        return [SINGLE]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a CPU tensor, without a copy where it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
