"""The walk: embed, layer after layer, final norm, head.

One loop serves scoring, candidate evaluation and repair. Shapes: ids (B, T), hidden (B, T, D),
logits (B, T, V); B may be several variants of one batch laid end to end. All sequences are full
(no padding), so no attention mask is needed; attention is causal.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from minipuzzle.architecture import Architecture, Layer
from minipuzzle.families.table import axis_sizes
from minipuzzle.model import Model, prepare, transformers_config
from minipuzzle.selection import LayerSelection, Selection, narrow
from minipuzzle.slicing import dim_index, take

TOKENS_PER_CHUNK = 4096


class Walk:
    """Runs a model layer by layer; layers may be skipped or narrowed on the way.

    A narrowed layer is built from the sliced tensors of the resident one and is therefore exactly
    the layer of the sliced checkpoint.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.num_layers = len(model.architecture.layers)
        self._narrowed: dict[tuple[int, Any], nn.Module] = {}

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids (B, T) -> hidden (B, T, D)."""
        hidden: torch.Tensor = self.model.part("embed")(ids)
        return hidden

    def layer(
        self, i: int, hidden: torch.Tensor, axes: LayerSelection | None = None
    ) -> torch.Tensor:
        """One layer, its residual included: hidden (B, T, D) -> hidden (B, T, D).

        `axes` narrows the layer; rows are processed in chunks of about TOKENS_PER_CHUNK tokens.
        """
        module = self.model.layer(i) if not axes else self._narrow(i, axes)
        rows = max(1, TOKENS_PER_CHUNK // hidden.shape[1])
        return torch.cat([module(hidden[j : j + rows]) for j in range(0, len(hidden), rows)])

    def final(self, hidden: torch.Tensor) -> torch.Tensor:
        """The state just before the head: the final norm of hidden (B, T, D)."""
        state: torch.Tensor = self.model.part("norm")(hidden)
        return state

    def logits(self, state: torch.Tensor) -> torch.Tensor:
        """State (B, T, D) -> logits (B, T, V) in fp32."""
        logits: torch.Tensor = self.model.part("head")(state)
        return logits.float()

    def states(self, ids: torch.Tensor, selection: Selection | None = None) -> torch.Tensor:
        """The whole walk of ids (B, T) under a selection: the state just before the head."""
        hidden = self.embed(ids)
        for i in range(self.num_layers):
            axes = {} if selection is None else selection.layers[i]
            if axes is not None:
                hidden = self.layer(i, hidden, axes)
        return self.final(hidden)

    def _narrow(self, i: int, axes: LayerSelection) -> nn.Module:
        key = (i, tuple(axes.items()))
        if key not in self._narrowed:
            self._narrowed[key] = narrow_layer(self.model, i, axes)
        return self._narrowed[key]

    def forget(self) -> None:
        """Drop the narrowed layers built so far."""
        self._narrowed.clear()


def narrow_layer(model: Model, i: int, axes: LayerSelection) -> nn.Module:
    """A layer module of the narrowed shape that holds the kept part of layer `i`'s tensors."""
    layer = model.architecture.layers[i]
    module = build_layer(model, i, narrow(layer, axes, where=f"layer {i}"))
    sizes = axis_sizes(model.architecture, layer)
    prefix = model.family.layer_prefix.format(i=i)
    kept = {axis: tuple(units) for axis, units in axes.items()}
    state = {}
    for spec in model.family.tensors(model.architecture):
        if spec.layer == i:
            index = tuple(dim_index(dim, sizes, kept) for dim in spec.layout.dims)
            name = spec.name.removeprefix(prefix)
            state[name] = take(model.parameter(spec.name).detach(), index)
    module.load_state_dict(state, strict=True, assign=True)
    prepare(module, next(module.parameters()).device)
    return module.eval().requires_grad_(False)


def build_layer(model: Model, i: int, layer: Layer) -> nn.Module:
    """An empty module of `layer`'s shape, of the class that the built model uses for layer `i`."""
    parent = model.architecture
    alone = Architecture(
        hidden=parent.hidden,
        vocabulary=parent.vocabulary,
        tied=parent.tied,
        layers=(layer,),
        biases=parent.biases,
    )
    config = transformers_config(model.family, model.config, alone)
    with torch.device("meta"):
        module: nn.Module = type(model.layer(i))(config, 0)
    return module


def chunks(ids: torch.Tensor, tokens: int = TOKENS_PER_CHUNK) -> Iterator[torch.Tensor]:
    """Sequences (B, T) in groups of about `tokens` tokens."""
    rows = max(1, tokens // ids.shape[1])
    for start in range(0, len(ids), rows):
        yield ids[start : start + rows]
