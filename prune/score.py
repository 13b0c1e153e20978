"""The stage `score`: what every layer, channel and head is worth, on calibration text.

Layers by one sweep (sweep.py), one-shot or iteratively (iterative.py); units from the full model's
activations (meters.py) as its states pass, layer after layer. The model is resident or streamed,
and several processes may share the text.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from minipuzzle import progress
from minipuzzle.checkpoint import Checkpoint
from minipuzzle.data.blocks import recipe_blocks
from minipuzzle.data.packing import blocks_fingerprint
from minipuzzle.errors import UserError
from minipuzzle.memory import memory
from minipuzzle.metrics import UNIT_METRICS, LayerMetric, UnitMetric
from minipuzzle.model import Model
from minipuzzle.processes import Processes
from minipuzzle.recipe import Recipe
from minipuzzle.residency import free_bytes, open_model
from minipuzzle.runfolder import RunFolder
from minipuzzle.scores import MODEL, Removal, Scores
from minipuzzle.source import resolve
from minipuzzle.streams import Stream
from minipuzzle.units import parse_budget
from minipuzzle.walk import Walk

from .iterative import Iteration, remove_iteratively
from .meters import UnitMeters
from .sweep import LayerSums, sweep

STATES_BYTES = 8 * 2**30  # of a group of sequences and all its variants, on the device
DEFAULT_METRICS: tuple[LayerMetric, ...] = ("hidden_mse",)


def run(recipe: Recipe, folder: RunFolder) -> None:
    """Stage `score`: write scores/ for the recipe's model on its calibration text."""
    teacher = resolve(recipe.model, recipe.revision)
    processes = Processes.current()
    inputs: dict[str, Any] = {
        MODEL: Checkpoint.open(teacher).fingerprint(),
        "score": recipe.score.model_dump(mode="json", exclude={"residency"}),
        "data": recipe.data.model_dump(mode="json"),
        "seed": recipe.seed,
    }
    if recipe.score.iterative == "budget":
        inputs |= {"budget": recipe.budget, "deployment": recipe.deployment.options()}

    asked = False

    def body(work: Path) -> None:
        nonlocal asked
        asked = processes.agree(True)
        _score_recipe(recipe, teacher, inputs, processes).save(work)

    if processes.first:
        folder.run_stage("score", "scores", inputs, body)
        if not asked:
            processes.agree(False)
    elif processes.agree(False):  # the first process says whether there is anything to compute
        _score_recipe(recipe, teacher, inputs, processes)


def _score_recipe(
    recipe: Recipe, teacher: Path, inputs: dict[str, Any], processes: Processes
) -> Scores:
    settings = recipe.score
    device = torch.device(processes.device)
    quiet = not processes.first
    model = open_model(teacher, device, residency=settings.residency, quiet=quiet)
    blocks = max(settings.blocks, settings.unit_blocks)
    ids = recipe_blocks(recipe, "calibration", model.tokenizer, blocks)
    return score(
        model,
        ids,
        {**inputs, "calibration": blocks_fingerprint(ids)},
        metrics=settings.metrics,
        unit_metrics=settings.unit_metrics,
        layer_sequences=settings.blocks,
        iterative=_iteration(recipe, model),
        processes=processes,
    )


def _iteration(recipe: Recipe, model: Model) -> Iteration | None:
    """The recipe's iterative removal: to a number of layers (or blocks), or until it fits."""
    wanted, metric = recipe.score.iterative, recipe.score.iterative_metric
    family, architecture = model.family, model.architecture
    units = family.removable(architecture)
    if wanted == 0:
        return None
    if isinstance(wanted, int):
        number = wanted
        return Iteration(metric, lambda gone: sum(u[0] in gone for u in units) >= number)
    deployment = recipe.deployment.build()
    budget = parse_budget(recipe.budget).of(memory(architecture, family, deployment).total)

    def fits(gone: frozenset[int]) -> bool:
        left = tuple(layer for i, layer in enumerate(architecture.layers) if i not in gone)
        return memory(replace(architecture, layers=left), family, deployment).total <= budget

    return Iteration(metric, fits)


@torch.no_grad()
def score(
    model: Model,
    ids: torch.Tensor,
    provenance: dict[str, Any],
    *,
    metrics: Sequence[LayerMetric] = DEFAULT_METRICS,
    unit_metrics: Sequence[UnitMetric] = UNIT_METRICS,
    layer_sequences: int | None = None,
    iterative: Iteration | None = None,
    states_bytes: int | None = None,
    processes: Processes | None = None,
) -> Scores:
    """Score every layer, every axis of the units, and the hidden channels.

    Units see all sequences; layers, which cost half a forward pass each, only the first
    `layer_sequences`.

    Args:
        model: resident or streamed, on any device, in any dtype.
        ids: calibration text (B, T), the whole of it in every process.
        provenance: what goes into `Scores.provenance`.
        metrics: of the layers; () for none.
        unit_metrics: of units and hidden channels; () for none.
        layer_sequences: None for all.
        iterative: removes layers one by one and scores again.
        states_bytes: of the hidden states of one group of sequences and all its variants; more
            sequences are swept in several groups. None: what the memory allows.
        processes: those that share the sequences; the scores are the same in all.

    Raises:
        UserError: for no text, and for NaN or infinity in weights or activations.
    """
    if ids.dim() != 2 or not ids.numel():
        raise UserError("there is no calibration text to score on; raise score.blocks")
    run = Scoring.start(model, ids, layer_sequences, processes or Processes(), states_bytes)
    meters = UnitMeters(model, unit_metrics, ids.numel(), run.processes)
    asked = {*metrics, iterative.metric} if iterative else {*metrics}
    sums = run.first_pass(asked, meters, keep_uncut=iterative is not None)
    hidden = model.architecture.hidden
    of_units = sums.scores(hidden)
    return Scores(
        kinds=tuple(layer.kind for layer in model.architecture.layers),
        layers={m: _per_layer(of_units[m], sums.units) for m in of_units},
        units=meters.units,
        provenance=provenance,
        hidden=meters.hidden,
        removals=run.remove(iterative, of_units[iterative.metric]) if iterative else (),
    )


