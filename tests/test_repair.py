"""Repair: closed forms against plain least squares, and what they do to a stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from minipuzzle import model
from minipuzzle.checkpoint import Checkpoint
from minipuzzle.errors import UserError
from minipuzzle.prune import linearise, moments, refit, repair, surgeon
from minipuzzle.prune.slice import slice_checkpoint
from minipuzzle.selection import Selection
from minipuzzle.streaming import stream as open_streamed
from minipuzzle.walk import Walk
from tests.tiny import write_tiny

IDS = torch.randint(0, 97, (40, 32), generator=torch.Generator().manual_seed(3))
FRESH = torch.randint(0, 97, (10, 32), generator=torch.Generator().manual_seed(4))
NARROW, FEWER = {"width": tuple(range(24))}, {"heads": (0, 1, 4, 7)}
CUTS: dict[str, Selection] = {
    "width": Selection(tuple(NARROW if i in (1, 4, 6) else {} for i in range(7))),
    "layers": Selection((None, {}, {}, {}, None, {}, {})),
    "heads": Selection(tuple(FEWER if i in (0, 2, 5) else {} for i in range(7))),
    "hidden": Selection(tuple({} for _ in range(7)), hidden=tuple(range(28))),
}

# three blocks of attention and gated FFN: the first one goes
LLAMA_CUT = Selection((None, None, {}, NARROW, {}, NARROW))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> model.Model:
    return model.load(write_tiny(tmp_path_factory.mktemp("models") / "tiny"))


def cut(teacher: model.Model, selection: Selection, folder: Path) -> model.Model:
    slice_checkpoint(teacher.folder, folder, selection)
    return model.load(folder)


def distance(teacher: model.Model, student: model.Model) -> float:
    """Mean squared difference of the logits on text that nothing was fitted to."""
    stock: Any = teacher.module
    own: Any = student.module
    with torch.no_grad():
        return float((own(FRESH).logits - stock(FRESH).logits).square().mean())


@pytest.mark.parametrize("kind", CUTS)
def test_repair_brings_the_student_closer(teacher: model.Model, tmp_path: Path, kind: str) -> None:
    student = cut(teacher, CUTS[kind], tmp_path / "cut")
    before = distance(teacher, student)
    refits = repair.repair(teacher, student, CUTS[kind], IDS, dtype=torch.float32)
    assert distance(teacher, student) < 0.8 * before
    assert all(entry.after <= entry.before for entry in refits)


def test_repair_starts_where_the_cut_starts(teacher: model.Model, tmp_path: Path) -> None:
    student = cut(teacher, CUTS["width"], tmp_path / "cut")
    refits = repair.repair(teacher, student, CUTS["width"], IDS)
    assert [entry.layer for entry in refits] == [1, 2, 3, 4, 5, 6]
    name = "backbone.layers.0.mixer.out_proj.weight"
    assert torch.equal(student.parameter(name), teacher.parameter(name))


def test_solutions_are_rounded_to_what_is_stored(teacher: model.Model, tmp_path: Path) -> None:
    student = cut(teacher, CUTS["width"], tmp_path / "cut")
    repair.repair(teacher, student, CUTS["width"], IDS, dtype=torch.bfloat16)
    for name in ("backbone.layers.1.mixer.down_proj.weight", "lm_head.weight"):
        weight = student.parameter(name)
        assert torch.equal(weight, weight.bfloat16().float())
        assert not torch.equal(weight, teacher.parameter(name)[:, : weight.shape[1]])


def test_repair_of_a_whole_model_changes_nothing(teacher: model.Model) -> None:
    student = model.clone(teacher)
    whole = Selection.identity(teacher.architecture)
    assert repair.repair(teacher, student, whole, IDS) == []
    for ours, theirs in zip(student.module.parameters(), teacher.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_without_readers_only_writers_change(teacher: model.Model, tmp_path: Path) -> None:
    student = cut(teacher, CUTS["width"], tmp_path / "cut")
    old = model.clone(student)
    repair.repair(teacher, student, CUTS["width"], IDS, reader_ridge=0.0)
    changed = {
        spec.role
        for spec in student.family.tensors(student.architecture)
        if not torch.equal(student.parameter(spec.name), old.parameter(spec.name))
    }
    assert changed == {"writes"}


def test_a_tied_head_stays(tmp_path: Path) -> None:
    teacher = model.load(write_tiny(tmp_path / "tied", family="llama", tie_word_embeddings=True))
    student = cut(teacher, LLAMA_CUT, tmp_path / "cut")
    repair.repair(teacher, student, LLAMA_CUT, IDS)
    tied: Any = student.part("head")
    embedding: Any = teacher.part("embed")
    assert torch.equal(tied.weight, embedding.weight)


@pytest.mark.parametrize("kind", ["width", "layers"])
def test_streamed_models_are_repaired_and_written_layer_by_layer(
    teacher: model.Model, tmp_path: Path, kind: str
) -> None:
    student = cut(teacher, CUTS[kind], tmp_path / "cut")
    ahead = open_streamed(teacher.folder, dtype=torch.float32, device="cpu")
    behind = open_streamed(tmp_path / "cut", dtype=torch.float32, device="cpu")
    with model.LayerWriter(behind, tmp_path / "streamed", torch.bfloat16) as writer:
        repair.repair(ahead, behind, CUTS[kind], IDS, finished=writer.layer)
        writer.rest()
    repair.repair(teacher, student, CUTS[kind], IDS)
    model.save(student, tmp_path / "resident", dtype=torch.bfloat16)

    ours, theirs = (Checkpoint.open(tmp_path / name) for name in ("streamed", "resident"))
    assert sorted(ours.names) == sorted(theirs.names)
    assert all(torch.equal(ours.tensor(name), theirs.tensor(name)) for name in ours.names)
    assert all(p.is_meta for p in behind.layer(3).parameters())


def test_a_streamed_teacher_repairs_the_same(teacher: model.Model, tmp_path: Path) -> None:
    student = cut(teacher, CUTS["layers"], tmp_path / "cut")
    again = model.clone(student)
    repair.repair(teacher, student, CUTS["layers"], IDS)
    streamed = open_streamed(teacher.folder, dtype=torch.float32, device="cpu")
    repair.repair(streamed, again, CUTS["layers"], IDS)
    for ours, theirs in zip(again.module.parameters(), student.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_another_family_is_repaired_by_its_table(tmp_path: Path) -> None:
    teacher = model.load(write_tiny(tmp_path / "llama", family="llama"))
    student = cut(teacher, LLAMA_CUT, tmp_path / "cut")
    before = distance(teacher, student)
    repair.repair(teacher, student, LLAMA_CUT, IDS, steps=1, dtype=torch.float32)
    assert distance(teacher, student) < 0.8 * before


def test_activations_that_are_not_finite_are_refused(teacher: model.Model, tmp_path: Path) -> None:
    student = cut(teacher, CUTS["width"], tmp_path / "cut")
    student.parameter("backbone.layers.1.mixer.up_proj.weight")[0, 0] = torch.nan
    with pytest.raises(UserError, match="layer 1 reads are not finite"):
        repair.repair(teacher, student, CUTS["width"], IDS)


def test_the_refit_is_the_least_squares_solution() -> None:
    """Against torch.linalg.lstsq of the stacked ridge problem, in fp64."""
    generator = torch.Generator().manual_seed(5)
    read = torch.randn(50, 6, generator=generator)
    lacks = torch.randn(50, 3, generator=generator)
    sums = moments.Moments(6, 3)
    sums.add(read[:20], lacks[:20])
    sums.add(read[20:], lacks[20:])
    expected = _lstsq(read.double(), lacks.double(), 0.1)
    found = moments.ridge_solution(sums.gram, sums.cross, 0.1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def _lstsq(read: torch.Tensor, wanted: torch.Tensor, ridge: float) -> torch.Tensor:
    """Ridge regression as one stacked least-squares problem: (outputs, channels)."""
    damping = ridge * float((read.T @ read).diagonal().mean())
    channels, outputs = read.shape[1], wanted.shape[1]
    stacked = torch.cat([read, damping**0.5 * torch.eye(channels, dtype=read.dtype)])
    aims = torch.cat([wanted, torch.zeros(channels, outputs, dtype=read.dtype)])
    solution: torch.Tensor = torch.linalg.lstsq(stacked, aims).solution.T
    return solution


def test_readers_say_what_the_teachers_say() -> None:
    """Against least squares of what each reader lacks, for a stream of fewer channels, too."""
    generator = torch.Generator().manual_seed(6)
    theirs = torch.randn(80, 6, generator=generator)
    ours = theirs[:, :5] + 0.3 * torch.randn(80, 5, generator=generator)
    weights = [torch.randn(rows, 6, generator=generator) for rows in (4, 3)]
    sums = moments.Moments(5, 6)
    sums.add(ours, theirs)
    students = [weight[:, :5].clone() for weight in weights]
    expected = [
        w[:, :5] + _lstsq(ours.double(), (theirs @ w.T - ours @ w[:, :5].T).double(), 0.1)
        for w in weights
    ]
    pairs = list(zip(students, weights, strict=True))
    refit.refit_readers(sums, pairs, 0.1, torch.float32, where="a test")
    for found, wanted in zip(students, expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def _problem(teacher: model.Model, student: model.Model) -> linearise.LayerProblem:
    """The first narrowed layer of the width cut, teacher and student in lock-step."""
    ahead, behind = Walk(teacher), Walk(student)
    before = ahead.stream(IDS)
    before.advance(lambda hidden: ahead.layer(0, hidden))
    after = before.copy()
    after.advance(lambda hidden: ahead.layer(1, hidden))
    norm = behind.sublayer(1).norm
    read = torch.cat([norm(hidden).flatten(0, 1) for hidden in before]).double()
    return linearise.LayerProblem(behind, 1, before, after, read.T @ read)


@torch.no_grad()
def test_the_gradient_is_that_of_the_layer_s_error(teacher: model.Model, tmp_path: Path) -> None:
    """Against autograd of the written-out FFN, and its rows' sensitivity against the formula."""
    problem = _problem(teacher, cut(teacher, CUTS["width"], tmp_path / "cut"))
    error, falls, rows = problem.gradient()
    assert error == pytest.approx(problem.error(), rel=1e-5)
    block: Any = problem.walk.model.layer(1)
    up = problem.readers[0].detach().clone().requires_grad_(True)
    with torch.enable_grad():
        total = torch.zeros(())
        inner = []
        for hidden, aim in zip(problem.stream, problem.target, strict=True):
            pre = block.norm(hidden) @ up.T
            pre.retain_grad()
            inner.append(pre)
            output = hidden + pre.relu().square() @ problem.writer.T
            total = total + (aim - output).square().sum()
        torch.autograd.backward(total)
    assert up.grad is not None
    torch.testing.assert_close(falls[0], -0.5 * up.grad, rtol=1e-4, atol=1e-4)
    squares = torch.cat([0.5 * pre.grad.flatten(0, 1) for pre in inner if pre.grad is not None])
    spread = error / (IDS.numel() * 32)
    torch.testing.assert_close(
        rows[0], squares.double().square().mean(0) / spread, rtol=1e-4, atol=1e-6
    )
    assert all(weight.grad is None for weight in problem.readers)


