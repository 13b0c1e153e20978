"""Projections of one layer, re-fitted in closed form while teacher and student walk in lock-step.

Letters: D hidden width, N tokens of a chunk, U channels that the writer reads. x is what the
readers of the stream see (the norm's output), a what the writer reads, s and t the student's and
the teacher's stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from minipuzzle.families.table import TensorSpec
from minipuzzle.model import Model
from minipuzzle.streams import Stream
from minipuzzle.walk import Walk

from .moments import Moments, ridge_solution


@dataclass(frozen=True)
class Refit:
    """One repaired layer: relative squared distance to the teacher's stream before and after."""

    layer: int
    before: float
    after: float


def matrices(model: Model, j: int | None, role: str) -> list[TensorSpec]:
    """The matrices of layer j (None: outside the layers) that have a role, in the table's order."""
    specs = model.family.tensors(model.architecture)
    return [s for s in specs if s.layer == j and s.role == role and len(s.shape) == 2]


def module_of(model: Model, spec: TensorSpec) -> nn.Module:
    """The projection that holds a weight."""
    return model.module.get_submodule(model.family.memory_name(spec.name).removesuffix(".weight"))


def set_weight(weight: torch.Tensor, new: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Put a solution, rounded to `dtype`, in a weight's place; returns the change."""
    rounded = new.to(dtype).to(weight.dtype)
    change = rounded - weight
    weight.copy_(rounded)
    return change


def refit_readers(
    seen: Moments,
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    ridge: float,
    dtype: torch.dtype,
    *,
    where: str,
) -> None:
    """Re-fit projections that read the stream, so that they say what the teacher's say.

    min over W of  sum over tokens |W_t x_t - W x|^2  +  r |W - W_0|^2,  with x_t and x the
    teacher's and the student's normalised streams. W_t x_t is linear in x_t, so that the moments
    of x and x_t serve all readers of a layer.

    Args:
        seen: moments of x (D',) with x_t (D,) wanted.
        pairs: the student's weight (rows, D'), changed in place, and the same rows of the
            teacher's, (rows, D).
        ridge: r relative to the mean power of x.
        dtype: what the student will be stored in.
        where: names the place in an error.
    """
    for weight, teacher in pairs:
        old = weight.to(seen.gram.dtype)
        lacks = seen.cross @ teacher.to(seen.gram).T - seen.gram @ old.T
        set_weight(weight, old + ridge_solution(seen.gram, lacks, ridge, where=where), dtype)


def refit_writer(
    walk: Walk, j: int, stream: Stream, target: Stream, ridge: float, dtype: torch.dtype
) -> Refit:
    """Re-fit the writer of student layer j and take the stream through the layer.

    min over W of  sum over tokens |t - (s + W a)|^2  +  r |W - W_0|^2.

    Args:
        walk: of the student.
        j: the layer.
        stream: the student's before the layer; after it when this returns.
        target: the teacher's after the layer, in the same chunks.
        ridge: r relative to the mean power of a.
        dtype: what the student will be stored in.
    """
    (spec,) = matrices(walk.model, j, "writes")
    weight, writer = walk.model.parameter(spec.name), module_of(walk.model, spec)
    moments = Moments(weight.shape[1], weight.shape[0], walk.device)
    held, wanted = Stream([], walk.device, waiting=stream.waiting), iter(target)
    before = power = 0.0

    def through(hidden: torch.Tensor) -> torch.Tensor:
        nonlocal before, power
        with capturing(writer) as seen:
            output = walk.layer(j, hidden)
        read, aim = torch.cat(seen), next(wanted)
        lacks = aim - output
        moments.add(read.flatten(0, 1), lacks.flatten(0, 1))
        before += energy(lacks)
        power += energy(aim)
        held.extend(Stream([read], walk.device, waiting=stream.waiting))
        return output

    stream.advance(through)
    where = f"the writer of layer {j}"
    solution = ridge_solution(moments.gram, moments.cross, ridge, where=where)
    change = set_weight(weight, weight + solution, dtype)
    inputs = iter(held)
    stream.advance(lambda hidden: hidden + next(inputs) @ change.T)
    after = sum(energy(aim - hidden) for aim, hidden in zip(target, stream, strict=True))
    return Refit(layer=j, before=before / power, after=after / power)


def energy(values: torch.Tensor) -> float:
    """Sum of squares, in fp64."""
    return float(torch.linalg.vector_norm(values, dtype=torch.float64).square())


@contextmanager
def capturing(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect the inputs of a module while the block runs."""
    seen: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()