def _per_layer(values: torch.Tensor, units: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """One score per layer, those of a unit the same: (U,) -> (L,)."""
    return torch.stack([value for value, layers in zip(values, units, strict=True) for _ in layers])


@dataclass
class Scoring:
    """One model, and this process's share of the text in groups that are swept at once."""

    walk: Walk
    groups: list[torch.Tensor]
    others: torch.Tensor  # sequences that units see and layers do not
    processes: Processes
    uncut: list[Stream | None]

    @classmethod
    def start(
        cls,
        model: Model,
        ids: torch.Tensor,
        layer_sequences: int | None,
        processes: Processes,
        states_bytes: int | None,
    ) -> Scoring:
        """Share the text out and cut the layers' part of it into groups."""
        walk = Walk(model)
        number = len(ids) if layer_sequences is None else layer_sequences
        own = processes.share(ids[:number])
        variants = len(model.family.removable(model.architecture)) + 2
        per_sequence = variants * ids.shape[1] * model.architecture.hidden * _itemsize(model)
        rows = max(1, (states_bytes or _states_bytes(walk)) // per_sequence)
        groups = [own[i : i + rows] for i in range(0, max(1, len(own)), rows)]
        return cls(walk, groups, processes.share(ids[number:]), processes, [None] * len(groups))

    def first_pass(
        self, metrics: Collection[LayerMetric], meters: UnitMeters, *, keep_uncut: bool
    ) -> LayerSums:
        """Sweep all groups with nothing gone; the meters hear everything along with the first."""
        sums = LayerSums.of(self.walk, metrics)
        groups = self.groups if metrics else self.groups[:1]
        also = torch.cat([*self.groups[1:], self.others]) if meters.metrics else None
        _require_finite_weights(self.walk, None)
        with _bar(self, "score", len(groups)) as advance:
            for k, group in enumerate(groups):
                full = sweep(
                    self.walk,
                    group,
                    sums,
                    also=None if k else also,
                    listener=_quiet if k else self._listener(meters),
                    advance=advance,
                )
                self.uncut[k] = full if keep_uncut else None
        self.processes.sum(sums.table, sums.shared)
        return sums

    def _listener(self, meters: UnitMeters) -> Callable[[int], Any]:
        @contextmanager
        def listen(i: int) -> Iterator[None]:
            _require_finite_weights(self.walk, i)
            with meters.layer(i):
                yield

        return listen

    def remove(self, iteration: Iteration, first: torch.Tensor) -> tuple[Removal, ...]:
        """Remove layers one by one; `first` is what every unit is worth in the whole model."""
        architecture = self.walk.model.architecture
        units = self.walk.model.family.removable(architecture)

        def measure(gone: frozenset[int]) -> torch.Tensor:
            if not gone:
                return first
            sums = LayerSums.of(self.walk, [iteration.metric])
            with _bar(self, f"score -{len(gone)}", len(self.groups), gone) as advance:
                for group, uncut in zip(self.groups, self.uncut, strict=True):
                    sweep(self.walk, group, sums, gone=gone, uncut=uncut, advance=advance)
            self.processes.sum(sums.table, sums.shared)
            return sums.scores(architecture.hidden)[iteration.metric]

        return remove_iteratively(architecture, units, measure, iteration.done)


def _quiet(i: int) -> Any:
    return nullcontext()


@contextmanager
def _bar(
    run: Scoring, label: str, groups: int, gone: Collection[int] = ()
) -> Iterator[Callable[[], None]]:
    """A progress bar over the layers of some sweeps; only the first process shows one."""
    if not run.processes.first:
        yield lambda: None
        return
    steps = groups * (run.walk.num_layers - len(gone))
    with progress.bar(label, steps, "layers") as bar:
        yield bar.advance


def _states_bytes(walk: Walk) -> int:
    """Memory for hidden states: on the device beside the weights, else in the host's memory."""
    if walk.streamed:
        return free_bytes(torch.device("cpu")) // 2
    return min(STATES_BYTES, free_bytes(walk.device) // 3)


def _itemsize(model: Model) -> int:
    return next(model.part("norm").parameters()).dtype.itemsize


def _require_finite_weights(walk: Walk, i: int | None) -> None:
    """UserError where a tensor of layer i (None: of no layer) holds NaN or infinity."""
    model = walk.model
    for spec in model.family.tensors(model.architecture):
        if spec.layer != i:
            continue
        tensor = model.parameter(spec.name)
        # a sum is not finite where one of its terms is not
        if tensor.device.type != "meta" and not tensor.sum(dtype=torch.float32).isfinite():
            where = "" if i is None else f"layer {i} ({model.architecture.layers[i].kind}): "
            raise UserError(
                f"{where}{spec.name} holds NaN or infinite values; download the model again"
            )
