"""Models larger than the device: layers come from the checkpoint while the walk passes.

The model's skeleton lies on the meta device. Small tensors (norms) are loaded at once, the head
when it is first needed, a layer's tensors when the walk reaches it: a thread reads the next layer
from disk into page-locked memory while this one computes. The embedding stays on disk, and the
rows that a text needs are taken from there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from minipuzzle.checkpoint import Checkpoint
from minipuzzle.families import TensorSpec
from minipuzzle.model import Model, open_checked, prepare, transformers_config

READERS = 4  # threads that share the reading of one tensor
READ_BYTES = 16 * 2**20


def stream(folder: Path, *, dtype: torch.dtype, device: str | torch.device) -> Model:
    """A model whose layers stay on disk until a walk asks for them.

    Raises:
        UserError: for a folder that is not a whole checkpoint of a known family.
    """
    from transformers import AutoModelForCausalLM

    config, family, architecture, checkpoint = open_checked(folder)
    stock = transformers_config(family, config, architecture)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(stock, dtype=dtype)
    module = module.eval().requires_grad_(False)
    if "positions" in family.modules:  # has buffers that no checkpoint holds
        parent, _, name = family.modules["positions"].rpartition(".")
        skeleton = module.get_submodule(family.modules["positions"])
        positions = type(skeleton)(stock).to(device)
        setattr(module.get_submodule(parent), name, positions)
    model = Model(folder, config, family, architecture, module)
    store = LayerStore(model, checkpoint, dtype, torch.device(device))
    prepare(module, device)
    return replace(model, store=store)


@dataclass
class LayerStore:
    """Brings the tensors of a streamed model to the device and takes them away again."""

    model: Model
    checkpoint: Checkpoint
    dtype: torch.dtype
    device: torch.device

    def __post_init__(self) -> None:
        specs = list(self.model.family.tensors(self.model.architecture))
        self._layers: dict[int, list[TensorSpec]] = {}
        self._head: list[TensorSpec] = []
        for spec in specs:
            if spec.layer is not None:
                self._layers.setdefault(spec.layer, []).append(spec)
            elif spec.role == "embedding":
                self._embedding = spec
            elif spec.role == "head":
                self._head.append(spec)
            else:
                self._place({spec.name: self._read(spec)})

    def layers(self) -> Iterator[int]:
        """Positions in order; the layer's tensors are on the device while it is the present one."""
        positions = sorted(self._layers)
        with ThreadPoolExecutor(1, "read-layer") as reader:
            ahead: Future[dict[str, torch.Tensor]] | None = None
            for place, i in enumerate(positions):
                tensors = (ahead or reader.submit(self._load, i)).result()
                following = positions[place + 1 : place + 2]
                ahead = reader.submit(self._load, following[0]) if following else None
                self._place(tensors)
                del tensors
                try:
                    yield i
                finally:
                    self._place({s.name: torch.empty(s.shape, device="meta") for s in self._of(i)})

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding for ids (B, T): (B, T, D) on the device."""
        wanted, inverse = torch.unique(ids.cpu(), return_inverse=True)
        table = self.checkpoint.tensor(self._embedding.name)
        rows = table[wanted].to(self.device, self.dtype)
        return rows[inverse.to(self.device)]

    def need_head(self) -> None:
        """Load the head, unless it is there; it stays."""
        head = self.model.part("head")
        weight = next(head.parameters())
        if weight.device.type != "meta":
            return
        spec = (self._head or [self._embedding])[0]
        tensor = self._read(spec).to(self.device, self.dtype)
        head.weight = nn.Parameter(tensor, requires_grad=False)

    def _of(self, i: int) -> list[TensorSpec]:
        return self._layers[i]

    def _load(self, i: int) -> dict[str, torch.Tensor]:
        return {spec.name: self._read(spec) for spec in self._of(i)}

    def _read(self, spec: TensorSpec) -> torch.Tensor:
        """One tensor from disk, in page-locked memory where the device is a GPU."""
        dtype = self.checkpoint.dtype(spec.name)
        tensor = torch.empty(spec.shape, dtype=dtype, pin_memory=self.device.type == "cuda")
        read_into(self.checkpoint, spec.name, tensor)
        return tensor

    def _place(self, tensors: dict[str, torch.Tensor]) -> None:
        """Make these (name on disk -> tensor) the parameters of the skeleton."""
        for name, tensor in tensors.items():
            path, _, attribute = self.model.family.memory_name(name).rpartition(".")
            owner = self.model.module.get_submodule(path)
            if tensor.device.type != "meta":
                tensor = tensor.to(self.device, non_blocking=True).to(self.dtype)
            setattr(owner, attribute, nn.Parameter(tensor, requires_grad=False))


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def read_into(checkpoint: Checkpoint, name: str, tensor: torch.Tensor) -> None:
    """Fill a contiguous CPU tensor of the stored dtype with a stored tensor, by several threads."""
    entry = checkpoint.entry(name)
    raw = _bytes(tensor)
    descriptor = os.open(entry.shard, os.O_RDONLY)

    def part(start: int) -> None:
        stop = min(start + READ_BYTES, len(raw))
        while start < stop:
            count = os.preadv(descriptor, [raw[start:stop]], entry.start + start)
            assert count > 0, "headers and sizes were checked when the folder was opened"
            start += count

    try:
        starts = range(0, len(raw), READ_BYTES)
        if len(starts) <= 1:
            list(map(part, starts))
        else:
            with ThreadPoolExecutor(READERS) as pool:
                list(pool.map(part, starts))
    finally:
        os.close(descriptor)
