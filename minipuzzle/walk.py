"""The walk: embed, layer after layer, final norm, head.

One loop serves scoring, candidate evaluation and repair. Shapes: ids (B, T), hidden (B, T, D),
logits (B, T, V); B may be several variants of one batch laid end to end. All sequences are full
(no padding), so no attention mask is needed; attention is causal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from minipuzzle.architecture import Layer
from minipuzzle.families.table import axis_sizes
from minipuzzle.model import Model, prepare
from minipuzzle.selection import Indices, LayerSelection, Selection, narrow
from minipuzzle.slicing import dim_index, take
from minipuzzle.streams import Stream

CPU_TOKENS_PER_CHUNK = 2048  # more leave the caches: 25 to 33 % slower
GPU_TOKENS_PER_CHUNK = 8192


@dataclass(frozen=True)
class Sublayer:
    """A norm and what follows it up to the sum with the stream."""

    norm: nn.Module
    mixer: nn.Module

    def __call__(self, hidden: torch.Tensor, **context: Any) -> torch.Tensor:
        """Hidden (B, T, D) -> hidden (B, T, D), the residual included."""
        update: torch.Tensor | tuple[torch.Tensor, ...]
        update = self.mixer(self.norm(hidden), **context)
        return hidden + (update[0] if isinstance(update, tuple) else update)


class Walk:
    """Runs a model layer by layer; layers may be skipped or narrowed on the way.

    A narrowed layer is built from the sliced tensors of the uncut one and is therefore exactly
    the layer of the sliced checkpoint. A streamed model's layers are there only while `layers()`
    stands at them.
    """

    def __init__(self, model: Model, *, tokens_per_chunk: int | None = None) -> None:
        self.model = model
        self.num_layers = len(model.architecture.layers)
        self.streamed = model.store is not None
        self.device = model.device
        on_cpu = self.device.type == "cpu"
        self.tokens_per_chunk = tokens_per_chunk or (
            CPU_TOKENS_PER_CHUNK if on_cpu else GPU_TOKENS_PER_CHUNK
        )
        self._narrowed: dict[tuple[int, Any, Indices | None], Sublayer] = {}

    def layers(self) -> Iterator[int]:
        """Positions in order; layer i's weights are on the device inside the loop's body."""
        return (
            iter(range(self.num_layers)) if self.model.store is None else self.model.store.layers()
        )

    def rows_per_chunk(self, tokens: int) -> int:
        """Sequences of so many tokens that a layer takes at once."""
        return max(1, self.tokens_per_chunk // tokens)

    def embed(self, ids: torch.Tensor, channels: Indices | None = None) -> torch.Tensor:
        """Ids (B, T) -> hidden (B, T, D), of the kept `channels` only where they are given."""
        if self.model.store is not None:
            hidden = self.model.store.rows(ids)
        else:
            hidden = self.model.part("embed")(ids.to(self.device))
        return hidden if channels is None else take(hidden, (None, None, torch.tensor(channels)))

    def stream(self, ids: torch.Tensor) -> Stream:
        """The embedded ids (B, T) as chunks; they wait in host memory if the model is streamed."""
        parts = [self.embed(part) for part in chunks(ids, self.tokens_per_chunk)]
        return Stream(parts, self.device, waiting=self.streamed)

    def layer(
        self,
        i: int,
        hidden: torch.Tensor,
        axes: LayerSelection | None = None,
        channels: Indices | None = None,
    ) -> torch.Tensor:
        """One layer, its residual included: hidden (B, T, D) -> hidden (B, T, D).

        `axes` narrows the layer, `channels` are those of the stream if it is narrower; rows are
        processed in chunks of about `tokens_per_chunk` tokens.
        """
        cut = axes or channels is not None
        sublayer = self._narrow(i, axes or {}, channels) if cut else self.sublayer(i)
        return self.through(i, sublayer, hidden)

    def through(self, i: int, sublayer: Sublayer, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden (B, T, D) -> hidden (B, T, D) by any layer that stands in layer i's place."""
        context = self._context(i, hidden)
        rows = self.rows_per_chunk(hidden.shape[1])
        if len(hidden) <= rows:
            return sublayer(hidden, **context)
        parts = (hidden[j : j + rows] for j in range(0, len(hidden), rows))
        return torch.cat([sublayer(part, **context) for part in parts])

    def sublayer(self, i: int) -> Sublayer:
        """Norm and mixer of layer i of the uncut model."""
        return sublayer(self.model, i, self.model.layer(i))

    def _context(self, i: int, hidden: torch.Tensor) -> dict[str, Any]:
        """What the mixer of layer i takes beside the hidden states."""
        modules = self.model.family.modules
        if "positions" not in modules or self.model.architecture.layers[i].kind != "attention":
            return {}
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        rotary = self.model.module.get_submodule(modules["positions"])
        return {"position_embeddings": rotary(hidden, position_ids=positions)}

    def final(self, hidden: torch.Tensor, channels: Indices | None = None) -> torch.Tensor:
        """The state just before the head: the final norm of hidden (B, T, D).

        Of a stream of fewer `channels` (B, T, D'), too, it is of full width (B, T, D): zero in the
        cut ones, so that the uncut head gives the logits of the narrowed one.
        """
        norm = self.model.part("norm")
        if channels is None:
            state: torch.Tensor = norm(hidden)
            return state
        state = functional_call(norm, self._narrow_norm(channels), (hidden,))
        whole = state.new_zeros(*state.shape[:-1], self.model.architecture.hidden)
        return whole.index_copy_(-1, torch.tensor(channels, device=state.device), state)

    def _narrow_norm(self, channels: Indices) -> dict[str, torch.Tensor]:
        """Name -> the kept part of the final norm's parameters."""
        family, architecture = self.model.family, self.model.architecture
        prefix, kept, found = family.modules["norm"] + ".", {"hidden": channels}, {}
        for spec in family.tensors(architecture):
            if spec.layer is None and spec.role == "norm":
                dims = spec.layout.dims
                index = tuple(dim_index(dim, axis_sizes(architecture, None), kept) for dim in dims)
                name = family.memory_name(spec.name).removeprefix(prefix)
                found[name] = take(self.model.parameter(spec.name), index)
        return found

    def logits(self, state: torch.Tensor) -> torch.Tensor:
        """State (B, T, D) -> logits (B, T, V) in fp32."""
        if self.model.store is not None:
            self.model.store.need_head()
        logits: torch.Tensor = self.model.part("head")(state)
        return logits.float()

    def states(self, ids: torch.Tensor, selection: Selection | None = None) -> torch.Tensor:
        """The whole walk of ids (B, T) under a selection: the state just before the head."""
        channels = None if selection is None else selection.hidden
        hidden = self.embed(ids, channels)
        for i in range(self.num_layers):
            axes = {} if selection is None else selection.layers[i]
            if axes is not None:
                hidden = self.layer(i, hidden, axes, channels)
        return self.final(hidden, channels)

    def _narrow(self, i: int, axes: LayerSelection, channels: Indices | None) -> Sublayer:
        key = (i, tuple(axes.items()), channels)
        if key not in self._narrowed:
            self._narrowed[key] = narrow_layer(self.model, i, axes, channels)
        return self._narrowed[key]

    def forget(self) -> None:
        """Drop the narrowed layers built so far."""
        self._narrowed.clear()


