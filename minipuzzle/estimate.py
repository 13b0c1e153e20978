"""Roughly what each stage needs, before hours are spent: disk, memory, time.

Counted from parameters and tokens (2 operations per parameter and token forward, 4 more backward:
Kaplan et al., arXiv 2001.08361, section 2.1) and the rate at which this machine multiplies
matrices. Everything else a model does (scan, norms, data) is one measured factor. Within a factor
of two or three, which is what decides between minutes and days. Memory is that of the device which
computes: the GPU where there is one, where models are held as they are stored.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from minipuzzle.progress import table
from minipuzzle.units import format_bytes, format_seconds, parse_budget

if TYPE_CHECKING:
    from minipuzzle.architecture import Architecture
    from minipuzzle.recipe import Recipe, SourceConfig

PROBE_SECONDS = 0.2
MATMUL_SHARE = 0.4  # of a model's time on a CPU; measured on the bundled teacher
DISK_BYTES_PER_SECOND = 200e6
LOGIT_TOKENS = 1024  # whose logits exist at a time, in losses and in judging candidates
STORED_BYTES = 2  # per parameter in a checkpoint, and on a GPU (bf16)
COMPUTE_BYTES = 4  # per parameter on a CPU, and of what is computed (fp32)
TRAINED_BYTES = 16  # per trained parameter: weight, gradient and two moments in fp32
CHECKPOINT_BYTES = 12  # of it in a resume point: all but the gradient
STREAMED_SHARE = 0.85  # of free memory that resident weights may take (minipuzzle/residency.py)
STATES_BYTES = 8 * 2**30  # of variants or candidates on the same text, if there is as much
# fp32 matrices of a layer's channels: their moments, and what is solved with (fp64 in one case)
SURGEON_MATRICES, REPAIR_MATRICES = 7, 4
STREAMED_LAYERS = 3  # on the device at once: one at work, one coming, one going
QUESTIONS_PER_TASK = 1000  # where the recipe sets no limit
TOKENS_PER_QUESTION = 128
REPORT_BYTES = 4 * 2**20
PRUNE_BYTES = 256 * 2**20  # row blocks on their way; an 8B-shaped model took 211 MiB
LIBRARY_BYTES = 0.4 * 2**30  # of a process that has imported torch and transformers; measured


@dataclass(frozen=True)
class Need:
    """What one stage needs: bytes on disk, bytes of memory at its peak, seconds."""

    stage: str
    disk_bytes: float
    memory_bytes: float
    seconds: float


@dataclass(frozen=True)
class Machine:
    """What computes.

    ``rate``: operations per second of a whole model, not of a matrix product alone; ``free``: bytes
    free for us, None where that is not known. A GPU holds models as they are stored, and in
    training a copy of the weights in bf16.
    """

    rate: float
    free: int | None = None
    gpu: bool = False

    @property
    def weight(self) -> int:
        """Bytes of a parameter that is only read."""
        return STORED_BYTES if self.gpu else COMPUTE_BYTES


@dataclass(frozen=True)
class Work:
    """The sizes everything is estimated from.

    ``student`` is the expected number of parameters after the cut; ``streamed`` those of a model
    that are on the device at once when it is streamed.
    """

    recipe: Recipe
    architecture: Architecture
    teacher: int
    student: float
    streamed: int
    machine: Machine

    def forward_seconds(self, parameters: float, tokens: float) -> float:
        """One pass over ``tokens``."""
        return 2 * parameters * tokens / self.machine.rate

    def training_seconds(self, tokens: float) -> float:
        """Teacher forward, student forward and backward over ``tokens``."""
        student = 3 * self.forward_seconds(self.student, tokens)
        return self.forward_seconds(self.teacher, tokens) + student

    def activation_bytes(self, tokens: float) -> float:
        """Hidden states of ``tokens``, and in fp32 the logits of as many as exist at a time."""
        logits = min(tokens, LOGIT_TOKENS) * self.architecture.vocabulary * COMPUTE_BYTES
        return tokens * self.architecture.hidden * self.machine.weight + logits

    def streams(self, *models: float) -> bool:
        """Whether models of so many parameters, side by side, are streamed."""
        residency, free = self.recipe.score.residency, self.machine.free
        needed = sum(models) * self.machine.weight
        fits = free is None or needed <= STREAMED_SHARE * free
        return residency == "streamed" or (residency == "auto" and not fits)

    def weights_bytes(self, *models: float) -> float:
        """Their weights on the device."""
        parameters = len(models) * self.streamed if self.streams(*models) else sum(models)
        return parameters * self.machine.weight

    def matrices_bytes(self, number: int) -> float:
        """So many fp32 matrices of the widest layer's channels."""
        widest = max((getattr(layer, "width", 0) for layer in self.architecture.layers), default=0)
        return float(number * widest**2 * COMPUTE_BYTES)


