"""Repair without training: what is left of every layer, re-fitted in closed form.

Teacher and student walk over the same tokens in lock-step. At each layer of the student, from the
first that differs from the teacher's on, three least-squares problems are solved, each seeing the
stream that the earlier repairs have left:

1. the projections that read the stream, so that from the student's stream they say what the
   teacher's say from its own (refit.refit_readers);
2. where asked for, the inside of narrowed layers, by steps on its linearisation (linearise.py);
3. the projection that writes the stream, so that the student's stream meets the teacher's
   (refit.refit_writer): the idea of GRAIL and of ReplaceMe (arXiv 2505.02819), applied to every
   writer in turn. Removed layers are made up for by all that come after them.

At the end the head is re-fitted like any other reader, unless it is tied to the embedding. A norm
over channels that a cut took away needs no step of its own: one factor per channel is what the
writer's columns absorb.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from minipuzzle import progress
from minipuzzle.checkpoint import Checkpoint
from minipuzzle.data.blocks import recipe_blocks
from minipuzzle.files import atomic_write_json
from minipuzzle.jsonfile import read_json
from minipuzzle.model import LayerWriter, Model, stored_dtype
from minipuzzle.recipe import Recipe
from minipuzzle.residency import open_model
from minipuzzle.runfolder import RunFolder
from minipuzzle.selection import Selection
from minipuzzle.slicing import take, tensor_index
from minipuzzle.source import resolve
from minipuzzle.streams import Stream
from minipuzzle.walk import Walk

from .linearise import LayerProblem, improve_readers
from .moments import Moments
from .refit import Refit, matrices, refit_readers, refit_writer


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
        refits = _repair_recipe(recipe, teacher, pruned, work)
        atomic_write_json(work / "repair.json", {"refits": [asdict(refit) for refit in refits]})

    folder.run_stage("repair", "repaired", inputs, body)


def _repair_recipe(recipe: Recipe, teacher: Path, pruned: Path, work: Path) -> list[Refit]:
    """Write the repaired checkpoint of `pruned` to `work`, layer by layer as they are done."""
    selection = Selection.from_json(read_json(pruned / "selection.json"))
    atomic_write_json(work / "selection.json", selection.to_json())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = recipe.score.residency
    ahead = open_model(teacher, device, residency=where)
    student = open_model(pruned, device, residency=where)
    ids = recipe_blocks(recipe, "calibration", ahead.tokenizer, recipe.repair.blocks)
    dtype = stored_dtype(Checkpoint.open(pruned))
    settings = recipe.repair.model_dump(exclude={"blocks"})
    with LayerWriter(student, work, dtype) as writer:
        refits = repair(
            ahead, student, selection, ids, **settings, dtype=dtype, finished=writer.layer
        )
        writer.rest()
    return refits


@dataclass(frozen=True)
class Settings:
    """How to repair; see `repair`."""

    ridge: float
    reader_ridge: float
    steps: int
    dtype: torch.dtype


@torch.no_grad()
def repair(
    teacher: Model,
    student: Model,
    selection: Selection,
    ids: torch.Tensor,
    *,
    ridge: float = 1e-3,
    reader_ridge: float = 1e-3,
    steps: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    label: str = "repair",
    finished: Callable[[int], None] | None = None,
) -> list[Refit]:
    """Re-fit the student's projections in place.

    Args:
        teacher: the uncut model; it may be streamed.
        student: the model that `selection` leaves of it; its parameters are changed.
        selection: the cut.
        ids: calibration tokens (B, T).
        ridge: of writers, relative to the mean power of what they read.
        reader_ridge: of the readers of the stream and the head; 0 leaves them as they are.
        steps: on the linearisation of narrowed layers, before their writer.
        dtype: what the student will be stored in; every solution is rounded to it before the
            later layers are fitted, so that they make up for the rounding too.
        label: of the progress bar.
        finished: called with every position of the student when that layer is done. A streamed
            student's layer is lost after that; the head is done at the end.

    Returns:
        One record per re-fitted layer.

    Raises:
        UserError: when activations are not finite.
    """
    settings = Settings(ridge=ridge, reader_ridge=reader_ridge, steps=steps, dtype=dtype)
    lockstep = Lockstep(teacher, student, selection, ids, settings)
    with progress.bar(label, len(selection.layers), "layers") as bar:
        for i in lockstep.layers():
            if finished is not None and i in lockstep.positions:
                finished(lockstep.positions[i])
            bar.advance()
    lockstep.finish()
    return lockstep.refits


class Lockstep:
    """Teacher and student on their way through the same tokens."""

    def __init__(
        self,
        teacher: Model,
        student: Model,
        selection: Selection,
        ids: torch.Tensor,
        settings: Settings,
    ) -> None:
        self.teacher, self.student, self.selection = teacher, student, selection
        self.settings = settings
        self.ahead, self.behind = Walk(teacher), Walk(student)
        self.target, self.stream = self.ahead.stream(ids), self.behind.stream(ids)
        self.positions = {position: j for j, position in enumerate(selection.kept)}
        self.refits: list[Refit] = []
        self.same = selection.hidden is None  # whether the student's stream is the teacher's
        self.kept = None
        if selection.hidden is not None:
            self.kept = torch.tensor(selection.hidden, device=self.behind.device)
        self.sources = {
            (spec.layer, spec.layout.name): spec
            for spec in teacher.family.tensors(teacher.architecture)
        }

    def layers(self) -> Iterator[int]:
        """Take both through all layers, repairing; yields each position when it is done."""
        own = self.behind.layers()
        for i in self.ahead.layers():
            axes = self.selection.layers[i]
            if axes is not None:
                assert next(own) == self.positions[i]
            if axes is None:
                self.same = False
                self._advance_target(i)
            elif self.same and not axes:
                self._advance_target(i)
                self.stream = self.target.copy()
            else:
                self._repair_layer(i, self.positions[i], narrowed=bool(axes))
                self.same = False
            yield i
        assert next(own, None) is None

    def _repair_layer(self, i: int, j: int, *, narrowed: bool) -> None:
        norm, steps = self.behind.sublayer(j).norm, self.settings.steps if narrowed else 0
        ridge, dtype = self.settings.ridge, self.settings.dtype
        seen = None
        if not self.same and self.settings.reader_ridge:
            seen = self._seen(self.ahead.sublayer(i).norm, norm)
            self._refit_readers(seen, i, j, "reads", where=f"layer {j}")
        self._advance_target(i)
        aim = self._aim()
        if steps:
            gram = seen.gram if seen else self._gram(norm)
            problem = LayerProblem(self.behind, j, self.stream, aim, gram)
            improve_readers(problem, steps=steps, ridge=ridge, dtype=dtype)
        refit = refit_writer(self.behind, j, self.stream, aim, ridge, dtype)
        self.refits.append(refit)

    def _advance_target(self, i: int) -> None:
        self.target.advance(lambda hidden: self.ahead.layer(i, hidden))

    def finish(self) -> None:
        """Re-fit the head, where it is a matrix of its own, to the stream that has come out."""
        if self.same or not self.settings.reader_ridge:
            return
        for model in (self.teacher, self.student):
            if model.store is not None:
                model.store.need_head()
        seen = self._seen(self.teacher.part("norm"), self.student.part("norm"))
        self._refit_readers(seen, None, None, "head", where="the head")

    def _seen(self, theirs: nn.Module, ours: nn.Module) -> Moments:
        """Moments of the student's normalised stream, with the teacher's wanted of it."""
        full, own = self.teacher.architecture.hidden, self.student.architecture.hidden
        seen = Moments(own, full, self.behind.device)
        for aim, hidden in zip(self.target, self.stream, strict=True):
            seen.add(ours(hidden).flatten(0, 1), theirs(aim).flatten(0, 1))
        return seen

    def _gram(self, norm: nn.Module) -> torch.Tensor:
        """Second moments of the student's normalised stream, (D, D)."""
        seen = Moments(self.student.architecture.hidden, 0, self.behind.device)
        for hidden in self.stream:
            read = norm(hidden).flatten(0, 1)
            seen.add(read, read[:, :0])
        return seen.gram

    def _refit_readers(
        self, seen: Moments, i: int | None, j: int | None, role: str, *, where: str
    ) -> None:
        pairs = []
        for spec in matrices(self.student, j, role):
            source = self.sources[i, spec.layout.name]
            rows = tensor_index(source, self.teacher.architecture, self.selection)[0]
            theirs = take(self.teacher.parameter(source.name), (rows, None))
            pairs.append((self.student.parameter(spec.name), theirs))
        refit_readers(seen, pairs, self.settings.reader_ridge, self.settings.dtype, where=where)

    def _aim(self) -> Stream:
        """What the student's stream should be: the teacher's, or the part of it that is kept."""
        if self.kept is None:
            return self.target
        kept = [hidden[..., self.kept] for hidden in self.target]
        return Stream(kept, self.behind.device, waiting=self.target.waiting)