@torch.no_grad()
def test_steps_on_the_linearisation_lower_the_error(teacher: model.Model, tmp_path: Path) -> None:
    problem = _problem(teacher, cut(teacher, CUTS["width"], tmp_path / "cut"))
    errors = linearise.improve_readers(problem, steps=4, ridge=1e-6, dtype=torch.float32)
    problem.refit_writer(1e-6)
    errors.append(problem.error())
    assert all(later < earlier for earlier, later in zip(errors, errors[1:], strict=False))
    assert errors[-1] < 0.9 * errors[0]


def test_steps_help_beyond_the_writer(teacher: model.Model, tmp_path: Path) -> None:
    student = cut(teacher, CUTS["width"], tmp_path / "cut")
    again = model.clone(student)
    repair.repair(teacher, student, CUTS["width"], IDS, dtype=torch.float32)
    repair.repair(teacher, again, CUTS["width"], IDS, steps=3, dtype=torch.float32)
    assert distance(teacher, again) < distance(teacher, student)


def test_the_surgeon_is_the_plain_greedy_choice() -> None:
    """Against trying every remaining unit and re-fitting the others by least squares, fp64."""
    read, weight = _layer(60, 8, 3)
    read[:, 5] = read[:, 1] + 0.3 * read[:, 2]
    left, expected = list(range(8)), torch.zeros(8, dtype=torch.float64)
    for place in range(8):
        worst = min(left, key=lambda j: _cost(read, weight, [k for k in left if k != j]))
        expected[worst] = place
        left.remove(worst)
    assert torch.equal(surgeon.surgeon_scores(read.T @ read, weight), expected)


