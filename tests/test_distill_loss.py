"""The chunked loss against its plain reference: values, gradients, masks, refusals."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minipuzzle.distill.loss import forward_kl, reference_forward_kl


def _inputs(
    tokens: int,
    vocabulary: int,
    hidden: int,
    teacher_hidden: int,
    dtype: torch.dtype,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    student = normal(tokens, hidden).requires_grad_(), normal(vocabulary, hidden).requires_grad_()
    return *student, normal(tokens, teacher_hidden), normal(vocabulary, teacher_hidden)


def _gradients(function: Any, inputs: tuple[Tensor, ...], **options: Any) -> tuple[Tensor, ...]:
    loss = function(*inputs, **options)
    # A factor, so that a backward that ignores grad_output is found out.
    return loss, *torch.autograd.grad(1.7 * loss, inputs[:2])


@given(
    tokens=st.integers(1, 23),
    vocabulary=st.integers(2, 41),
    hidden=st.integers(1, 9),
    teacher_hidden=st.integers(1, 9),
    chunk=st.integers(1, 25),
    temperature=st.sampled_from([1.0, 0.7, 3.0]),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_equals_the_reference_in_value_and_gradients(
    tokens: int,
    vocabulary: int,
    hidden: int,
    teacher_hidden: int,
    chunk: int,
    temperature: float,
    masked: bool,
    seed: int,
) -> None:
    inputs = _inputs(tokens, vocabulary, hidden, teacher_hidden, torch.float64, seed)
    mask = None
    if masked:
        mask = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) < 0.5
        mask[seed % tokens] = True
    options: dict[str, Any] = {"temperature": temperature, "mask": mask}
    expected = _gradients(reference_forward_kl, inputs, **options)
    got = _gradients(forward_kl, inputs, chunk=chunk, **options)
    for name, left, right in zip(("loss", "hidden", "head"), got, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize(("tokens", "vocabulary", "chunk"), [(1027, 515, 512), (64, 4096, 64)])
def test_fp32_at_real_sizes(tokens: int, vocabulary: int, chunk: int) -> None:
    inputs = _inputs(tokens, vocabulary, 48, 64, torch.float32)
    doubles = tuple(t.detach().double().requires_grad_() for t in inputs)
    expected = _gradients(reference_forward_kl, doubles)
    got = _gradients(forward_kl, inputs, chunk=chunk)
    for left, right in zip(got, expected, strict=True):
        assert left.dtype == torch.float32
        assert (left.double() - right).norm() < 1e-5 * right.norm()


def test_gradcheck() -> None:
    student, head, teacher, teacher_head = _inputs(5, 7, 3, 4, torch.float64)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return forward_kl(hidden, weight, teacher, teacher_head, temperature=2.0, chunk=2)

    assert torch.autograd.gradcheck(loss, (student, head))


def test_direction_is_teacher_weighted() -> None:
    """Two words, one token: the value of KL(teacher || student) by hand."""
    probabilities = {"teacher": (0.9, 0.1), "student": (0.5, 0.5)}
    hidden = torch.eye(1, dtype=torch.float64)
    heads = {
        name: torch.tensor(p, dtype=torch.float64).log()[:, None]
        for name, p in probabilities.items()
    }
    expected = 0.9 * torch.tensor(0.9 / 0.5).log() + 0.1 * torch.tensor(0.1 / 0.5).log()
    loss = forward_kl(hidden, heads["student"], hidden, heads["teacher"])
    assert loss.item() == pytest.approx(expected.item())


def test_a_student_like_its_teacher_has_no_loss_and_no_slope() -> None:
    hidden, head, _, _ = _inputs(9, 11, 4, 4, torch.float64)
    loss, *gradients = _gradients(forward_kl, (hidden, head, hidden.detach(), head.detach()))
    assert abs(loss.item()) < 1e-15
    assert all(g.abs().max() < 1e-15 for g in gradients)


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    hidden, head, teacher, teacher_head = _inputs(6, 8, 3, 3, torch.float64)
    whole = _gradients(forward_kl, (hidden, head, teacher, teacher_head))
    torch.autograd.backward(forward_kl(hidden, head.detach(), teacher, teacher_head))
    assert hidden.grad is not None and torch.equal(hidden.grad * 1.7, whole[1])
    assert head.grad is None
    assert not forward_kl(hidden.detach(), head.detach(), teacher, teacher_head).requires_grad


def test_bf16_inputs_are_summed_in_fp32() -> None:
    inputs = _inputs(64, 300, 16, 16, torch.float32)
    halves = tuple(t.detach().bfloat16() for t in inputs)
    halves = halves[0].requires_grad_(), halves[1].requires_grad_(), halves[2], halves[3]
    got = _gradients(forward_kl, halves, chunk=7)
    expected = _gradients(reference_forward_kl, inputs)
    assert got[0].dtype == torch.float32
    assert got[1].dtype == got[2].dtype == torch.bfloat16
    for left, right in zip(got, expected, strict=True):
        assert (left.float() - right).norm() < 3e-2 * right.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"chunk": 0}, "chunk"),
        ({"mask": torch.zeros(6, dtype=torch.bool)}, "no token counts"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, "mask has shape"),
        ({"teacher_head": torch.zeros(9, 3)}, "vocabularies differ"),
        ({"student_head": torch.zeros(8, 4)}, "student: hidden"),
        ({"teacher_hidden": torch.zeros(5, 3)}, "teacher: hidden"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    names = ("student_hidden", "student_head", "teacher_hidden", "teacher_head")
    inputs = dict(zip(names, _inputs(6, 8, 3, 3, torch.float32), strict=True))
    with pytest.raises(ValueError, match=message):
        forward_kl(**{**inputs, **change})
