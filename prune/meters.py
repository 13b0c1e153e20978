"""Importance of units (channels, heads, groups) from the full model's activations.

A meter listens to one place of a layer: what the layer's norm gives, what the projection that
writes the stream reads, or where the family's table says that the published score is read. Every
axis is folded from the channels of its place: a head is the sum over its channels, a head channel
the sum over the heads (one choice for all of them), a group the sum over its heads. The metrics
are those of minipuzzle/metrics.py.

Accumulators lie on the model's device, in fp32 or fp64, and are sums over sequences: those of
several processes add up. Second moments exist for one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from minipuzzle.architecture import Layer
from minipuzzle.families.table import Probe, TensorLayout, axis_sizes, segment_size
from minipuzzle.metrics import UnitMetric
from minipuzzle.model import Model
from minipuzzle.processes import Processes
from minipuzzle.selection import CUT_AXES

from .headsurgeon import damped_inverse, head_surgeon_scores
from .surgeon import surgeon_scores

TOKENS_PER_CHANNEL = 2  # fewer, and the second moments say nothing of how units replace each other
OF_SPREAD: frozenset[UnitMetric] = frozenset({"flap", "energy"})


@dataclass(frozen=True)
class Place:
    """Channels `start` onwards of a module's input or output; `shape` by `axes`, slowest first."""

    module: str
    side: Literal["input", "output"]
    start: int
    axes: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def channels(self) -> int:
        """Number of channels."""
        return int(torch.Size(self.shape).numel())

    def columns(self, axis: str, layer: Layer) -> torch.Tensor | None:
        """Channels of every unit of an axis, (units, channels each); None where it is not here."""
        channels = torch.arange(self.channels).reshape(self.shape)
        if axis in self.axes:
            dim = self.axes.index(axis)
            return channels.movedim(dim, 0).reshape(self.shape[dim], -1)
        if layer.grouping is not None and layer.grouping[1] == axis:
            members = self.columns(layer.grouping[0], layer)
            return None if members is None else members.reshape(getattr(layer, axis), -1)
        return None


