"""Cached teachers: losses against plain references, draws without bias, files that are refused."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minipuzzle.distill import cache, run
from minipuzzle.distill.cache import CachedTeacher, bytes_per_token, identity, write_cache
from minipuzzle.distill.config import Settings
from minipuzzle.distill.loss import forward_kl
from minipuzzle.distill.sparse import (
    reference_sampled_cross_entropy,
    reference_topk_kl,
    sampled_cross_entropy,
    topk_kl,
)
from minipuzzle.distill.teacher import OnlineTeacher
from minipuzzle.distill.trainer import train
from minipuzzle.errors import UserError
from tests.distill_models import blocks, tiny
from tests.tiny_text import tiny_run, write_model

Loss = Callable[..., Tensor]


class Made:
    """A teacher of given hidden states."""

    def __init__(self, states: Tensor, head: Tensor) -> None:
        self.states, self.head, self.asked = states, head, 0

    def hidden(self, rows: Tensor) -> Tensor:
        self.asked += len(rows)
        return self.states[rows]


def _made(count: int, length: int, vocabulary: int, sharpness: float = 2.0) -> tuple[Made, Tensor]:
    generator = torch.Generator().manual_seed(vocabulary)
    states = torch.randn(count, length, 4, generator=generator)
    head = sharpness * torch.randn(vocabulary, 4, generator=generator)
    return Made(states, head), torch.randint(0, vocabulary, (count, length), generator=generator)


def _student(tokens: int, vocabulary: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((tokens, 5), (vocabulary, 5))
    hidden, head = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return hidden.requires_grad_(), head.requires_grad_()


def _gradients(loss: Tensor, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    # A factor, so that a backward that ignores grad_output is found out.
    return loss, *torch.autograd.grad(1.7 * loss, inputs)


def _targets(tokens: int, vocabulary: int, stored: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct ids, shares of sum 1, and the teacher's probabilities of the ids."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64)
    ids = torch.rand(tokens, vocabulary, generator=generator).topk(stored).indices
    probabilities = logits.softmax(-1).gather(-1, ids)
    return ids, probabilities / probabilities.sum(-1, keepdim=True), probabilities


@given(
    tokens=st.integers(1, 19),
    vocabulary=st.integers(2, 31),
    share=st.floats(0, 1),
    chunk=st.integers(1, 20),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_losses_equal_their_references_in_value_and_gradients(
    tokens: int, vocabulary: int, share: float, chunk: int, seed: int
) -> None:
    inputs = _student(tokens, vocabulary, seed)
    stored = 1 + int(share * (vocabulary - 2))
    ids, weights, probabilities = _targets(tokens, vocabulary, stored, seed)
    pairs: list[tuple[Loss, Loss, Tensor]] = [
        (sampled_cross_entropy, reference_sampled_cross_entropy, weights),
        (topk_kl, reference_topk_kl, probabilities),
    ]
    for fast, plain, values in pairs:
        got = _gradients(fast(*inputs, ids, values, chunk=chunk), inputs)
        expected = _gradients(plain(*inputs, ids, values), inputs)
        for left, right in zip(got, expected, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_whole_vocabulary_in_the_top_is_full_kl(dtype: torch.dtype) -> None:
    hidden, head = (t.detach().to(dtype).requires_grad_() for t in _student(21, 40))
    teacher, teacher_head = (t.detach().to(dtype) for t in _student(21, 40, seed=1))
    best = (teacher @ teacher_head.T).softmax(-1).topk(40)
    got = _gradients(topk_kl(hidden, head, best.indices, best.values, chunk=4), (hidden, head))
    expected = _gradients(forward_kl(hidden, head, teacher, teacher_head), (hidden, head))
    for left, right in zip(got, expected, strict=True):
        torch.testing.assert_close(left, right)


def test_fewer_buckets_are_a_lower_bound() -> None:
    hidden, head = _student(21, 40)
    teacher, teacher_head = (t.detach() for t in _student(21, 40, seed=1))
    probabilities = (teacher @ teacher_head.T).softmax(-1)
    values = []
    for stored in (1, 4, 16, 39, 40):
        best = probabilities.topk(stored)
        values.append(topk_kl(hidden, head, best.indices, best.values).item())
    assert values == sorted(values) and values[0] < 0.9 * values[-1]
    assert values[-1] == pytest.approx(forward_kl(hidden, head, teacher, teacher_head).item())


def test_a_student_sure_of_the_stored_ids_has_a_finite_slope() -> None:
    """In fp32 1 - sum q is 0 here, while the mass outside is about 1e-11."""
    hidden = torch.eye(1).requires_grad_()
    head = torch.tensor([25.0, 0.0, -1.0, -2.0])[:, None].requires_grad_()
    ids, probabilities = torch.tensor([[0]]), torch.tensor([[0.75]])
    got = _gradients(topk_kl(hidden, head, ids, probabilities), (hidden, head))
    doubles = hidden.detach().double().requires_grad_(), head.detach().double().requires_grad_()
    expected = _gradients(reference_topk_kl(*doubles, ids, probabilities.double()), doubles)
    for left, right in zip(got, expected, strict=True):
        torch.testing.assert_close(left.double(), right, rtol=1e-4, atol=1e-6)


def test_bf16_is_summed_in_fp32() -> None:
    inputs = _student(64, 300)
    ids, weights, probabilities = _targets(64, 300, 8, 0)
    halves = tuple(t.detach().bfloat16().requires_grad_() for t in inputs)
    pairs: list[tuple[Loss, Loss, Tensor]] = [
        (sampled_cross_entropy, reference_sampled_cross_entropy, weights),
        (topk_kl, reference_topk_kl, probabilities),
    ]
    for fast, plain, values in pairs:
        got = _gradients(fast(*halves, ids, values, chunk=7), (halves[0], halves[1]))
        expected = _gradients(plain(*inputs, ids, values), inputs)
        assert [t.dtype for t in got] == [torch.float32, torch.bfloat16, torch.bfloat16]
        for left, right in zip(got, expected, strict=True):
            assert (left.double() - right).norm() < 3e-2 * right.norm()


@pytest.mark.parametrize(
    ("hidden", "ids", "chunk", "message"),
    [
        ((3, 4), (3, 2), 1, "does not fit head"),
        ((3, 5), (2, 2), 1, "must both be"),
        ((3, 5), (3, 2), 0, "chunk"),
        ((0, 5), (0, 2), 1, "no token counts"),
    ],
)
def test_refusals(hidden: tuple[int, int], ids: tuple[int, int], chunk: int, message: str) -> None:
    for loss in (sampled_cross_entropy, topk_kl):
        with pytest.raises(ValueError, match=message):
            loss(
                torch.zeros(hidden),
                torch.zeros(9, 5),
                torch.zeros(ids, dtype=torch.int64),
                torch.ones(ids),
                chunk=chunk,
            )


def _scores(kind: str, size: int, place: Path) -> Tensor:
    """(T x D,) z-scores of the mean gradient of many caches against that of full KL."""
    repeats, length, vocabulary = 600, 6, 40
    one, _ = _made(1, length, vocabulary)
    teacher = Made(one.states.expand(repeats, -1, -1), one.head)
    data = torch.zeros(repeats, length, dtype=torch.int64)
    made_of = identity(kind, size, "teacher", vocabulary, data)
    stored = CachedTeacher(write_cache(place, teacher, data, made_of), data, made_of)
    states, head = (t.detach() for t in _student(length, vocabulary))
    hidden = states.repeat(repeats, 1).requires_grad_()
    loss = stored.loss(torch.arange(repeats), hidden, head)
    (drawn,) = torch.autograd.grad(loss * repeats, hidden)
    drawn = drawn.reshape(repeats, -1)
    exact = states.clone().requires_grad_()
    kl = forward_kl(exact, head, one.states[0].double(), one.head.double())
    (full,) = torch.autograd.grad(kl, exact)
    if kind == "sampled":
        assert loss.item() == pytest.approx(kl.item(), rel=0.05)  # the value, without bias too
    # Top-k does not vary: measured by the spread that 50 draws would have had, about 0.01.
    spread = drawn.std(0).clamp(min=0.002) / math.sqrt(repeats)
    return (drawn.mean(0) - full.flatten()) / spread


def test_the_expected_gradient_of_sampled_ids_is_that_of_full_kl(tmp_path: Path) -> None:
    """30 z-scores of 600 draws each; by chance one of them passes 4.5 once in 5,000 times."""
    scores = _scores("sampled", 10, tmp_path / "sampled")
    assert scores.abs().max() < 4.5
    assert scores.square().mean() < 2.0  # chi-squared of 30: above 2 once in 1,000 times
    assert _scores("topk", 10, tmp_path / "topk").abs().max() > 9  # and the test can fail


@pytest.mark.parametrize(
    ("vocabulary", "draws", "width"),
    [(97, 1, 1), (97, 50, 2), (2**17, 50, 3), (2**18 + 1, 50, 4), (300, 300, 3)],
)
def test_draws_come_back_as_they_were_made(
    vocabulary: int, draws: int, width: int, tmp_path: Path
) -> None:
    teacher, data = _made(3, 7, vocabulary)
    made_of = identity("sampled", draws, "teacher", vocabulary, data, seed=4)
    stored = CachedTeacher(write_cache(tmp_path, teacher, data, made_of), data, made_of)
    ids, weights, own = stored.targets(torch.tensor([2, 0]))
    got = torch.zeros(14, vocabulary).scatter_add_(-1, ids, weights)
    expected, surprise = [], 0.0
    for row in (2, 0):
        log_probs = (teacher.states[row] @ teacher.head.T).log_softmax(-1)
        generator = torch.Generator().manual_seed(4 * 1_000_003 + row)
        drawn = log_probs.double().exp().multinomial(draws, True, generator=generator)
        surprise -= log_probs.gather(-1, drawn).mean().item() / 2
        expected.append(torch.zeros(7, vocabulary).scatter_add_(-1, drawn, torch.ones(drawn.shape)))
    torch.testing.assert_close(got * draws, torch.cat(expected))
    assert own == pytest.approx(surprise, rel=1e-5)
    pairs = sum(int((counts > 0).sum()) for counts in expected)
    assert ids.shape[1] == max(int((counts > 0).sum(-1).max()) for counts in expected)
    assert pairs * width < tmp_path.joinpath("teacher-00000.safetensors").stat().st_size


@pytest.mark.parametrize("vocabulary", [97, 2**16, 2**16 + 1])
def test_the_top_comes_back_as_it_was_made(vocabulary: int, tmp_path: Path) -> None:
    teacher, data = _made(3, 7, vocabulary)
    made_of = identity("topk", 9, "teacher", vocabulary, data)
    stored = CachedTeacher(write_cache(tmp_path, teacher, data, made_of), data, made_of)
    ids, probabilities, own = stored.targets(torch.tensor([2, 0]))
    best = (teacher.states[[2, 0]].flatten(0, 1) @ teacher.head.T).softmax(-1).topk(9)
    assert torch.equal(ids, best.indices) and own == 0
    torch.testing.assert_close(probabilities, best.values, rtol=1e-3, atol=1e-7)
    bare = 9 * ((2 if vocabulary <= 2**16 else 3) + 2)
    assert bare < bytes_per_token(tmp_path, data) < bare + 1000 / data.numel()


def test_a_cache_of_something_else_is_refused(tmp_path: Path) -> None:
    teacher, data = _made(4, 6, 97)
    given: dict[str, Any] = {
        "kind": "sampled",
        "size": 5,
        "teacher": "one",
        "vocabulary": 97,
        "blocks": data,
        "seed": 3,
    }
    folder = write_cache(tmp_path / "cache", teacher, data, identity(**given))
    other = {
        "kind": "topk",
        "size": 6,
        "teacher": "two",
        "vocabulary": 98,
        "blocks": data.flip(0),
        "seed": 4,
    }
    for name, value in other.items():
        made_of = identity(**given | {name: value})
        with pytest.raises(UserError, match=rf"something else \(other [a-z, ]*{name}"):
            CachedTeacher(folder, data, made_of)
        with pytest.raises(UserError, match=name):
            write_cache(folder, teacher, data, made_of)
    CachedTeacher(folder, data, identity(**given))


@pytest.mark.parametrize(("kind", "size"), [("both", 3), ("topk", 98), ("sampled", 0)])
def test_settings_out_of_range(kind: str, size: int) -> None:
    with pytest.raises(UserError, match="cache"):
        identity(kind, size, "teacher", 97, blocks())


@pytest.mark.parametrize("kind", ["sampled", "topk"])
def test_a_killed_writer_goes_on_with_the_next_shard(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "SHARD_TOKENS", 12)  # two blocks
    teacher, data = _made(5, 6, 97)
    made_of = identity(kind, 4, "teacher", 97, data)
    whole = write_cache(tmp_path / "whole", teacher, data, made_of)
    names = sorted(path.name for path in whole.iterdir())
    assert len(names) == 3 and teacher.asked == 5
    stopped = tmp_path / "stopped"

    class Killed(Exception):
        pass

    def dying(rows: Tensor) -> Tensor:
        if 2 in rows:
            raise Killed
        return teacher.states[rows]

    with monkeypatch.context() as patch:
        patch.setattr(teacher, "hidden", dying)
        with pytest.raises(Killed):
            write_cache(stopped, teacher, data, made_of)
    with pytest.raises(UserError, match="missing or damaged"):
        CachedTeacher(stopped, data, made_of)
    write_cache(stopped, teacher, data, made_of)
    assert teacher.asked == 5 + 3
    assert [(stopped / n).read_bytes() for n in names] == [(whole / n).read_bytes() for n in names]
    # A shard that a power cut shortened is noticed, and written again.
    (stopped / names[1]).write_bytes((whole / names[1]).read_bytes()[:-5])
    with pytest.raises(UserError, match=f"{names[1]} is missing or damaged"):
        CachedTeacher(stopped, data, made_of)
    write_cache(stopped, teacher, data, made_of)
    first, second = (CachedTeacher(f, data, made_of) for f in (whole, stopped))
    rows = torch.tensor([4, 1, 2])
    for left, right in zip(first.targets(rows), second.targets(rows), strict=True):
        assert torch.equal(torch.as_tensor(left), torch.as_tensor(right))


def test_training_from_a_cache_follows_training_online(tmp_path: Path) -> None:
    data, held_out, teacher = blocks(48), blocks(4, seed=3), tiny(1)
    plan = Settings(steps=12, batch=4, learning_rate=3e-3, evaluate_every=4)
    online = OnlineTeacher(teacher, data)
    curves = {}
    for kind, size in (("online", 0), ("sampled", 50), ("topk", 97)):
        student = tiny(2)
        source: Any = online
        if size:
            made_of = identity(kind, size, "teacher", 97, data)
            folder = write_cache(tmp_path / kind, online, data, made_of)
            source = CachedTeacher(folder, data, made_of)
        judge = OnlineTeacher(teacher, held_out)
        history = train(student, source, data, plan, held_out=held_out, held_out_teacher=judge)
        curves[kind] = torch.tensor(
            [[e.kl for e in history.evaluations], history.losses[::4] + history.losses[-1:]]
        )
    gained = curves["online"][0, 0] - curves["online"][0, -1]
    assert gained > 0.3 * curves["online"][0, 0]
    assert (curves["sampled"] - curves["online"]).abs().max() < 0.1 * gained
    assert (curves["topk"] - curves["online"]).abs().max() < 0.005 * gained  # fp16 probabilities


@pytest.mark.parametrize("kind", ["sampled", "topk"])
def test_the_stage_writes_the_cache_once(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distill = {"steps": 3, "batch": 2, "teacher": kind, "cache_draws": 20, "cache_top": 30}
    recipe, folder = tiny_run(tmp_path, distill=distill)

    def start(seed: int) -> None:
        def body(work: Path) -> None:
            write_model(work, seed=seed, hybrid_override_pattern="M-M*-")

        folder.run_stage("repair", "repaired", {"seed": seed}, body)

    start(2)
    student = run(recipe, folder)
    note = folder.stage("teacher-cache")
    assert note is not None
    assert (note["inputs"]["kind"], note["inputs"]["size"]) == (
        kind,
        20 if kind == "sampled" else 30,
    )
    first = (student / "history.jsonl").read_bytes()
    start(3)  # another student of the same blocks
    monkeypatch.setattr(cache, "_block", None)
    run(recipe, folder)
    assert (student / "history.jsonl").read_bytes() != first
    assert folder.stage("teacher-cache") == note


def test_a_cache_knows_one_temperature(tmp_path: Path) -> None:
    distill = {"steps": 1, "teacher": "topk", "temperature": 2.0}
    recipe, folder = tiny_run(tmp_path, distill=distill)

    def body(work: Path) -> None:
        write_model(work)

    folder.run_stage("repair", "repaired", {}, body)
    with pytest.raises(UserError, match=r"distill\.temperature"):
        run(recipe, folder)