def estimate(recipe: Recipe, machine: Machine | None = None) -> list[Need]:
    """The needs of all stages in order, on this machine unless another is given.

    UserError when the model cannot be read.
    """
    return _needs(recipe, machine or this_machine())


def disk_bytes(recipe: Recipe, stages: Collection[str]) -> int:
    """What the named stages will write together. Needs no torch. UserError like `estimate`."""
    needs = _needs(recipe, Machine(rate=1.0))
    return int(sum(need.disk_bytes for need in needs if need.stage in stages))


def render(needs: list[Need], done: Collection[str], free: int | None = None) -> str:
    """The table of ``needs``; the stages in ``done`` are marked and not added up.

    ``free``: bytes of memory; stages that need more are marked.
    """
    over = {need.stage for need in needs if free is not None and need.memory_bytes > free}
    rows = [
        [
            need.stage,
            format_bytes(need.disk_bytes),
            format_bytes(need.memory_bytes),
            format_seconds(need.seconds),
            "done" if need.stage in done else "too large" if need.stage in over else "",
        ]
        for need in needs
    ]
    open_needs = [need for need in needs if need.stage not in done]
    disk = sum(need.disk_bytes for need in open_needs)
    peak = max((need.memory_bytes for need in open_needs), default=0.0)
    seconds = sum(need.seconds for need in open_needs)
    rows.append(["to do", format_bytes(disk), format_bytes(peak), format_seconds(seconds), ""])
    text = (
        "\n\nRough, from parameter counts, tokens and a short measurement of this machine;"
        "\nexpect times within a factor of three. Nothing was written."
    )
    if over - set(done):
        text += f"\nToo large: {format_bytes(free or 0)} are free where it would be computed."
    return table(["stage", "disk", "memory", "time", ""], rows) + text


def this_machine() -> Machine:
    """What the stages would compute on here, measured."""
    import torch

    from minipuzzle.residency import free_bytes

    rate = MATMUL_SHARE * matmul_rate()
    if torch.cuda.is_available():
        return Machine(rate, free_bytes(torch.device("cuda")), gpu=True)
    return Machine(rate, free_bytes(torch.device("cpu")))


def matmul_rate(seconds: float = PROBE_SECONDS) -> float:
    """Operations per second of matrix products on the device the stages use.

    In bf16 on a GPU and in fp32 on a CPU, as models are computed there. On a CPU the fastest
    product of one core, times the cores: threads that wait for each other because something else
    runs right now would say little about the hours to come.
    """
    import torch

    if torch.cuda.is_available():
        return _fastest_product("cuda", 8192, seconds)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return threads * _fastest_product("cpu", 384, seconds)
    finally:
        torch.set_num_threads(threads)


def _fastest_product(device: str, size: int, seconds: float) -> float:
    import torch

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    _ = (matrix @ matrix)[0, 0].item()  # the first call sets up
    fastest, start = float("inf"), time.perf_counter()
    while (now := time.perf_counter()) - start < seconds:
        _ = (matrix @ matrix)[0, 0].item()
        fastest = min(fastest, time.perf_counter() - now)
    return 2 * size**3 / fastest