class Meter:
    """Sums of one place over sequences; only what is wanted is accumulated."""

    def __init__(
        self, place: Place, device: torch.device, *, published: bool, spread: bool, moments: bool
    ) -> None:
        def zeros(wanted: bool, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
            return torch.zeros(shape if wanted else 0, dtype=dtype, device=device)

        self.place = place
        self.count = torch.zeros(1, dtype=torch.float64, device=device)
        self.published = zeros(published, place.channels)
        self.sums = zeros(spread, place.channels)
        self.squares = zeros(spread, place.channels)
        self.moments = zeros(moments, place.channels, place.channels, dtype=torch.float32)

    def add(self, activations: torch.Tensor) -> None:
        """Take activations (B, T, channels of the module), whole sequences."""
        own = activations[..., self.place.start : self.place.start + self.place.channels]
        self.count += own.shape[0] * own.shape[1]
        if len(self.published):
            means = _norm(own, 1, 1) / own.shape[1]
            self.published += means.double().square().sum(0)
        if len(self.sums):
            self.sums += own.sum((0, 1), dtype=torch.float32)
            self.squares += _norm(own, 2, (0, 1)).double().square()
        if len(self.moments):
            flat = own.flatten(0, 1).float()
            self.moments.addmm_(flat.T, flat)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All accumulators, to be summed over processes in place."""
        return (self.count, self.published, self.sums, self.squares, self.moments)

    def channel_values(
        self, metrics: Collection[UnitMetric], reader: torch.Tensor
    ) -> dict[UnitMetric, torch.Tensor]:
        """Metric -> the square of each channel's score, (channels,), fp64 on the CPU.

        `reader`: squared norm of the weights that read each channel.
        """
        count, total, squares = self.count.cpu(), self.sums.cpu(), self.squares.cpu()
        values: dict[UnitMetric, torch.Tensor] = {}
        if len(self.published) and "activation" in metrics:
            values["activation"] = self.published.cpu()
        if len(self.sums) and "energy" in metrics:
            values["energy"] = squares / count * reader
        if len(self.sums) and "flap" in metrics:
            spread = (squares - total.square() / count).clamp_min(0) / (count - 1).clamp_min(1)
            values["flap"] = spread * reader
        return values


def _norm(activations: torch.Tensor, order: int, dims: int | tuple[int, ...]) -> torch.Tensor:
    """Vector norm over some dimensions in fp32, the one kind that copies no bf16 activations."""
    norm: torch.Tensor = torch.linalg.vector_norm(activations, order, dims, dtype=torch.float32)
    return norm


def _column_power(weight: torch.Tensor) -> torch.Tensor:
    """Squared norm of every column, (columns,), fp64 on the CPU."""
    return _norm(weight, 2, 0).double().square().cpu()


class UnitMeters:
    """All units of a model: use `layer(i)` around the full model's walk through layer i."""

    def __init__(
        self,
        model: Model,
        metrics: Collection[UnitMetric],
        tokens: int,
        processes: Processes | None = None,
    ) -> None:
        """`tokens`: of all processes together, which decides where `surgeon` is possible."""
        self.model, self.metrics, self.tokens = model, frozenset(metrics), tokens
        self.processes = processes or Processes()
        self.units: dict[tuple[int, str, str], torch.Tensor] = {}
        self._hidden: dict[UnitMetric, torch.Tensor] = {}

    @property
    def hidden(self) -> dict[str, torch.Tensor]:
        """Metric -> one score per hidden channel: over all layers walked, (D,), fp64."""
        return {
            metric: values if metric == "activation" else values.sqrt()
            for metric, values in self._hidden.items()
        }

    @contextmanager
    def layer(self, i: int) -> Iterator[None]:
        """Listen while the block runs, then turn what was heard into the layer's scores."""
        if not self.metrics:
            yield
            return
        meters = self._meters(i)
        block = self.model.layer(i)
        handles = [_attach(block.get_submodule(m.place.module), m) for m in meters.values()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        for meter in meters.values():
            self.processes.sum(*meter.tensors)
        self._finish_units(i, meters)
        self._finish_hidden(i, meters["norm"])

    def _meters(self, i: int) -> dict[str, Meter]:
        """`norm`: the norm's output; `writer`: the writer's input; `probe`: the published place."""
        layer, family = self.model.architecture.layers[i], self.model.family
        sizes = axis_sizes(self.model.architecture, layer)
        norm = Place(family.norms[layer.kind], "output", 0, ("hidden",), (sizes["hidden"],))
        writer = _place(_projection(family.writer(layer.kind), "input"), self.model, i)
        published = _place(family.probes[layer.kind][0], self.model, i)
        device = self.model.device
        spread = bool(self.metrics & OF_SPREAD)
        activation = "activation" in self.metrics
        enough = self.tokens >= TOKENS_PER_CHANNEL * writer.channels
        meters = {
            "norm": Meter(norm, device, published=activation, spread=spread, moments=False),
            "writer": Meter(
                writer,
                device,
                published=activation and published == writer,
                spread=spread,
                moments=enough and "surgeon" in self.metrics,
            ),
        }
        if activation and published != writer:
            meters["probe"] = Meter(published, device, published=True, spread=False, moments=False)
        return meters

    def _finish_units(self, i: int, meters: Mapping[str, Meter]) -> None:
        layer, writer = self.model.architecture.layers[i], meters["writer"]
        weight = _weight(self.model, i, self.model.family.writer(layer.kind))
        reader = _column_power(weight)
        for meter in (writer, meters.get("probe", writer)):
            for metric, values in meter.channel_values(self.metrics, reader).items():
                for axis in CUT_AXES[layer.kind]:
                    columns = meter.place.columns(axis, layer)
                    if columns is not None:
                        self.units[i, axis, metric] = values[columns].sum(1).sqrt()
        if len(writer.moments):
            places = _surgeon(writer, weight, CUT_AXES[layer.kind], layer)
            self.units |= {(i, axis, "surgeon"): values for axis, values in places.items()}

    def _finish_hidden(self, i: int, norm: Meter) -> None:
        """Published: sum over the layers; output energy: all weights of all layers that read it."""
        layer = self.model.architecture.layers[i]
        reader = torch.zeros(norm.place.channels, dtype=torch.float64)
        for layout in self.model.family.layer_tensors[layer.kind]:
            if layout.role == "reads" and len(layout.dims) == 2:
                reader += _column_power(_weight(self.model, i, layout))
        for metric, values in norm.channel_values(self.metrics, reader).items():
            values = values.sqrt() if metric == "activation" else values
            self._hidden[metric] = self._hidden.get(metric, 0) + values


def _surgeon(
    writer: Meter, weight: torch.Tensor, axes: Collection[str], layer: Layer
) -> dict[str, torch.Tensor]:
    """Axis -> place of every unit in the order of removal; the inverse is made once."""
    found = {axis: writer.place.columns(axis, layer) for axis in axes}
    groups = {axis: columns for axis, columns in found.items() if columns is not None}
    if all(columns.shape[1] == 1 for columns in groups.values()):
        return {axis: surgeon_scores(writer.moments, weight) for axis in groups}
    inverse = damped_inverse(writer.moments)
    return {axis: head_surgeon_scores(inverse, weight, cols) for axis, cols in groups.items()}


def _weight(model: Model, i: int, layout: TensorLayout) -> torch.Tensor:
    return model.parameter(model.family.prefix(i) + layout.name).detach()


def _projection(layout: TensorLayout, side: Literal["input", "output"]) -> Probe:
    """The place where a projection is read, whatever axes it carries."""
    return Probe("", layout.name.removesuffix(".weight"), side)


def _place(probe: Probe, model: Model, i: int) -> Place:
    """The channels that a probe means, from the layout of the projection it names."""
    layer = model.architecture.layers[i]
    sizes = axis_sizes(model.architecture, layer)
    layout = next(
        t for t in model.family.layer_tensors[layer.kind] if t.name == f"{probe.module}.weight"
    )
    dim = layout.dims[-1 if probe.side == "input" else 0]
    start = sum(segment_size(segment, sizes) for segment in dim[: probe.segment])
    axes = dim[probe.segment]
    return Place(probe.module, probe.side, start, axes, tuple(sizes[axis] for axis in axes))


def _attach(module: nn.Module, meter: Meter) -> Any:
    if meter.place.side == "input":
        return module.register_forward_pre_hook(_on_input(meter))
    return module.register_forward_hook(_on_output(meter))


def _on_input(meter: Meter) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    return lambda module, args: meter.add(args[0])


def _on_output(meter: Meter) -> Callable[[nn.Module, Any, torch.Tensor], None]:
    return lambda module, args, output: meter.add(output)
