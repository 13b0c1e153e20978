"""The fast CPU path against the recurrence (fp64) and against the stock layers (fp32)."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import NemotronHConfig, NemotronHForCausalLM

from minipuzzle import fastops
from minipuzzle.fastscan import install, ssd_reference, ssd_scan, uninstall

NAMES = {"M": "mamba", "*": "attention", "-": "mlp"}


def tiny_model(pattern: str = "M-M*", heads: int = 8, bias: bool = True) -> Any:
    torch.manual_seed(0)
    config = NemotronHConfig(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=40,
        layers_block_type=[NAMES[letter] for letter in pattern],
        num_hidden_layers=len(pattern),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        ssm_state_size=16,
        mamba_num_heads=heads,
        mamba_head_dim=6,
        n_groups=2,
        chunk_size=32,
        use_conv_bias=bias,
        rescale_prenorm_residual=False,
    )
    model = NemotronHForCausalLM(config).eval()
    with torch.no_grad():  # no weight stays at a neutral value, and decays differ
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def scan_inputs(sizes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """x, dt, a, b, c, d and the initial state for sizes (B, T, H, P, G, N), in fp64."""
    batch, tokens, h, p, g, n = sizes
    torch.manual_seed(seed)
    shapes = [(batch, tokens, h, p), (batch, tokens, g, n), (batch, tokens, g, n), (h,)]
    x, b, c, d = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    dt = torch.rand(batch, tokens, h, dtype=torch.float64) * 2
    a = -torch.rand(h, dtype=torch.float64) * 4
    state = torch.randn(batch, h, p, n, dtype=torch.float64)
    return [t.requires_grad_() for t in (x, dt, a, b, c, d, state)]


def assert_scan_is_reference(inputs: list[Tensor], chunk: int) -> None:
    x, dt, a, b, c, d, state = inputs
    fast = ssd_scan(
        x, dt, a, b, c, d, chunk_size=chunk, initial_state=state, return_final_state=True
    )
    slow = ssd_reference(x, dt, a, b, c, d, state)
    weights = [torch.randn_like(t) for t in slow]
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)
    gradients = [
        torch.autograd.grad(sum((t * w).sum() for t, w in zip(ts, weights, strict=True)), inputs)
        for ts in (fast, slow)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 23),
    groups=st.integers(1, 3),
    per_group=st.integers(1, 3),
    p=st.integers(1, 4),
    n=st.integers(1, 5),
    chunk=st.integers(1, 16),
)
def test_scan_and_its_gradients_equal_the_recurrence(
    batch: int, tokens: int, groups: int, per_group: int, p: int, n: int, chunk: int
) -> None:
    inputs = scan_inputs((batch, tokens, groups * per_group, p, groups, n))
    assert_scan_is_reference(inputs, chunk)


def test_scan_of_the_awkward_shape_equals_the_recurrence() -> None:
    assert_scan_is_reference(scan_inputs((2, 77, 8, 6, 2, 16)), 32)


def test_scan_without_skip_and_initial_state() -> None:
    x, dt, a, b, c, _, _ = scan_inputs((2, 19, 4, 3, 2, 5))
    y = ssd_scan(x, dt, a, b, c, chunk_size=8)
    assert isinstance(y, Tensor)
    torch.testing.assert_close(y, ssd_reference(x, dt, a, b, c)[0], rtol=1e-10, atol=1e-10)


def test_scan_continues_from_its_final_state() -> None:
    x, dt, a, b, c, d, state = scan_inputs((2, 50, 4, 3, 2, 5))
    whole, last = ssd_scan(
        x, dt, a, b, c, d, chunk_size=16, initial_state=state, return_final_state=True
    )
    parts = []
    for part in (slice(0, 21), slice(21, 50)):
        y, state = ssd_scan(
            x[:, part],
            dt[:, part],
            a,
            b[:, part],
            c[:, part],
            d,
            chunk_size=16,
            initial_state=state,
            return_final_state=True,
        )
        parts.append(y)
    torch.testing.assert_close((torch.cat(parts, 1), state), (whole, last))


def test_scan_stays_finite_where_a_chunk_forgets_everything() -> None:
    x, dt, a, b, c, d, state = (t.detach().float() for t in scan_inputs((1, 128, 2, 3, 1, 4)))
    inputs = [t.requires_grad_() for t in (x, dt * 10, a * 10, b, c, d, state)]
    y = ssd_scan(*inputs[:6], chunk_size=128, initial_state=inputs[6])
    assert isinstance(y, Tensor)
    reference = ssd_reference(*(t.detach().double() for t in inputs))[0]
    torch.testing.assert_close(y.double(), reference, rtol=1e-4, atol=1e-3)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(y.sum(), inputs))


def test_gradient_of_a_zero_step_is_finite_and_right() -> None:
    inputs = scan_inputs((1, 9, 2, 3, 1, 4))
    with torch.no_grad():
        inputs[1][:, 3:6] = 0
    assert_scan_is_reference(inputs, 4)


@pytest.mark.parametrize("tokens", [2, 3, 17])
def test_elementwise_functions_have_the_right_derivatives(tokens: int) -> None:
    torch.manual_seed(0)
    x, gate = (torch.randn(2, tokens, 6, dtype=torch.float64).requires_grad_() for _ in range(2))
    taps = torch.randn(4, 6, dtype=torch.float64).requires_grad_()
    bias = torch.randn(6, dtype=torch.float64).requires_grad_()

    def norm(x: Tensor, gate: Tensor, bias: Tensor) -> Tensor:
        return fastops.gated_rms_norm(x, gate, bias, 1e-5, 3)

    assert torch.autograd.gradcheck(fastops.conv_silu, (x, taps, bias))
    assert torch.autograd.gradcheck(norm, (x, gate, bias))
    assert torch.autograd.gradcheck(fastops.relu_squared, (x,))


def run(model: Any, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    out = model(tokens, attention_mask=mask, labels=tokens)
    out.loss.backward()
    return out.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


def padding(batch: int, tokens: int) -> Tensor:
    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[0, :21] = 0
    return mask


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_logits_and_all_gradients_equal_the_stock_model(
    padded: bool, train: bool, bias: bool
) -> None:
    model = tiny_model(bias=bias).train(train)
    tokens = torch.randint(0, 61, (2, 77))
    mask = padding(2, 77) if padded else None
    logits, gradients = run(model, tokens, mask)
    assert install(model) == 2
    fast_logits, fast_gradients = run(model, tokens, mask)
    torch.testing.assert_close(fast_logits, logits, rtol=1e-4, atol=2e-5)
    for name, gradient in gradients.items():
        error = (fast_gradients[name] - gradient).abs().max() / gradient.abs().max()
        assert error < 2e-4, f"{name}: {error}"


def test_padding_does_not_reach_the_tokens_behind_it() -> None:
    model = tiny_model()
    install(model)
    tokens, mask = torch.randint(0, 61, (1, 77)), padding(1, 77)
    other = torch.where(mask == 0, 5, tokens)
    with torch.no_grad():
        logits = [model(t, attention_mask=mask).logits[:, 21:] for t in (tokens, other)]
    torch.testing.assert_close(logits[0], logits[1])


def test_uninstall_restores_the_stock_forward() -> None:
    model = tiny_model()
    tokens = torch.randint(0, 61, (2, 33))
    with torch.no_grad():
        before = model(tokens).logits
        assert install(model) == 2 and install(model) == 0
        assert any("forward" in vars(m) for m in model.modules())
        assert uninstall(model) == 2 and uninstall(model) == 0
        assert torch.equal(model(tokens).logits, before)
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_copy_of_an_installed_model_uses_its_own_weights() -> None:
    model = tiny_model()
    install(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.layers[0].mixer.D.add_(1.0)
        tokens = torch.randint(0, 61, (1, 20))
        fast = twin(tokens).logits
        uninstall(twin)
        torch.testing.assert_close(twin(tokens).logits, fast, rtol=1e-4, atol=2e-5)
        assert not torch.allclose(model(tokens).logits, fast, atol=1e-3)


def test_hooks_on_the_parts_of_a_layer_fire_with_the_stock_values() -> None:
    model = tiny_model()
    tokens = torch.randint(0, 61, (2, 40))
    seen: list[Tensor] = []
    mixer = model.model.layers[2].mixer
    for name in ("in_proj", "norm", "out_proj"):
        getattr(mixer, name).register_forward_pre_hook(lambda _m, args: seen.extend(args))
        getattr(mixer, name).register_forward_hook(lambda _m, _a, out: seen.append(out))
    with torch.no_grad():
        model(tokens)
        stock, seen[:] = list(seen), []
        install(model)
        model(tokens)
    assert len(seen) == len(stock) == 7  # the norm gets the scan output and the gate
    for fast, expected in zip(seen, stock, strict=True):
        torch.testing.assert_close(fast, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_greedy_generation_gives_the_same_tokens(padded: bool) -> None:
    model = tiny_model()
    prompt = torch.randint(0, 61, (2, 40))
    mask = padding(2, 40) if padded else torch.ones_like(prompt)
    settings = {"max_new_tokens": 12, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    stock = model.generate(prompt, attention_mask=mask, **settings)
    install(model)
    assert torch.equal(model.generate(prompt, attention_mask=mask, **settings), stock)
    assert len(stock[0].unique()) > 3


@pytest.mark.parametrize("pieces", [(9, 1, 1, 1), (9, 3), (1, 11)])
def test_a_cached_forward_in_pieces_equals_the_stock_one(pieces: tuple[int, ...]) -> None:
    model = tiny_model("M*M")
    tokens = torch.randint(0, 61, (2, 12))

    def forward() -> Tensor:
        cache, logits = None, []
        for piece in torch.split(tokens, list(pieces), 1):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
        return torch.cat(logits, 1)

    with torch.no_grad():
        stock = forward()
        install(model)
        torch.testing.assert_close(forward(), stock, rtol=1e-4, atol=2e-5)


def test_bf16_autocast_stays_near_fp32() -> None:
    model = tiny_model()
    install(model)
    tokens = torch.randint(0, 61, (2, 40))
    expected, gradients = run(model, tokens, None)
    with torch.autocast("cpu", torch.bfloat16):
        logits, cast = run(model, tokens, None)
    torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.1)
    for name, gradient in gradients.items():
        assert cast[name].dtype == torch.float32
        assert torch.cosine_similarity(cast[name].flatten(), gradient.flatten(), 0) > 0.98, name
