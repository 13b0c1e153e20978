"""What a layer computes inside, improved by least squares on its linearisation.

A writer alone cannot give back what removed channels computed. The readers of the stream can move
the channels that are left to where they help most: minimise

    f(W) = sum over tokens |t - layer(s; W)|^2

over the readers W, the writer being re-fitted in closed form after each step (variable projection:
Golub and Pereyra, 1973). Each step goes along a conjugate direction of the preconditioned gradient;
how far follows from f at one trial point, a parabola's minimum. The preconditioner is the layer's
own: second moments of what the readers see on one side, the sensitivity of each row on the other.
Everything is local to one layer: no gradient passes from layer to layer, and no loss is seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from minipuzzle.streams import Stream
from minipuzzle.walk import Walk

from .moments import Moments, damped_cholesky, ridge_solution
from .refit import capturing, energy, matrices, module_of, set_weight

TRIAL = 0.3  # first guess of a step's length, in units of the preconditioned gradient
LONGEST = 4.0  # a step is at most so many times its trial
DAMPING = 1e-3  # of what the readers see, of its mean power
ROW_DAMPING = 1e-2  # of the mean sensitivity of rows


class LayerProblem:
    """The readers of student layer j, and how far its output is from the teacher's."""

    def __init__(
        self, walk: Walk, j: int, stream: Stream, target: Stream, gram: torch.Tensor
    ) -> None:
        """`gram`: second moments of what the readers see, (D, D)."""
        self.walk, self.j, self.stream, self.target = walk, j, stream, target
        model = walk.model
        specs = matrices(model, j, "reads")
        self.readers = [model.parameter(spec.name) for spec in specs]
        self.modules = [module_of(model, spec) for spec in specs]
        (spec,) = matrices(model, j, "writes")
        self.writer, self.writer_module = model.parameter(spec.name), module_of(model, spec)
        self.factor = damped_cholesky(gram, DAMPING, where=f"layer {j}")
        self.elements = sum(t.numel() for t in target)

    def error(self) -> float:
        """f, summed over all tokens."""
        pairs = zip(self.stream, self.target, strict=True)
        return sum(energy(aim - self.walk.layer(self.j, hidden)) for hidden, aim in pairs)

    def gradient(self) -> tuple[float, list[torch.Tensor], list[torch.Tensor]]:
        """f, minus half its gradient per reader, and every row's sensitivity (rows,)."""
        rows = [torch.zeros(len(w), dtype=torch.float64, device=w.device) for w in self.readers]
        total = 0.0
        with _trainable(self.readers), _gradients_at_outputs(self.modules, rows):
            for hidden, aim in zip(self.stream, self.target, strict=True):
                with torch.enable_grad():
                    half = 0.5 * (aim - self.walk.layer(self.j, hidden)).square().sum()
                torch.autograd.backward(half)
                total += 2 * float(half.detach())
            falls = [-w.grad for w in self.readers if w.grad is not None]
        spread = max(total / self.elements, 1e-30)  # per element of the output
        tokens = self.elements / self.target_width()
        return total, falls, [row / (spread * tokens) for row in rows]

    def target_width(self) -> int:
        """D of the stream."""
        return int(next(iter(self.target)).shape[-1])

    def precondition(
        self, falls: list[torch.Tensor], rows: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """The gradient (rows, D), divided by rows' sensitivity and by the moments of x."""
        mean = torch.cat(rows).mean().clamp_min(1e-30)
        return [
            (torch.cholesky_solve(fall.to(self.factor).T, self.factor).T)
            .div((row + ROW_DAMPING * mean)[:, None])
            .to(fall.dtype)
            for fall, row in zip(falls, rows, strict=True)
        ]

    def move(self, directions: list[torch.Tensor], length: float) -> None:
        """Add a multiple of a direction to the readers."""
        for weight, direction in zip(self.readers, directions, strict=True):
            weight.add_(direction, alpha=length)

    def refit_writer(self, ridge: float) -> None:
        """The writer's closed form at the readers as they are; the stream stays where it is."""
        moments = Moments(self.writer.shape[1], self.writer.shape[0], self.walk.device)
        for hidden, aim in zip(self.stream, self.target, strict=True):
            with capturing(self.writer_module) as seen:
                output = self.walk.layer(self.j, hidden)
            moments.add(torch.cat(seen).flatten(0, 1), (aim - output).flatten(0, 1))
        where = f"the writer of layer {self.j}"
        self.writer.add_(ridge_solution(moments.gram, moments.cross, ridge, where=where))


def improve_readers(
    problem: LayerProblem, *, steps: int, ridge: float, dtype: torch.dtype
) -> list[float]:
    """Take `steps` steps, the writer re-fitted before each; returns f before each of them."""
    errors: list[float] = []
    direction: list[torch.Tensor] = []
    falls: list[torch.Tensor] = []
    product, trial = 0.0, TRIAL
    for _ in range(steps):
        problem.refit_writer(ridge)
        error, new_falls, rows = problem.gradient()
        errors.append(error)
        conditioned = problem.precondition(new_falls, rows)
        turn = 0.0
        if direction:  # Polak and Ribiere
            change = [new - old for new, old in zip(new_falls, falls, strict=True)]
            turn = max(0.0, _dot(conditioned, change) / product)
        falls, product = new_falls, _dot(conditioned, new_falls)
        direction = [
            c + turn * d if turn else c
            for c, d in zip(conditioned, direction or conditioned, strict=True)
        ]
        trial = _step(problem, direction, error, slope=-2 * _dot(direction, falls), trial=trial)
        if not trial:
            break
    for weight in problem.readers:
        set_weight(weight, weight.clone(), dtype)
    return errors


def _step(
    problem: LayerProblem,
    direction: list[torch.Tensor],
    error: float,
    *,
    slope: float,
    trial: float,
) -> float:
    """Go to the minimum of the parabola through f, its slope and f at the trial: its place."""
    if slope >= 0:
        return 0.0
    problem.move(direction, trial)
    bend = (problem.error() - error - slope * trial) / trial**2
    best = LONGEST * trial if bend <= 0 else min(-slope / (2 * bend), LONGEST * trial)
    problem.move(direction, best - trial)
    return best


def _dot(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(left, right, strict=True))


@contextmanager
def _trainable(weights: list[nn.Parameter]) -> Iterator[None]:
    """Gradients of these weights alone, dropped at the end of the block."""
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None


@contextmanager
def _gradients_at_outputs(modules: list[nn.Module], sums: list[torch.Tensor]) -> Iterator[None]:
    """Add up, per output channel, the squared gradients that arrive at the modules' outputs."""

    def listen(into: torch.Tensor) -> object:
        def on_gradient(gradient: torch.Tensor) -> None:
            into.add_(gradient.flatten(0, -2).double().square().sum(0))

        return lambda module, args, output: output.register_hook(on_gradient) and None

    handles = [
        module.register_forward_hook(listen(into))  # type: ignore[arg-type]
        for module, into in zip(modules, sums, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