def _needs(recipe: Recipe, machine: Machine) -> list[Need]:
    work = _work(recipe, machine)
    stages = (_score, _search, _prune, _repair, _distill, _eval, _export, _report)
    needs = [stage(work) for stage in stages]
    return [replace(need, memory_bytes=need.memory_bytes + LIBRARY_BYTES) for need in needs]


def _work(recipe: Recipe, machine: Machine) -> Work:
    from minipuzzle.families import parameter_count
    from minipuzzle.memory import memory
    from minipuzzle.source import resolve_config

    family, architecture = resolve_config(recipe.model, recipe.revision)
    teacher = parameter_count(architecture, family)
    total = memory(architecture, family, recipe.deployment.build()).total
    share = min(1.0, parse_budget(recipe.budget).of(total) / total)
    sizes: Counter[int | None] = Counter()
    for spec in family.tensors(architecture):
        sizes[spec.layer] += spec.size
    head = architecture.vocabulary * architecture.hidden
    streamed = head + STREAMED_LAYERS * max(n for i, n in sizes.items() if i is not None)
    return Work(recipe, architecture, teacher, share * teacher, streamed, machine)


def _tokens(source: SourceConfig, blocks: int) -> int:
    return source.block * blocks


def _score(work: Work) -> Need:
    """All layers in one sweep cost half a forward pass per layer (docs/design.md, walk).

    Iterative removal sweeps again for every layer it takes; until a budget is met, for about as
    many as that share of the layers.
    """
    settings, layers = work.recipe.score, len(work.architecture.layers)
    tokens = _tokens(work.recipe.data.calibration, settings.blocks)
    of_units = _tokens(work.recipe.data.calibration, max(settings.blocks, settings.unit_blocks))
    share = 1 - work.student / work.teacher
    again = round(share * layers) if settings.iterative == "budget" else settings.iterative
    passes = (1 + again) * layers / 2
    seconds = work.forward_seconds(work.teacher, passes * tokens + of_units)
    block = work.recipe.data.calibration.block * work.architecture.hidden * work.machine.weight
    one, weights = (layers + 1) * block, work.weights_bytes(work.teacher)
    room = STATES_BYTES if work.machine.free is None else (work.machine.free - weights) / 3
    states = max(one, min(settings.blocks * one, STATES_BYTES, room))  # a sequence at least
    if work.streams(work.teacher) and work.machine.gpu:
        states = 2 * block  # the others wait in the memory of the host
    moments = work.matrices_bytes(SURGEON_MATRICES if "surgeon" in settings.unit_metrics else 0)
    memory = weights + states + moments
    return Need("score", 2**20, memory, seconds)


def _search(work: Work) -> Need:
    """Each candidate is at most a forward pass over the search text; then the tournament.

    Candidates share layers, and most are given up after a part of the text: what that saves is not
    known before. A tournament of one is not held.
    """
    settings = work.recipe.search
    tokens = _tokens(work.recipe.data.search, settings.blocks)
    seconds = work.forward_seconds(work.teacher + settings.trials * work.student, tokens)
    states = min(settings.batch * work.activation_bytes(tokens), STATES_BYTES)
    memory = work.teacher * work.machine.weight + states + _quick_repair_bytes(work)
    if settings.tournament.finalists == 1:
        return Need("search", 2**20, memory, seconds)
    players = settings.tournament.finalists
    disk = work.student * ((players + 1) * CHECKPOINT_BYTES + players * STORED_BYTES)
    return Need(
        "search",
        2**20 + disk,
        max(memory, _training_memory(work)),
        seconds + _tournament_seconds(work),
    )


def _quick_repair_bytes(work: Work) -> float:
    """The teacher's streams before all layers, and two caches, where candidates are repaired."""
    search = work.recipe.search
    if search.proxy == "cut":
        return 0.0
    tokens = _tokens(work.recipe.data.calibration, search.proxy_blocks)
    streams = len(work.architecture.layers) + 1
    return streams * tokens * work.architecture.hidden * work.machine.weight + 2 * 2**30


