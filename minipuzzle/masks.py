"""A cut shown in the uncut model: hooks that make it give the sliced model's logits.

Independent of slicing (nothing is cut, the stock forward runs), and therefore the witness that a
sliced checkpoint is what its selection says.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import sqrt
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from minipuzzle.families.table import TensorSpec, axis_sizes
from minipuzzle.model import Model
from minipuzzle.selection import LayerSelection, Selection
from minipuzzle.slicing import dim_index


@contextmanager
def masked(model: Model, selection: Selection) -> Iterator[nn.Module]:
    """The model's module, computing the cut model's function while the block runs.

    Removed layers pass the stream on. Units are zeroed where the layer's inner activations enter
    the projection that writes the stream; a norm over a narrowed axis, which would divide by the
    full width, is rescaled to the kept one.
    """
    assert selection.hidden is None, "the residual stream itself cannot be masked"
    handles: list[RemovableHandle] = []
    try:
        for i, axes in enumerate(selection.layers):
            if axes is None:
                handles.append(model.layer(i).register_forward_hook(_pass_on))
            elif axes:
                handles += _mask_layer(model, i, axes)
        yield model.module
    finally:
        for handle in handles:
            handle.remove()


def _pass_on(module: nn.Module, args: tuple[torch.Tensor, ...], output: object) -> torch.Tensor:
    return args[0]


def _mask_layer(model: Model, i: int, axes: LayerSelection) -> list[RemovableHandle]:
    specs = [s for s in model.family.tensors(model.architecture) if s.layer == i]
    norms = [s for s in specs if s.role == "inner_norm"]
    writers = [s for s in specs if s.role == "writes" and len(s.shape) == 2]
    handles: list[RemovableHandle] = []
    for spec in norms or writers:
        mask = _mask(model, spec, axes)
        if mask is None:
            continue
        module = model.module.get_submodule(
            model.family.memory_name(spec.name).removesuffix(".weight")
        )
        # rms over the full width of zeroed units is the kept units' rms times sqrt(kept / full)
        share = sqrt(float(mask.mean())) if norms else 1.0
        handles.append(module.register_forward_pre_hook(_Scale(mask / share)))
        if norms:
            handles.append(module.register_forward_hook(_Scale(torch.tensor(share))))
    return handles


def _mask(model: Model, spec: TensorSpec, axes: LayerSelection) -> torch.Tensor | None:
    """1 for kept, 0 for cut units of the tensor's last dimension: shape (units,)."""
    assert spec.layer is not None
    sizes = axis_sizes(model.architecture, model.architecture.layers[spec.layer])
    kept = dim_index(spec.layout.dims[-1], sizes, axes)
    if kept is None:
        return None
    device = next(model.module.parameters()).device
    mask = torch.zeros(spec.shape[-1], device=device)
    mask[kept.to(device)] = 1.0
    return mask


class _Scale:
    """Forward pre-hook (scales the first input) and forward hook (scales the output) in one."""

    def __init__(self, factor: torch.Tensor) -> None:
        self.factor = factor

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *output: torch.Tensor) -> Any:
        if output:
            return output[0] * self.factor.to(output[0].dtype)
        return (args[0] * self.factor.to(args[0].dtype), *args[1:])
