"""Repair without training: the projections that write the stream, re-fitted in closed form.

Teacher and student walk over the same tokens in lock-step. After each layer the student's writing
projection W is solved anew so that its stream meets the teacher's (ridge regression towards the
old weights):

    min over W of  sum over tokens |t - (s + W a)|^2  +  r |W - W0|^2

with t the teacher's stream after the layer, s the student's before it and a what W reads. It is
the idea of GRAIL and of ReplaceMe (arXiv 2505.02819), applied to every writer in turn, each seeing
the stream that the earlier repairs have left. Removed layers are made up for by the next writers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from minipuzzle import progress
from minipuzzle.checkpoint import Checkpoint
from minipuzzle.data.blocks import recipe_blocks
from minipuzzle.files import atomic_write_json
from minipuzzle.jsonfile import read_json
from minipuzzle.model import Model, load, save, stored_dtype
from minipuzzle.recipe import Recipe
from minipuzzle.runfolder import RunFolder
from minipuzzle.selection import Selection
from minipuzzle.source import resolve
from minipuzzle.walk import Walk, chunks


def run(recipe: Recipe, folder: RunFolder) -> None:
    """Stage `repair`: write repaired/ from the teacher and pruned/, on calibration text."""
    teacher = resolve(recipe.model, recipe.revision)
    pruned = folder.artefact("pruned")
    inputs = {
        "teacher": Checkpoint.open(teacher).fingerprint(),
        "pruned": folder.fingerprint("pruned"),
        "repair": recipe.repair.model_dump(mode="json"),
        "data": recipe.data.model_dump(mode="json"),
        "seed": recipe.seed,
    }

    def body(work: Path) -> None:
        selection = Selection.from_json(read_json(pruned / "selection.json"))
        ahead, student = load(teacher), load(pruned)
        ids = recipe_blocks(recipe, "calibration", ahead.tokenizer, recipe.repair.blocks)
        dtype = stored_dtype(Checkpoint.open(pruned))
        refits = repair(ahead, student, selection, ids, ridge=recipe.repair.ridge, dtype=dtype)
        save(student, work, dtype=dtype)
        atomic_write_json(work / "selection.json", selection.to_json())
        atomic_write_json(work / "repair.json", {"refits": [asdict(refit) for refit in refits]})

    folder.run_stage("repair", "repaired", inputs, body)


@dataclass(frozen=True)
class Refit:
    """One repaired layer: relative squared distance to the teacher's stream before and after."""

    layer: int
    before: float
    after: float


@torch.no_grad()
def repair(
    teacher: Model,
    student: Model,
    selection: Selection,
    ids: torch.Tensor,
    *,
    ridge: float,
    dtype: torch.dtype = torch.bfloat16,
    label: str = "repair",
) -> list[Refit]:
    """Re-fit the student's writing projections in place.

    Args:
        teacher: the uncut model.
        student: the model that `selection` leaves of it; its parameters are changed.
        selection: the cut.
        ids: calibration tokens (B, T).
        ridge: r relative to the mean diagonal of the second moments of a.
        dtype: what the student will be stored in; every solution is rounded to it before the
            later layers are fitted, so that they make up for the rounding too.
        label: of the progress bar.

    Returns:
        One record per re-fitted layer.
    """
    ahead, behind = Walk(teacher), Walk(student)
    positions = {position: j for j, position in enumerate(selection.kept)}
    target = [ahead.embed(ids_) for ids_ in chunks(ids)]
    stream = target
    refits: list[Refit] = []
    with progress.bar(label, len(selection.layers), "layers") as bar:
        for i, axes in enumerate(selection.layers):
            target = [ahead.layer(i, hidden) for hidden in target]
            if axes == {} and not refits and stream_is_whole(selection, i):
                stream = target
            elif axes is not None:
                stream, refit = refit_layer(behind, positions[i], stream, target, ridge, dtype)
                refits.append(refit)
            bar.advance()
    return refits


def stream_is_whole(selection: Selection, i: int) -> bool:
    """Whether the student equals the teacher up to and including layer i."""
    return all(axes == {} for axes in selection.layers[: i + 1])


def refit_layer(
    walk: Walk,
    j: int,
    stream: list[torch.Tensor],
    target: list[torch.Tensor],
    ridge: float,
    dtype: torch.dtype,
) -> tuple[list[torch.Tensor], Refit]:
    """Solve the writer of student layer j and return the stream after it."""
    model = walk.model
    layer = model.architecture.layers[j]
    prefix = model.family.prefix(j)
    weight = model.parameter(prefix + model.family.writer(layer.kind).name)
    writer = model.module.get_submodule(
        model.family.memory_name(prefix + model.family.writer(layer.kind).name).removesuffix(
            ".weight"
        )
    )
    moments = Moments(weight)
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    before = 0.0
    for hidden, wanted in zip(stream, target, strict=True):
        with capturing(writer) as seen:
            output = walk.layer(j, hidden)
        read = torch.cat(seen).flatten(0, 1)
        residual = (wanted - output).flatten(0, 1)
        moments.add(read, residual)
        before += float(residual.double().square().sum())
        inputs.append(read)
        outputs.append(output)
    change = (moments.solve(ridge) + weight.double()).to(dtype).to(weight.dtype) - weight
    weight.add_(change)
    after = 0.0
    repaired = []
    for read, output, wanted in zip(inputs, outputs, target, strict=True):
        output = output + (read @ change.T).view_as(output)
        after += float((wanted - output).double().square().sum())
        repaired.append(output)
    power = sum(float(wanted.double().square().sum()) for wanted in target)
    return repaired, Refit(layer=j, before=before / power, after=after / power)


class Moments:
    """Second moments of what a projection reads and of what its output lacks, in fp64."""

    def __init__(self, weight: torch.Tensor) -> None:
        outputs, units = weight.shape
        self.gram = torch.zeros(units, units, dtype=torch.float64, device=weight.device)
        self.cross = torch.zeros(units, outputs, dtype=torch.float64, device=weight.device)

    def add(self, read: torch.Tensor, residual: torch.Tensor) -> None:
        """Take what is read (N, units) and what the output lacks (N, outputs)."""
        self.gram += (read.T @ read).double()
        self.cross += (read.T @ residual).double()

    def solve(self, ridge: float) -> torch.Tensor:
        """The change of the weight, (outputs, units), that the ridge regression asks for."""
        damping = ridge * self.gram.diagonal().mean()
        damped = self.gram + damping * torch.eye(len(self.gram), dtype=torch.float64).to(self.gram)
        factor = torch.linalg.cholesky(damped)
        return torch.cholesky_solve(self.cross, factor).T


@contextmanager
def capturing(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect the inputs of a module while the block runs."""
    seen: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()
