"""Training a student to say what its teacher says: one loop, stopped and resumed at will.

Everything a step does follows from the settings, the blocks and the step's number: which blocks it
reads, which rate it uses. So a run killed anywhere and started again on the same machine ends with
the same bits as one left alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minipuzzle import progress
from minipuzzle.errors import UserError

from .best import drop_beaten, keep_best, out_of_patience
from .config import Settings
from .faults import NotFinite, all_finite, is_out_of_memory, release_memory, require_finite
from .heldout import evaluate
from .history import HISTORY_FILE, Halving, History, Step
from .loss import forward_kl
from .resume import load_training, save_training
from .sharding import gathered, mesh_of, own_rows, summed
from .teacher import OnlineTeacher, Targets, Teacher, TeacherStates, final_hidden, head_weight


def train(
    student: nn.Module,
    teacher: nn.Module | Teacher | Targets,
    blocks: Tensor,
    settings: Settings,
    *,
    work: Path | None = None,
    held_out: Tensor | None = None,
    held_out_teacher: Teacher | None = None,
    on_step: Callable[[Step], None] | None = None,
    until: int | None = None,
) -> History:
    """Train every parameter of `student` in place on the teacher's distributions over `blocks`.

    Args:
        student: a causal language model with fp32 parameters (the master weights). It stays in
            eval mode: the models have no dropout, and train mode picks other kernels.
        teacher: a module, run on each batch, or a `Teacher` or `Targets` of exactly these blocks.
        blocks: (B, T) token ids; one pass after another in orders that depend on the seed only.
        settings: what to do; see `Settings`.
        work: where history and checkpoints go, and where an interrupted run is resumed from.
            None keeps everything in memory.
        held_out: (B', T') ids to evaluate on before the first and after the last step, and every
            `settings.evaluate_every` steps; the best state before the last stays in `work`
            (`restore_best`), the student ends with the last. Needs the teacher as a module, or
        held_out_teacher: the teacher of `held_out`.
        on_step: called after each step that is run (not for those of an earlier, killed run).
        until: stop after so many steps in all, with a checkpoint in `work` from which another call
            goes on; the rates are those of all `settings.steps`. None: go to the end.

    Returns:
        The history of all steps, those of an earlier run included.

    Raises:
        UserError: there are no blocks, the loss is no longer finite (`work` then holds the state
            before that step), one block at a time is too much for the memory, the disk is full,
            or no checkpoint in `work` is readable or it is of another training.
        ValueError: the student's parameters are not fp32 (or fp64), or `work` is given for a
            sharded student.
    """
    _check(student, blocks, settings)
    if work is not None and mesh_of(student) is not None:
        raise ValueError("checkpoints of a sharded training are not written; leave out work")
    student.eval().requires_grad_(True)
    targets = OnlineTeacher(teacher, blocks) if isinstance(teacher, nn.Module) else teacher
    judge = _judge(teacher, held_out, held_out_teacher)
    optimizer = make_optimizer(student, settings)
    identity = _identity(blocks, settings)
    earlier = load_training(work, student, optimizer) if work else None
    done, threads = _resumed(earlier, identity)
    history = History.resume(work / HISTORY_FILE if work else None, done)
    last = settings.steps if until is None else min(until, settings.steps)
    saved = done

    def save(step: int) -> None:
        nonlocal saved
        if work and step > saved:
            note = {"training": identity, "threads": threads, "done": step}
            save_training(work, student, optimizer, note)
            saved = step
            if judge:
                drop_beaten(work, history)

    def look(step: int) -> bool:
        """Evaluate; whether to go on."""
        assert judge
        found = evaluate(student, *judge, step=step)
        if not math.isfinite(found.kl):
            raise NotFinite(
                f"distillation: the held-out KL after {step} steps is {found.kl}, not finite; "
                f"lower distill.learning_rate"
            )
        history.add(found)
        if work and step < settings.steps:
            keep_best(work, student, history)
        return not out_of_patience(history, settings.patience)

    with _threads(threads):
        for step in range(done, last):
            if judge and (step == 0 or _due(step, settings.evaluate_every)) and not look(step):
                break
            try:
                entry = _fitting_step(student, targets, blocks, optimizer, settings, step, history)
            except NotFinite as error:
                if all_finite(student):
                    save(step)
                kept = f"; the state after {saved} steps is kept in {work}" if saved else ""
                raise NotFinite(f"{error}{kept}") from None
            history.add(entry)
            if step + 1 == until or _due(step + 1, settings.checkpoint_every):
                save(step + 1)
            if on_step:
                on_step(entry)
        else:
            if judge and last == settings.steps:
                look(last)
    student.requires_grad_(False)
    return history


def train_step(
    student: nn.Module,
    teacher: Teacher | Targets,
    blocks: Tensor,
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    step: int,
) -> Step:
    """One update of the student's parameters; `step` decides on blocks and rate."""
    rows = batch_rows(len(blocks), settings.batch, settings.seed, step)
    loss, guilty = 0.0, rows
    for part in torch.split(own_rows(student, rows), settings.micro or settings.batch):
        share = len(part) / len(rows)
        loss += accumulate(student, teacher, blocks, part, settings.temperature, share)
        if guilty is rows and not math.isfinite(loss):
            guilty = part
    loss = summed(student, loss)
    rate = settings.learning_rate_at(step)
    norm = clip_gradients(optimizer, settings.clip)
    require_finite("loss", loss, guilty, step)
    require_finite("gradient's norm", norm, rows, step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Step(step=step, loss=loss, learning_rate=rate, gradient_norm=norm)


def _fitting_step(
    student: nn.Module,
    teacher: Teacher | Targets,
    blocks: Tensor,
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    step: int,
    history: History,
) -> Step:
    """`train_step` with a micro-batch that fits: halved, said and noted when memory runs out.

    Nothing was updated by the failed attempt: all that a step allocates comes before the update.
    """
    while True:
        micro = history.micro_at(step) or settings.micro or settings.batch
        micro = min(micro, settings.batch)
        try:
            now = replace(settings, micro=micro)
            return train_step(student, teacher, blocks, optimizer, now, step)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Here, outside of `except`, the failed attempt's frames and their tensors are gone.
        optimizer.zero_grad(set_to_none=True)
        release_memory()
        # With one block at a time it is tried once more: memory was in pieces, or others' for long.
        if Halving(step, 1) in history.halvings:
            raise UserError(
                f"distillation: out of memory at step {step} with one sequence at a time; "
                f"shorten data.distillation.block or use a machine with more memory"
            )
        history.add(Halving(step, max(1, micro // 2)))
        progress.say(
            f"distill: out of memory at step {step}; {max(1, micro // 2)} instead of {micro} "
            f"sequences at a time, the batch stays {settings.batch}"
        )


def accumulate(
    student: nn.Module,
    teacher: Teacher | Targets,
    blocks: Tensor,
    rows: Tensor,
    temperature: float,
    share: float,
) -> float:
    """Add the gradient of `share` x the mean KL of blocks `rows`; returns that loss."""
    head = head_weight(student)
    teacher_hidden = None if isinstance(teacher, Targets) else teacher.hidden(rows)
    ids = blocks[rows].to(head.device)
    with torch.autocast(head.device.type, torch.bfloat16, enabled=head.device.type == "cuda"):
        hidden = final_hidden(student, ids)
    hidden = hidden.flatten(0, 1).to(head.dtype)
    if isinstance(teacher, Targets):
        loss = share * teacher.loss(rows, hidden, head)
    else:
        assert teacher_hidden is not None
        loss = share * forward_kl(
            hidden, head, teacher_hidden.flatten(0, 1), teacher.head, temperature=temperature
        )
    torch.autograd.backward(loss)
    return loss.item()


def batch_rows(count: int, batch: int, seed: int, step: int) -> Tensor:
    """(batch,) numbers of the blocks of a step: passes over all `count` blocks, each shuffled.

    A pure function of its arguments; the shuffle of a pass depends on seed and pass alone.
    """
    places = torch.arange(step * batch, (step + 1) * batch)
    passes = places // count
    orders = {
        number: torch.randperm(
            count, generator=torch.Generator().manual_seed(seed * 1_000_003 + number)
        )
        for number in set(passes.tolist())
    }
    pairs = zip(passes.tolist(), (places % count).tolist(), strict=True)
    return torch.stack([orders[number][place] for number, place in pairs])


def make_optimizer(student: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdamW over every parameter, tied ones once; fused: one pass over each tensor."""
    return torch.optim.AdamW(
        list(student.parameters()),
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def clip_gradients(optimizer: torch.optim.Optimizer, bound: float) -> float:
    """Scale all gradients so that their joint norm is at most `bound` (0: leave them); the norm."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = gathered(norm)
    if bound:
        torch.nn.utils.clip_grads_with_norm_(parameters, bound, norm)
    return norm.item()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _judge(
    teacher: nn.Module | Teacher | Targets, held_out: Tensor | None, judge: Teacher | None
) -> tuple[Teacher, Tensor] | None:
    if held_out is None:
        return None
    if judge is not None:
        return judge, held_out
    if not isinstance(teacher, nn.Module):
        raise ValueError("held_out needs the teacher as a module, or held_out_teacher")
    return TeacherStates(teacher, held_out), held_out


def _identity(blocks: Tensor, settings: Settings) -> dict[str, Any]:
    """What a checkpoint must agree with to be resumed from: all that the result depends on."""
    digest = hashlib.sha256(blocks.contiguous().cpu().numpy().tobytes()).hexdigest()
    values = {key: value for key, value in asdict(settings).items() if key != "checkpoint_every"}
    return {**values, "betas": list(settings.betas), "blocks": [*blocks.shape, digest]}


def _resumed(earlier: dict[str, Any] | None, identity: dict[str, Any]) -> tuple[int, int]:
    """(steps done, threads to go on with), given the note of a checkpoint or None."""
    if earlier is None:
        return 0, torch.get_num_threads()
    theirs = earlier["training"]
    differing = [key for key in identity if identity[key] != theirs.get(key)]
    if differing:
        raise UserError(
            f"the training checkpoint found is of another training (other {', '.join(differing)}); "
            f"remove it or train in another folder"
        )
    return int(earlier["done"]), int(earlier["threads"])


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Run with `count` threads: sums are split among them, so bits depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check(student: nn.Module, blocks: Tensor, settings: Settings) -> None:
    if settings.steps and len(blocks) == 0:
        raise UserError("distillation has no blocks to train on; see data.distillation")
    for name, parameter in student.named_parameters():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"parameter {name} is {parameter.dtype}; train in fp32")
