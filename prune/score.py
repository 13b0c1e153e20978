"""Importance of layers and units in one sweep over the model.

Layers: MSE of the state just before the head between the full model and the model without that
layer (MiniPuzzle: Nemotron-H, arXiv 2504.03624, section 3.2). At layer i the batch holds the full
model and every variant with an earlier layer removed; the variant "without i" is born as the input
of i, so that all layers cost half a forward pass each and every weight is read once.

Units, from the full model's activations on the way: `activation` is the published score (mean over
the sequence of |a|, L2 over the sequences, L2 over the channels of a head: Minitron, arXiv
2407.14679; Minitron-SSM, arXiv 2504.11409, equations 19 to 24), `energy` the root of the mean of
a^2 times the squared norm of the weights that read it, `surgeon` the place in the order in which
units can go when the others make up for them (surgeon.py); it needs many more tokens than units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minipuzzle import progress
from minipuzzle.checkpoint import Checkpoint
from minipuzzle.data.blocks import recipe_blocks
from minipuzzle.families.table import Probe, TensorLayout, axis_sizes, segment_size
from minipuzzle.model import Model, load
from minipuzzle.recipe import Recipe
from minipuzzle.runfolder import RunFolder
from minipuzzle.scores import Scores
from minipuzzle.source import resolve
from minipuzzle.walk import Walk

from .surgeon import surgeon_scores

SEQUENCES_PER_SWEEP = 4
MAX_SURGEON_UNITS = 4096  # second moments of all layers stay in memory: 128 MiB a layer at most


def run(recipe: Recipe, folder: RunFolder) -> None:
    """Stage `score`: write scores/ for the recipe's model on its calibration text."""
    teacher = resolve(recipe.model, recipe.revision)
    inputs = {
        "teacher": Checkpoint.open(teacher).fingerprint(),
        "score": recipe.score.model_dump(mode="json"),
        "data": recipe.data.model_dump(mode="json"),
        "seed": recipe.seed,
    }

    def body(work: Path) -> None:
        model = load(teacher)
        blocks = max(recipe.score.blocks, recipe.score.unit_blocks)
        ids = recipe_blocks(recipe, "calibration", model.tokenizer, blocks)
        score(model, ids, inputs, layer_sequences=recipe.score.blocks).save(work)

    folder.run_stage("score", "scores", inputs, body)


@torch.no_grad()
def score(
    model: Model,
    ids: torch.Tensor,
    provenance: dict[str, Any],
    *,
    layer_sequences: int | None = None,
) -> Scores:
    """Score every layer and every probed axis on ids (B, T).

    Units see all sequences; layers, which cost as many passes as there are layers, only the first
    `layer_sequences` (None: all).
    """
    walk = Walk(model)
    squares = torch.zeros(walk.num_layers, dtype=torch.float64)
    meters = {
        (i, probe.axis): Meter(model, i, probe)
        for i, layer in enumerate(model.architecture.layers)
        for probe in model.family.probes[layer.kind]
    }
    swept = ids[:layer_sequences]
    parts = [*_groups(swept), *_groups(ids[len(swept) :])]
    with progress.bar("score", len(parts) * walk.num_layers, "layers") as bar:
        for part, batch in enumerate(parts):
            variants = part < len(_groups(swept))
            squares += sweep(walk, batch, meters, bar.advance, variants=variants)
    units = {
        (i, axis, metric): values
        for (i, axis), meter in meters.items()
        for metric, values in meter.result().items()
    }
    elements = swept.numel() * model.architecture.hidden
    kinds = tuple(layer.kind for layer in model.architecture.layers)
    return Scores(kinds=kinds, layers=squares / elements, units=units, provenance=provenance)


def _groups(ids: torch.Tensor) -> list[torch.Tensor]:
    return [ids[i : i + SEQUENCES_PER_SWEEP] for i in range(0, len(ids), SEQUENCES_PER_SWEEP)]


def sweep(
    walk: Walk,
    ids: torch.Tensor,
    meters: dict[tuple[int, str], Meter],
    advance: Callable[[], None],
    *,
    variants: bool = True,
) -> torch.Tensor:
    """Squared error of the final state without each layer, summed over ids (B, T): (L,), fp64.

    Without `variants` only the meters listen to the full model, and the errors are zero.
    """
    full = walk.embed(ids)
    cut = full[:0]
    for i in range(walk.num_layers):
        here = [meter for (layer, _), meter in meters.items() if layer == i]
        born = full
        with _listening(here):
            full = walk.layer(i, full)
        if variants:
            cut = torch.cat([walk.layer(i, cut) if len(cut) else cut, born])
        advance()
    if not variants:
        return torch.zeros(walk.num_layers, dtype=torch.float64)
    reference = walk.final(full)
    differences = [
        (walk.final(cut[start : start + len(ids)]) - reference).double().square().sum()
        for start in range(0, len(cut), len(ids))
    ]
    return torch.stack(differences).cpu()


