"""Roughly what each stage needs, before hours are spent: disk, memory, time.

Counted from parameters and tokens (2 operations per parameter and token forward, 4 more backward:
Kaplan et al., arXiv 2001.08361, section 2.1) and the rate at which this machine multiplies
matrices. Everything else a model does (scan, norms, data) is one measured factor. Within a factor
of two or three, which is what decides between minutes and days.
"""

from __future__ import annotations

import time
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
STORED_BYTES = 2  # per parameter in a checkpoint (bf16)
COMPUTE_BYTES = 4  # per parameter in memory (fp32)
TRAINED_BYTES = 16  # per trained parameter: weight, gradient and two moments in fp32
QUESTIONS_PER_TASK = 1000  # where the recipe sets no limit
TOKENS_PER_QUESTION = 128
REPORT_BYTES = 4 * 2**20
LIBRARY_BYTES = 0.4 * 2**30  # of a process that has imported torch and transformers; measured


@dataclass(frozen=True)
class Need:
    """What one stage needs: bytes on disk, bytes of memory at its peak, seconds."""

    stage: str
    disk_bytes: float
    memory_bytes: float
    seconds: float


@dataclass(frozen=True)
class Work:
    """The sizes everything is estimated from.

    ``student`` is the expected number of parameters after the cut; ``rate`` is the operations per
    second of a whole model, not of a matrix product alone.
    """

    recipe: Recipe
    architecture: Architecture
    teacher: int
    student: float
    rate: float

    def forward_seconds(self, parameters: float, tokens: float) -> float:
        """One pass over ``tokens``."""
        return 2 * parameters * tokens / self.rate

    def training_seconds(self, tokens: float) -> float:
        """Teacher forward, student forward and backward over ``tokens``."""
        student = 3 * self.forward_seconds(self.student, tokens)
        return self.forward_seconds(self.teacher, tokens) + student

    def activation_bytes(self, tokens: float) -> float:
        """Hidden state and logits of ``tokens`` in fp32."""
        return tokens * (self.architecture.hidden + self.architecture.vocabulary) * COMPUTE_BYTES


def estimate(recipe: Recipe) -> list[Need]:
    """The needs of all stages in order. UserError when the model cannot be read."""
    return _needs(recipe, MATMUL_SHARE * matmul_rate())


def disk_bytes(recipe: Recipe, stages: Collection[str]) -> int:
    """What the named stages will write together. Needs no torch. UserError like `estimate`."""
    needs = _needs(recipe, rate=1.0)
    return int(sum(need.disk_bytes for need in needs if need.stage in stages))


def render(needs: list[Need], done: Collection[str]) -> str:
    """The table of ``needs``; the stages in ``done`` are marked and not added up."""
    rows = [
        [
            need.stage,
            format_bytes(need.disk_bytes),
            format_bytes(need.memory_bytes),
            format_seconds(need.seconds),
            "done" if need.stage in done else "",
        ]
        for need in needs
    ]
    open_needs = [need for need in needs if need.stage not in done]
    disk = sum(need.disk_bytes for need in open_needs)
    peak = max((need.memory_bytes for need in open_needs), default=0.0)
    seconds = sum(need.seconds for need in open_needs)
    rows.append(["to do", format_bytes(disk), format_bytes(peak), format_seconds(seconds), ""])
    return table(["stage", "disk", "memory", "time", ""], rows) + (
        "\n\nRough, from parameter counts, tokens and a short measurement of this machine;"
        "\nexpect times within a factor of three. Nothing was written."
    )


def matmul_rate(seconds: float = PROBE_SECONDS) -> float:
    """Operations per second of fp32 matrix products on the device the stages use.

    On a CPU the fastest product of one core, times the cores: threads that wait for each other
    because something else runs right now would say little about the hours to come.
    """
    import torch

    if torch.cuda.is_available():
        return _fastest_product("cuda", 4096, seconds)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return threads * _fastest_product("cpu", 384, seconds)
    finally:
        torch.set_num_threads(threads)


def _fastest_product(device: str, size: int, seconds: float) -> float:
    import torch

    matrix = torch.ones(size, size, device=device)
    _ = (matrix @ matrix)[0, 0].item()  # the first call sets up
    fastest, start = float("inf"), time.perf_counter()
    while (now := time.perf_counter()) - start < seconds:
        _ = (matrix @ matrix)[0, 0].item()
        fastest = min(fastest, time.perf_counter() - now)
    return 2 * size**3 / fastest


