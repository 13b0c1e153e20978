"""A checkpoint in memory: the stock transformers class beside what minipuzzle knows of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from minipuzzle import families
from minipuzzle.architecture import Architecture
from minipuzzle.checkpoint import Checkpoint
from minipuzzle.errors import UserError
from minipuzzle.families import Family, TensorSpec
from minipuzzle.jsonfile import read_json
from minipuzzle.shards import TensorPlan
from minipuzzle.writer import CheckpointWriter

if TYPE_CHECKING:
    from minipuzzle.streaming import LayerStore


ROW_BLOCK = 2**23


@dataclass(frozen=True)
class Model:
    """A loaded checkpoint. `module` is in eval mode; on the CPU its fast scan is installed.

    A streamed model has a `store`, and its `module` is empty but for the layer of the walk.
    """

    folder: Path
    config: dict[str, Any]
    family: Family
    architecture: Architecture
    module: nn.Module
    store: LayerStore | None = None

    @cached_property
    def tokenizer(self) -> Any:
        """The folder's tokenizer; UserError when it has none."""
        return load_tokenizer(self.folder)

    def block_config(self, shape: Architecture) -> Any:
        """The stock configuration object of blocks of a shape; made once, as it takes its time."""
        if shape not in self._block_configs:
            self._block_configs[shape] = transformers_config(self.family, self.config, shape)
        return self._block_configs[shape]

    @cached_property
    def _block_configs(self) -> dict[Architecture, Any]:
        return {}

    def part(self, name: str) -> nn.Module:
        """`embed`, `norm` or `head` of the built model."""
        return self.module.get_submodule(self.family.modules[name])

    def layer(self, i: int) -> nn.Module:
        """The module of a layer's block."""
        return self.module.get_submodule(self.family.layer_module(i))

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        if self.store is not None:
            return self.store.device
        return next(self.module.parameters()).device

    def parameter(self, name: str) -> nn.Parameter:
        """A parameter by its name on disk."""
        return self.module.get_parameter(self.family.memory_name(name))


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder; UserError when it is missing or cannot be read."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not any((folder / name).exists() for name in names):
        raise UserError(f"{folder} has no tokenizer.json; copy the model's tokenizer files there")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        reason = (str(error).splitlines() or ["unreadable"])[0]
        raise UserError(f"{folder}: the tokenizer cannot be read: {reason}") from None


def read_architecture(folder: Path) -> tuple[dict[str, Any], Family, Architecture]:
    """Config, family and architecture of a model folder; needs only its config.json."""
    config = read_json(folder / "config.json")
    family, architecture = families.read(config)
    return config, family, architecture


def open_checked(folder: Path) -> tuple[dict[str, Any], Family, Architecture, Checkpoint]:
    """Like `read_architecture`, with the checkpoint's names and shapes held against it."""
    config, family, architecture = read_architecture(folder)
    checkpoint = Checkpoint.open(folder)
    checkpoint.check({spec.name: spec.shape for spec in family.tensors(architecture)})
    return config, family, architecture, checkpoint


def transformers_config(family: Family, config: dict[str, Any], architecture: Architecture) -> Any:
    """The stock configuration object of an architecture, from a config.json in any spelling."""
    from transformers import AutoConfig

    clean = family.write_config(config, architecture)
    stock = AutoConfig.for_model(clean.pop("model_type"), **clean)
    stock._attn_implementation = "sdpa"
    return stock


def load(folder: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Model:
    """Load a checked checkpoint into its stock transformers class.

    Raises:
        UserError: for a folder that is not a whole checkpoint of a known family.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # ours is the one on the screen
    config, family, architecture, _ = open_checked(folder)
    stock = transformers_config(family, config, architecture)
    module = AutoModelForCausalLM.from_pretrained(
        folder,
        config=stock,
        dtype=dtype,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
    )
    module = module.to(device).eval().requires_grad_(False)
    model = Model(folder, config, family, architecture, module)
    prepare(module, device)
    return model


def prepare(module: nn.Module, device: str | torch.device) -> None:
    """Install our own forward of the modules whose stock one is slow on this kind of device."""
    kind = torch.device(device).type
    if kind == "cpu":
        from minipuzzle import fastscan

        fastscan.install(module)
    elif kind == "cuda":
        from minipuzzle import gpuscan

        gpuscan.install(module)


def clone(model: Model) -> Model:
    """An independent copy whose parameters can be changed."""
    module = copy.deepcopy(model.module)
    prepare(module, next(module.parameters()).device)
    return Model(model.folder, model.config, model.family, model.architecture, module)


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that most bytes of a checkpoint are stored in."""
    sizes: dict[torch.dtype, int] = {}
    for name in checkpoint.names:
        dtype = checkpoint.dtype(name)
        sizes[dtype] = sizes.get(dtype, 0) + torch.Size(checkpoint.shape(name)).numel()
    return max(sizes, key=lambda dtype: sizes[dtype])


def save(model: Model, folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a loaded model as a checkpoint folder, its tokenizer files carried from `folder`."""
    with LayerWriter(model, folder, dtype) as writer:
        for j in range(len(model.architecture.layers)):
            writer.layer(j)
        writer.rest()


class LayerWriter:
    """A context in which a model is written as a checkpoint folder, layer by layer.

    A streamed model's layers are written while the walk stands at them. Nothing is there until the
    context ends well; tokenizer files are carried from the model's own folder.

    Raises:
        UserError: when the disk has too little room.
    """

    def __init__(self, model: Model, folder: Path, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        config = model.family.write_config(model.config, model.architecture)
        config["dtype"] = str(dtype).removeprefix("torch.")
        self._specs = list(model.family.tensors(model.architecture))
        plans = [TensorPlan(spec.name, spec.shape, dtype) for spec in self._specs]
        self._writer = CheckpointWriter(folder, config, plans, carry_from=model.folder)

    def __enter__(self) -> Self:
        self._writer.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._writer.__exit__(*error)

    def layer(self, j: int) -> None:
        """Write the tensors of layer j as they are now."""
        for spec in self._specs:
            if spec.layer == j:
                self._write(spec.name)

    def rest(self) -> None:
        """Write what lies outside the layers."""
        store = self.model.store
        for spec in self._specs:
            if spec.layer is None and spec.role == "embedding" and store is not None:
                blocks = _row_blocks(store.checkpoint, spec)
                self._writer.write(spec.name, (block.to(self.dtype) for block in blocks))
            elif spec.layer is None:
                self._write(spec.name)

    def _write(self, name: str) -> None:
        tensor = self.model.parameter(name).detach().to("cpu", self.dtype)
        self._writer.write(name, [tensor])


def _row_blocks(checkpoint: Checkpoint, spec: TensorSpec) -> Iterator[torch.Tensor]:
    """A stored matrix in blocks of about ROW_BLOCK elements."""
    rows = max(1, ROW_BLOCK * spec.shape[0] // spec.size)
    for start in range(0, spec.shape[0], rows):
        yield checkpoint.rows(spec.name, start, min(start + rows, spec.shape[0]))