@torch.no_grad()
def layer_scores_reference(model: Model, ids: torch.Tensor) -> torch.Tensor:
    """The plain way, one forward pass per removed layer: MSE per layer, (L,), fp64."""
    walk = Walk(model)

    def final_without(gone: int | None) -> torch.Tensor:
        hidden = walk.embed(ids)
        for i in range(walk.num_layers):
            if i != gone:
                hidden = walk.layer(i, hidden)
        return walk.final(hidden)

    full = final_without(None)
    return torch.stack(
        [(final_without(i) - full).double().square().mean() for i in range(walk.num_layers)]
    ).cpu()


class Meter:
    """Accumulates one axis of one layer where the family's table says it is scored."""

    def __init__(self, model: Model, i: int, probe: Probe) -> None:
        self.probe = probe
        self.module = model.layer(i).get_submodule(probe.module)
        layer = model.architecture.layers[i]
        layout = next(
            t for t in model.family.layer_tensors[layer.kind] if t.name == f"{probe.module}.weight"
        )
        sizes = axis_sizes(model.architecture, layer)
        self.start, self.segment = _segment(layout, probe, sizes)
        self.shape = tuple(sizes[axis] for axis in self.segment)
        self.weight = self._reader(model, i)
        self.reader = self.weight.double().square().sum(0).reshape(self.shape).cpu()
        self.published = torch.zeros(self.shape, dtype=torch.float64)
        self.energy = torch.zeros(self.shape, dtype=torch.float64)
        self.moments: torch.Tensor | None = None
        units = self.reader.numel()
        if probe.side == "input" and len(self.segment) == 1 and units <= MAX_SURGEON_UNITS:
            self.moments = torch.zeros(units, units, dtype=torch.float64)
        self.tokens = 0

    def add(self, activations: torch.Tensor) -> None:
        """Take activations (B, T, channels) of the probed side."""
        stop = self.start + self.reader.numel()
        own = activations[..., self.start : stop]
        own = own.reshape(*own.shape[:-1], *self.shape)
        self.published += own.abs().mean(1).double().square().sum(0).cpu()
        self.energy += own.double().square().sum((0, 1)).cpu()
        self.tokens += own.shape[0] * own.shape[1]
        if self.moments is not None:
            flat = own.flatten(0, 1)
            self.moments += (flat.T @ flat).double().cpu()

    def result(self) -> dict[str, torch.Tensor]:
        """Metric -> one score per unit of the axis."""
        energy = self.energy / self.tokens * self.reader
        axis = self.segment.index(self.probe.axis)
        others = [d for d in range(len(self.segment)) if d != axis]

        def per_unit(squares: torch.Tensor) -> torch.Tensor:
            return (squares.sum(others) if others else squares).sqrt()

        result = {"activation": per_unit(self.published), "energy": per_unit(energy)}
        if self.moments is not None:
            result["surgeon"] = surgeon_scores(self.moments, self.weight)
        return result

    def _reader(self, model: Model, i: int) -> torch.Tensor:
        """The projection that reads these channels into the stream, (hidden, channels)."""
        layer = model.architecture.layers[i]
        name = model.family.prefix(i) + model.family.writer(layer.kind).name
        return model.parameter(name).detach()


def _segment(
    layout: TensorLayout, probe: Probe, sizes: dict[str, int]
) -> tuple[int, tuple[str, ...]]:
    """First channel and axes of the probed segment of a projection's input or output."""
    dim = layout.dims[-1 if probe.side == "input" else 0]
    start = sum(segment_size(segment, sizes) for segment in dim[: probe.segment])
    return start, dim[probe.segment]


@contextmanager
def _listening(meters: list[Meter]) -> Iterator[None]:
    handles = []
    for meter in meters:
        if meter.probe.side == "input":
            handles.append(meter.module.register_forward_pre_hook(_on_input(meter)))
        else:
            handles.append(meter.module.register_forward_hook(_on_output(meter)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _on_input(meter: Meter) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    return lambda module, args: meter.add(args[0])


def _on_output(meter: Meter) -> Callable[[nn.Module, Any, torch.Tensor], None]:
    return lambda module, args, output: meter.add(output)