def _needs(recipe: Recipe, rate: float) -> list[Need]:
    work = _work(recipe, rate)
    stages = (_score, _search, _prune, _repair, _distill, _eval, _export, _report)
    needs = [stage(work) for stage in stages]
    return [replace(need, memory_bytes=need.memory_bytes + LIBRARY_BYTES) for need in needs]


def _work(recipe: Recipe, rate: float) -> Work:
    from minipuzzle.families import parameter_count
    from minipuzzle.memory import memory
    from minipuzzle.source import resolve_config

    family, architecture = resolve_config(recipe.model, recipe.revision)
    teacher = parameter_count(architecture, family)
    total = memory(architecture, family, recipe.deployment.build()).total
    share = min(1.0, parse_budget(recipe.budget).of(total) / total)
    return Work(recipe, architecture, teacher, share * teacher, rate)


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
    states = ((layers + 1) * tokens + of_units) * work.architecture.hidden * COMPUTE_BYTES
    return Need("score", 2**20, work.teacher * COMPUTE_BYTES + states, seconds)


def _search(work: Work) -> Need:
    """Each candidate is a forward pass over the search text; finalists also train."""
    settings, data = work.recipe.search, work.recipe.data
    tokens = _tokens(data.search, settings.blocks)
    steps = settings.finalists * settings.finalist_steps
    trained = steps * _tokens(data.distillation, work.recipe.distill.batch)
    seconds = settings.trials * work.forward_seconds(work.student, tokens)
    training = work.training_seconds(trained)
    return Need("search", 2**20, _training_memory(work), seconds + training)


def _prune(work: Work) -> Need:
    """Read once, write once."""
    seconds = (work.teacher + work.student) * STORED_BYTES / DISK_BYTES_PER_SECOND
    memory = (work.teacher + work.student) * COMPUTE_BYTES
    return Need("prune", work.student * STORED_BYTES, memory, seconds)


def _repair(work: Work) -> Need:
    """Teacher and student streams side by side, and as much again for the normal equations."""
    tokens = _tokens(work.recipe.data.calibration, work.recipe.repair.blocks)
    seconds = 2 * work.forward_seconds(work.teacher + work.student, tokens)
    states = 2 * tokens * work.architecture.hidden * COMPUTE_BYTES
    memory = (work.teacher + work.student) * COMPUTE_BYTES + states
    return Need("repair", work.student * STORED_BYTES, memory, seconds)


def _distill(work: Work) -> Need:
    """The student's checkpoint, and the resume point with its optimiser."""
    settings = work.recipe.distill
    tokens = settings.steps * _tokens(work.recipe.data.distillation, settings.batch)
    disk = work.student * (STORED_BYTES + TRAINED_BYTES)
    return Need("distill", disk, _training_memory(work), work.training_seconds(tokens))


def _eval(work: Work) -> Need:
    """Four models: report text, questions, decoded tokens (one pass over the weights each)."""
    settings = work.recipe.eval
    questions = len(settings.tasks) * (settings.limit or QUESTIONS_PER_TASK)
    tokens = _tokens(work.recipe.data.report, settings.blocks) + questions * TOKENS_PER_QUESTION
    models = work.teacher + 3 * work.student
    memory = models * COMPUTE_BYTES + work.activation_bytes(8 * work.recipe.data.report.block)
    return Need("eval", 2**20, memory, work.forward_seconds(models, tokens))


def _export(work: Work) -> Need:
    """A copy of the student."""
    stored = work.student * STORED_BYTES
    return Need("export", stored, work.student * COMPUTE_BYTES, 2 * stored / DISK_BYTES_PER_SECOND)


def _report(work: Work) -> Need:
    """Text and pictures; what takes time is importing what draws them."""
    return Need("report", REPORT_BYTES, 2**28, 2.0)


def _training_memory(work: Work) -> float:
    batch = _tokens(work.recipe.data.distillation, work.recipe.distill.batch)
    layers = len(work.architecture.layers)
    kept = batch * work.architecture.hidden * layers * 10 * COMPUTE_BYTES  # for the backward pass
    weights = work.teacher * COMPUTE_BYTES + work.student * TRAINED_BYTES
    return weights + kept + work.activation_bytes(batch)
