"""Checkpoints written whole or not at all, tensor by tensor and block by block.

Names, shapes and dtypes are known beforehand, so every shard is laid out before its content is
there. Tensors may then come in any order and from several threads, and nothing is held in memory.
A file's header is written last: a shard that is not finished cannot be read as one.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from minipuzzle.errors import UserError
from minipuzzle.files import TEMPORARY, sync_folder
from minipuzzle.shards import (
    INDEX,
    Entry,
    TensorPlan,
    lay_out,
    shard_names,
    split,
    tensor_bytes,
)

MAX_SHARD_BYTES = 4 * 2**30


class CheckpointWriter:
    """A context in which a model folder is written; it appears when the context ends well.

        with CheckpointWriter(folder, config, plans) as writer:
            for name in writer.order:
                writer.write(name, row_blocks_of(name))

    An exception inside leaves nothing; a killed process leaves a temporary folder beside `folder`
    that holds no readable checkpoint and is cleared by the next writer of the same folder.

    Args:
        folder: never seen half-written; in one that exists a former checkpoint is replaced and
            config.json comes last.
        config: contents of config.json.
        tensors: every tensor that will be written, in the order that decides the shards.
        carry_from: folder whose tokenizer, generation config and chat template travel along.
        max_shard_bytes: a new shard is begun when the next tensor would not fit.
        sync: have everything written through to the disk before the folder appears, so that it
            is whole after a power cut too; for folders that live shortly it only costs time.

    Raises:
        UserError: when the disk has too little room (before anything is written) or another
            process is writing the same folder.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        tensors: Iterable[TensorPlan],
        *,
        carry_from: Path | None = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        sync: bool = True,
    ) -> None:
        self._sync = sync
        self._folder, self._config, self._carry_from = folder, config, carry_from
        self._shards = split(tensors, max_shard_bytes)
        self._total = sum(tensor.nbytes for shard in self._shards for tensor in shard)
        self._temporary = folder.with_name(f"{folder.name}{TEMPORARY}writing")
        self._headers: dict[Path, bytes] = {}
        self._entries: dict[str, Entry] = {}
        self._plans = {tensor.name: tensor for shard in self._shards for tensor in shard}
        assert len(self._plans) == sum(map(len, self._shards)), "a tensor is planned twice"
        for name, shard in zip(shard_names(len(self._shards)), self._shards, strict=True):
            path = self._temporary / name
            self._headers[path], entries = lay_out(path, shard)
            self._entries |= entries
        self._files: dict[Path, int] = {}
        # The kernel lets one thread at a time write a file and has the others spin: these sleep.
        self._turn = threading.Lock()
        self._written: set[str] = set()

    @property
    def order(self) -> tuple[str, ...]:
        """Names in the order of the bytes on disk, the quickest one to write them in."""
        return tuple(self._entries)

    def write(self, name: str, blocks: Iterable[torch.Tensor]) -> None:
        """Write a tensor from consecutive row blocks, each used before the next is asked for.

        Blocks have the planned dtype, are on the CPU, and together have the planned size.
        Different tensors may be written by different threads at once.
        """
        entry, plan = self._entries[name], self._plans[name]
        assert name not in self._written, f"{name} is written twice"
        place = entry.start
        for block in blocks:
            assert block.dtype == plan.dtype, f"{name}: {block.dtype}, planned {plan.dtype}"
            raw = tensor_bytes(block)
            assert place + len(raw) <= entry.stop, f"{name} is larger than planned"
            with self._turn:
                _write_at(self._files[entry.shard], raw, place)
            place += len(raw)
        assert place == entry.stop, f"{name} is smaller than planned"
        self._written.add(name)

    def __enter__(self) -> Self:
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        _require_room(self._folder, self._total)
        with ExitStack() as stack:
            stack.enter_context(_workplace(self._folder, self._temporary))
            for path in self._headers:
                self._files[path] = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
                stack.callback(os.close, self._files[path])
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._stack:
            if error is None:
                self._finish()

    def _finish(self) -> None:
        missing = self._plans.keys() - self._written
        assert not missing, f"planned and not written: {sorted(missing)}"
        for path, header in self._headers.items():
            if self._sync:
                os.fsync(self._files[path])
            _write_at(self._files[path], memoryview(header), 0)
        if len(self._shards) > 1:
            weight_map = {
                tensor.name: self._entries[tensor.name].shard.name
                for shard in self._shards
                for tensor in shard
            }
            index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            _write_json(self._temporary / INDEX, index)
        if self._carry_from is not None:
            carry_files(self._carry_from, self._temporary)
        _write_json(self._temporary / "config.json", self._config)
        if self._sync:
            _sync_files(self._temporary)
        _publish(self._temporary, self._folder)
        if self._sync:
            sync_folder(self._folder)
            sync_folder(self._folder.parent)


def write_checkpoint(
    folder: Path,
    config: dict[str, Any],
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    plans: Iterable[TensorPlan] | None = None,
    carry_from: Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    sync: bool = True,
) -> None:
    """Write a model folder from whole tensors (name on disk, tensor), consumed once.

    With `plans` one tensor is in memory at a time; without, all of them are made first to see
    their shapes. The other arguments and the errors are those of `CheckpointWriter`.
    """
    if plans is None:
        tensors = list(tensors)
        plans = [TensorPlan(name, tuple(each.shape), each.dtype) for name, each in tensors]
    writer = CheckpointWriter(
        folder, config, plans, carry_from=carry_from, max_shard_bytes=max_shard_bytes, sync=sync
    )
    with writer:
        for name, tensor in tensors:
            writer.write(name, [tensor])


def _write_at(file: int, raw: memoryview, place: int) -> None:
    while raw:
        count = os.pwrite(file, raw, place)
        raw, place = raw[count:], place + count


def _require_room(folder: Path, total_bytes: int) -> None:
    free = shutil.disk_usage(folder.parent).free
    if free < total_bytes * 1.01 + 2**20:
        raise UserError(
            f"{folder} needs {total_bytes / 2**30:.2f} GiB, the disk has {free / 2**30:.2f} GiB "
            "free; make room or choose another --run folder"
        )


@contextmanager
def _workplace(folder: Path, temporary: Path) -> Iterator[None]:
    """An empty locked folder `temporary`; gone when the context ends, moved away or removed.

    What killed writers of the same folder left is cleared. The lock is the kernel's and ends with
    the process.
    """
    for stale in folder.parent.glob(f"{glob.escape(folder.name)}{TEMPORARY}*"):
        if stale != temporary:
            shutil.rmtree(stale, ignore_errors=True)
    temporary.mkdir(exist_ok=True)
    handle = os.open(temporary, os.O_RDONLY) if sys.platform != "win32" else None
    try:
        if handle is not None:
            _lock(handle, folder)
        for left in temporary.iterdir():
            left.unlink()
        try:
            yield
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    finally:
        if handle is not None:
            os.close(handle)


def _lock(handle: int, folder: Path) -> None:
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"another process is writing {folder}; wait for it or choose another folder"
        ) from None


def _publish(temporary: Path, folder: Path) -> None:
    """Move finished files into place: a rename of the folder, or of each file, config.json last."""
    if not folder.exists():
        temporary.rename(folder)
        return
    for stale in [folder / "config.json", folder / INDEX, *folder.glob("*.safetensors")]:
        stale.unlink(missing_ok=True)
    for path in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):
        path.replace(folder / path.name)


def _sync_files(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


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