def sublayer(model: Model, i: int, block: nn.Module) -> Sublayer:
    """Norm and mixer of layer i in a module of its block."""
    kind = model.architecture.layers[i].kind
    norm, mixer = model.family.norms[kind], model.family.mixers[kind]
    return Sublayer(block.get_submodule(norm), block.get_submodule(mixer))


def narrow_layer(
    model: Model, i: int, axes: LayerSelection, channels: Indices | None = None
) -> Sublayer:
    """A layer of the narrowed shape that holds the kept part of layer `i`'s tensors.

    `channels` are the kept ones of the stream, None for all of them.
    """
    layer = model.architecture.layers[i]
    hidden = model.architecture.hidden if channels is None else len(channels)
    block = build_block(model, i, narrow(layer, axes, where=f"layer {i}"), hidden)
    sizes = axis_sizes(model.architecture, layer)
    prefix = model.family.prefix(i)
    kept = {axis: tuple(units) for axis, units in axes.items()}
    if channels is not None:
        kept["hidden"] = channels
    state = {}
    for spec in model.family.tensors_of(model.architecture, i):
        index = tuple(dim_index(dim, sizes, kept) for dim in spec.layout.dims)
        name = spec.name.removeprefix(prefix)
        state[name] = take(model.parameter(spec.name).detach(), index)
    unknown = block.load_state_dict(state, strict=False, assign=True).unexpected_keys
    assert not unknown, unknown
    prepare(block, model.device)
    block.eval().requires_grad_(False)
    return sublayer(model, i, block)


def build_block(model: Model, i: int, layer: Layer, hidden: int) -> nn.Module:
    """An empty block, of the class that the built model uses, with `layer` in layer `i`'s place.

    `hidden` is the width of the stream.
    """
    parent, size = model.architecture, model.family.layers_per_block
    start = i // size * size
    layers = (*parent.layers[start:i], layer, *parent.layers[i + 1 : start + size])
    config = model.block_config(replace(parent, layers=layers, hidden=hidden))
    with torch.device("meta"):
        module: nn.Module = type(model.layer(i))(config, 0)
    return module


def chunks(ids: torch.Tensor, tokens: int = CPU_TOKENS_PER_CHUNK) -> Iterator[torch.Tensor]:
    """Sequences (B, T) in groups of about `tokens` tokens."""
    rows = max(1, tokens // ids.shape[1])
    for start in range(0, len(ids), rows):
        yield ids[start : start + rows]