def test_the_surgeon_in_blocks_chooses_as_well() -> None:
    """What the kept half cannot replace is about the same: 16 removals instead of 64."""
    read, weight = _layer(400, 64, 16)
    read = read @ torch.randn(64, 64, generator=torch.Generator().manual_seed(8)).double()
    exact = surgeon.surgeon_scores(read.T @ read, weight)
    blocks = surgeon.surgeon_scores(read.T @ read, weight, blocks=16)
    assert sorted(blocks.tolist()) == list(range(64))
    costs = [_cost(read, weight, places.argsort()[32:].tolist()) for places in (exact, blocks)]
    worst = _cost(read, weight, exact.argsort()[:32].tolist())
    assert costs[1] < 1.1 * costs[0] < worst


def _layer(tokens: int, units: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    read = torch.randn(tokens, units, generator=generator, dtype=torch.float64)
    return read, torch.randn(outputs, units, generator=generator, dtype=torch.float64)


def _cost(read: torch.Tensor, weight: torch.Tensor, kept: list[int]) -> float:
    """Least value of (W - W')H(W - W')^T over W' that uses only the kept columns."""
    sums = read.T @ read
    damped = sums + surgeon.DAMPING * sums.diagonal().mean() * torch.eye(len(sums)).double()
    if not kept:
        return float(torch.trace(weight @ damped @ weight.T))
    fitted = torch.linalg.solve(damped[kept][:, kept], damped[kept] @ weight.T)
    rest = weight.clone()
    rest[:, kept] -= fitted.T
    return float(torch.trace(rest @ damped @ rest.T))