def _tournament_seconds(work: Work) -> float:
    """Repair of all finalists, the steps of every rung, questions to those who are left."""
    rules, data, batch = work.recipe.search.tournament, work.recipe.data, work.recipe.distill.batch
    both = work.teacher + work.student
    mended = _tokens(data.calibration, rules.blocks)
    seconds = rules.finalists * 2 * work.forward_seconds(both, mended)
    players, before = rules.finalists, 0
    for rung in rules.rungs:
        trained = players * max(0, rung.steps - before)
        seconds += work.training_seconds(trained * _tokens(data.distillation, batch))
        last, players, before = players, min(players, rung.keep), rung.steps
    questions = len(rules.tasks) * (rules.limit or QUESTIONS_PER_TASK)
    return seconds + last * work.forward_seconds(work.student, questions * TOKENS_PER_QUESTION)


def _prune(work: Work) -> Need:
    """Read once, write once."""
    seconds = (work.teacher + work.student) * STORED_BYTES / DISK_BYTES_PER_SECOND
    return Need("prune", work.student * STORED_BYTES, PRUNE_BYTES, seconds)


def _repair(work: Work) -> Need:
    """Teacher and student streams side by side, and as much again for the normal equations."""
    tokens = _tokens(work.recipe.data.calibration, work.recipe.repair.blocks)
    seconds = 2 * work.forward_seconds(work.teacher + work.student, tokens)
    states = 2 * tokens * work.architecture.hidden * work.machine.weight
    if work.streams(work.teacher, work.student) and work.machine.gpu:
        states = 0
    memory = (
        work.weights_bytes(work.teacher, work.student)
        + states
        + work.matrices_bytes(REPAIR_MATRICES)
    )
    return Need("repair", work.student * STORED_BYTES, memory, seconds)


def _distill(work: Work) -> Need:
    """The student's checkpoint, and two resume points: one is whole before the other goes."""
    settings = work.recipe.distill
    tokens = settings.steps * _tokens(work.recipe.data.distillation, settings.batch)
    disk = work.student * (STORED_BYTES + 2 * CHECKPOINT_BYTES)
    return Need("distill", disk, _training_memory(work), work.training_seconds(tokens))


def _eval(work: Work) -> Need:
    """Four models: report text, questions, decoded tokens; together where half the memory does."""
    settings = work.recipe.eval
    questions = len(settings.tasks) * (settings.limit or QUESTIONS_PER_TASK)
    tokens = _tokens(work.recipe.data.report, settings.blocks) + questions * TOKENS_PER_QUESTION
    models = work.teacher + 3 * work.student
    block = work.recipe.data.report.block
    states = 3 * block * work.architecture.vocabulary * COMPUTE_BYTES  # logits and their losses
    together = models * work.machine.weight
    alone = work.machine.free is not None and together > work.machine.free / 2
    memory = (work.teacher * work.machine.weight if alone else together) + states
    return Need("eval", 2**20, memory, work.forward_seconds(models, tokens))


def _export(work: Work) -> Need:
    """A copy of the student."""
    stored = work.student * STORED_BYTES
    return Need("export", stored, work.student * COMPUTE_BYTES, 2 * stored / DISK_BYTES_PER_SECOND)


def _report(work: Work) -> Need:
    """Text and pictures; what takes time is importing what draws them."""
    return Need("report", REPORT_BYTES, 2**28, 2.0)


def _training_memory(work: Work) -> float:
    """The teacher, the student with gradients and moments, and what the backward pass needs."""
    settings, layers = work.recipe.distill, len(work.architecture.layers)
    tokens = _tokens(work.recipe.data.distillation, settings.micro or settings.batch)
    kept = tokens * work.architecture.hidden * layers * 10 * COMPUTE_BYTES
    trained = work.student * (TRAINED_BYTES + work.machine.gpu * STORED_BYTES)
    return work.teacher * work.machine.weight + trained + kept + work.activation_bytes(tokens)
