"""A cut shown in the uncut model: hooks that make it give the sliced model's logits.

Independent of slicing (nothing is cut, the stock forward runs), and therefore the witness that a
sliced checkpoint is what its selection says.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from minipuzzle.architecture import Layer
from minipuzzle.families.table import TensorSpec, axis_sizes
from minipuzzle.model import Model
from minipuzzle.selection import LayerSelection, Selection
from minipuzzle.slicing import dim_index


@contextmanager
def masked(model: Model, selection: Selection) -> Iterator[nn.Module]:
    """The model's module, computing the cut model's function while the block runs.

    - Removed layers: the projection that writes the stream gives zero.
    - Units of a layer: zeroed where its inner activations enter that projection, or the norm
      before it. A norm over a narrowed axis divides by the root of the mean over the full width;
      it is made to divide by the one over the kept units.
    - Hidden channels: zeroed where the stream enters a norm, each of which is rescaled likewise.
      Nothing but norms reads the stream, so what is written to a cut channel is never seen.

    Numbers of units that no checkpoint can hold (unequal in the groups, different in layers of a
    kind) can be shown too: rankings are judged that way.

    Raises:
        UserError: for a selection that does not fit the model.
    """
    selection.check_indices(model.architecture)
    handles: list[RemovableHandle] = []
    try:
        for spec in model.family.tensors(model.architecture):
            handles += _mask_tensor(model, spec, selection)
        yield model.module
    finally:
        for handle in handles:
            handle.remove()


def _mask_tensor(model: Model, spec: TensorSpec, selection: Selection) -> list[RemovableHandle]:
    """The hooks that a tensor of the table asks for, on the module that holds it."""
    axes: LayerSelection | None = {} if spec.layer is None else selection.layers[spec.layer]
    if spec.role == "norm" and selection.hidden is not None:
        return _mask_norm(model, spec, _mask(model, spec, {"hidden": selection.hidden}), groups=1)
    if axes is None:
        return [_module(model, spec).register_forward_hook(_silence)] if _writes(spec) else []
    if spec.role == "inner_norm":
        return _mask_norm(model, spec, _mask(model, spec, axes), groups=_groups(model, spec))
    if _writes(spec) and not _has_inner_norm(model, spec):
        mask = _mask(model, spec, axes)
        if mask is not None:
            return [_module(model, spec).register_forward_pre_hook(_Scale(mask))]
    return []


def _mask_norm(
    model: Model, spec: TensorSpec, mask: torch.Tensor | None, *, groups: int
) -> list[RemovableHandle]:
    """Hooks by which a norm sees the kept units alone.

    The norm's mean is over all `width` units, that of the sliced norm over `kept` ones. With the
    input times c = sqrt(width / kept) both means are equal, the epsilon included; the output is
    c times too large. A norm with groups has a mean and a c for each.
    """
    if mask is None:
        return []
    share = mask.reshape(groups, -1).mean(1, keepdim=True).expand(-1, len(mask) // groups)
    c = share.reshape(-1).clamp_min(1 / len(mask)).rsqrt()  # whole groups may be cut
    module = _module(model, spec)
    return [
        module.register_forward_pre_hook(_Scale(mask * c)),
        module.register_forward_hook(_Scale(1 / c)),
    ]


def _module(model: Model, spec: TensorSpec) -> nn.Module:
    return model.module.get_submodule(model.family.memory_name(spec.name).removesuffix(".weight"))


def _writes(spec: TensorSpec) -> bool:
    return spec.role == "writes" and len(spec.shape) == 2


def _layer(model: Model, spec: TensorSpec) -> Layer:
    assert spec.layer is not None
    return model.architecture.layers[spec.layer]


def _groups(model: Model, spec: TensorSpec) -> int:
    """Groups over which the layer's inner norm takes separate means."""
    layer = _layer(model, spec)
    return getattr(layer, layer.grouping[1]) if layer.grouping else 1


def _has_inner_norm(model: Model, spec: TensorSpec) -> bool:
    layouts = model.family.layer_tensors[_layer(model, spec).kind]
    return any(layout.role == "inner_norm" for layout in layouts)


def _mask(model: Model, spec: TensorSpec, axes: LayerSelection) -> torch.Tensor | None:
    """1 for kept, 0 for cut units of the tensor's last dimension: (units,); None if all stay."""
    layer = None if spec.layer is None else model.architecture.layers[spec.layer]
    kept = dim_index(spec.layout.dims[-1], axis_sizes(model.architecture, layer), axes)
    if kept is None:
        return None
    mask = torch.zeros(spec.shape[-1], device=model.device)
    mask[kept.to(model.device)] = 1.0
    return mask


def _silence(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(output)


class _Scale:
    """Forward pre-hook (scales the first input) and forward hook (scales the output) in one."""

    def __init__(self, factor: torch.Tensor) -> None:
        self.factor = factor

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *output: torch.Tensor) -> Any:
        if output:
            return output[0] * self.factor.to(output[0].dtype)
        return (args[0] * self.factor.to(args[0].dtype), *args[1:])
