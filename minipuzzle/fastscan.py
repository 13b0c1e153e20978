"""Fast full-sequence path of Mamba-2 layers on the CPU: scan, convolution and norms.

The stock path repeats B and C for every head, lets autograd keep every intermediate of the scan,
and spends most of a training step on copies. Here each of the four element-wise parts is one
autograd function with a derivative written by hand, and the scan works group by group.

Letters: B batch, T tokens, H heads, P head dim, N state size, G groups, Q tokens in a chunk,
K = chunks x B (chunk-major, so that states of one chunk are contiguous), R = H // G.

Source: Dao & Gu, "Transformers are SSMs", arXiv 2405.21060, section 6 (block decomposition).
"""

from __future__ import annotations

import math
import types
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# exp2 is three times as fast as exp in PyTorch's CPU kernels, so decays are kept in powers of two.
_LOG2E = math.log2(math.e)
# dt enters as an exponent; a step of exactly zero (padding) must stay finite there.
_TINY_DT = 1e-20
_CPU_CHUNK = 32
# The parts written here are fp32 also under autocast, as in the stock layer.
_forward = torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
_backward = torch.amp.custom_bwd(device_type="cpu")


def ssd_reference(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence itself, one token after the other: the reference for `ssd_scan`.

    Shapes as in `ssd_scan`. Returns y (B, T, H, P) and the last state (B, H, P, N), in x's type.
    """
    per_group = x.shape[2] // b.shape[2]
    b, c = b.repeat_interleave(per_group, 2), c.repeat_interleave(per_group, 2)  # B T H N
    state = x.new_zeros(*x.shape[:1], *x.shape[2:], b.shape[3])
    if initial_state is not None:
        state = initial_state.to(x.dtype)
    outputs = []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t] * a)[..., None, None]
        state = state * decay + (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None, :]
        outputs.append((state * c[:, t, :, None, :]).sum(-1))
    y = torch.stack(outputs, 1)
    return (y if d is None else y + d[:, None] * x), state


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    *,
    chunk_size: int = _CPU_CHUNK,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-2 scan: state' = exp(dt a) state + dt x b^T, y = state' c + d x.

    Args:
        x: (B, T, H, P) inputs.
        dt: (B, T, H) step sizes, not negative (after softplus and clamping).
        a: (H,) continuous-time decays, not positive.
        b: (B, T, G, N) input maps; head h belongs to group h // (H // G).
        c: (B, T, G, N) output maps.
        d: (H,) skip weights, or None.
        chunk_size: tokens computed as one block of matrix products; any T is allowed.
        initial_state: (B, H, P, N), or None for zeros.
        return_final_state: also return the state after the last token.

    Returns:
        y (B, T, H, P), and the last state (B, H, P, N) when asked for. Computed in fp64 for fp64
        inputs, else in fp32 (also under autocast); y has x's type. Differentiable once.

    Source: arXiv 2405.21060, section 6, with C B^T formed once per group.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    inputs = [None if t is None else t.to(dtype) for t in (x, dt, a, b, c, d, initial_state)]
    y, final = _Ssd.apply(*inputs, min(chunk_size, x.shape[1]))
    y = y.to(x.dtype)
    return (y, final) if return_final_state else y


@dataclass(frozen=True)
class _Chunks:
    """How a sequence is cut: sizes only; see the letters at the top."""

    batch: int
    tokens: int
    size: int

    @property
    def count(self) -> int:
        return -(-self.tokens // self.size)

    def split(self, t: Tensor) -> Tensor:
        """(B, T, ...) -> view (chunks, B, Q, ...); the last chunk is filled up with zeros."""
        missing = self.count * self.size - self.tokens
        if missing:
            t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, missing))
        return t.unflatten(1, (self.count, self.size)).transpose(0, 1)

    def join(self, t: Tensor) -> Tensor:
        """(chunks, B, Q, ...) -> contiguous (B, T, ...): the inverse of `split`."""
        t = t.transpose(0, 1).reshape(self.batch, self.count * self.size, *t.shape[3:])
        return t if t.shape[1] == self.tokens else t[:, : self.tokens].contiguous()

    def channels_first(self, t: Tensor) -> Tensor:
        """(B, T, H, P) -> contiguous (K, H, P, Q): head-wise products and factors run over Q."""
        return self.split(t).permute(0, 1, 3, 4, 2).flatten(0, 1).contiguous()

    def tokens_first(self, t: Tensor) -> Tensor:
        """(K, H, P, Q) -> contiguous (B, T, H, P)."""
        return self.join(t.unflatten(0, (self.count, self.batch)).permute(0, 1, 4, 2, 3))

    def by_group(self, t: Tensor) -> Tensor:
        """(B, T, G, N) -> contiguous (K G, Q, N)."""
        return self.split(t).transpose(2, 3).flatten(0, 2).contiguous()

    def from_group(self, t: Tensor, groups: int) -> Tensor:
        """(K G, Q, N) -> contiguous (B, T, G, N)."""
        return self.join(t.unflatten(0, (self.count, self.batch, groups)).transpose(2, 3))


def _within_chunk(cum: Tensor, start: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Decays 2^(cum_l - start_s) and the decayed scores of source s for target l, both (K, H, s, l).

    cum, start (K, H, Q); scores (K G, s, l) with zeros for s > l, where the exponent may be large:
    it is cut at 60 there, so that 0 x 2^60 stays 0. Exponents with s <= l are at most log2(dt).
    """
    decay = torch.sub(cum[:, :, None, :], start[:, :, :, None]).clamp_(max=60.0).exp2_()
    k, h, q, _ = decay.shape
    scores = scores.view(k, -1, 1, q, q)
    return decay, (decay.view(k, scores.shape[1], -1, q, q) * scores).view(k * h, q, q)


class _Ssd(torch.autograd.Function):
    @staticmethod
    @_forward
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        d: Tensor | None,
        initial: Tensor | None,
        size: int,
    ) -> tuple[Tensor, Tensor]:
        (batch, tokens, h, p), (g, n) = x.shape, b.shape[2:]
        cut = _Chunks(batch, tokens, size)
        k = cut.count * batch
        xk, bk, ck = cut.channels_first(x), cut.by_group(b), cut.by_group(c)
        steps = cut.split(dt).transpose(2, 3).reshape(k, h, size)
        cum = (steps * (a * _LOG2E)[:, None]).cumsum(-1)  # K H Q, all <= 0
        start = cum - steps.clamp_min(_TINY_DT).log2()  # 2^(cum_l - start_s) = decay s->l times dt_s
        entry, leave = cum.exp2(), (cum[..., -1:] - start).exp2()

        scores = torch.bmm(bk, ck.transpose(1, 2)).triu_()  # K G, s, l
        _, mixed = _within_chunk(cum, start, scores)
        yk = torch.bmm(xk.view(k * h, p, size), mixed).view(k, h, p, size)

        states = x.new_empty(cut.count + 1, batch, h, p, n)
        states[0] = 0 if initial is None else initial
        pushed = (xk * leave[:, :, None]).view(k * g, -1, size)
        torch.bmm(pushed, bk, out=states[1:].view(k * g, -1, n))
        kept = entry[..., -1].reshape(cut.count, batch, h, 1, 1)
        for i in range(cut.count):
            states[i + 1].addcmul_(states[i], kept[i])
        carried = torch.bmm(states[:-1].view(k * g, -1, n), ck.transpose(1, 2))
        yk.addcmul_(carried.view(k, h, p, size), entry[:, :, None])

        # Kept without the skip connection, which would drown the small gradients of dt and a.
        ctx.save_for_backward(xk, steps, a, bk, ck, d, cum, start, states, yk)
        ctx.cut, ctx.has_initial = cut, initial is not None
        y = yk if d is None else torch.addcmul(yk, xk, d[:, None, None])
        return cut.tokens_first(y), states[-1].clone()

    @staticmethod
    @once_differentiable
    @_backward
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        xk, steps, a, bk, ck, d, cum, start, states, yk = ctx.saved_tensors
        cut: _Chunks = ctx.cut
        (k, h, p, size), n = xk.shape, bk.shape[2]
        g = bk.shape[0] // k
        entry, leave = cum.exp2(), (cum[..., -1:] - start).exp2()
        dyk = cut.channels_first(dy)

        # Inside a chunk.
        scores = torch.bmm(bk, ck.transpose(1, 2)).triu_()
        decay, mixed = _within_chunk(cum, start, scores)
        dxk = torch.bmm(dyk.view(k * h, p, size), mixed.transpose(1, 2)).view(k, h, p, size)
        dmixed = torch.bmm(xk.view(k * h, p, size).transpose(1, 2), dyk.view(k * h, p, size))
        dd = None
        if d is not None:  # the diagonal holds x_l . dy_l
            dd = dmixed.diagonal(dim1=1, dim2=2).view(k, h, size).sum((0, 2))
        dscores = dmixed.view(k, h, size, size).mul_(decay).view(k, g, -1, size, size).sum(2)
        dscores = dscores.view(k * g, size, size).triu_()
        db, dc = torch.bmm(dscores, ck), torch.bmm(dscores.transpose(1, 2), bk)

        # Through the states, last chunk first.
        arriving = (dyk * entry[:, :, None]).view(k * g, -1, size)
        dstates = torch.empty_like(states)
        torch.bmm(arriving, ck, out=dstates[:-1].view(k * g, -1, n))
        dc.baddbmm_(arriving.transpose(1, 2), states[:-1].view(k * g, -1, n))
        dstates[-1] = dfinal
        kept = entry[..., -1].reshape(cut.count, -1, h, 1, 1)
        for i in reversed(range(cut.count)):
            dstates[i].addcmul_(dstates[i + 1], kept[i])
        dpushed = dstates[1:].view(k * g, -1, n)
        pushed = (xk * leave[:, :, None]).view(k * g, -1, size)
        db.baddbmm_(pushed.transpose(1, 2), dpushed)
        through = torch.bmm(dpushed, bk.transpose(1, 2)).view(k, h, p, size)
        dxk.addcmul_(through, leave[:, :, None])

        # Every output l grows with 2^cum_l and every input s shrinks with 2^-cum_s, so the gradient
        # of cum needs no derivative of the Q x Q decays: only y . dy, x . dx and state . dstate.
        xdx = torch.mul(xk, dxk, out=through).sum(2)
        dcum = torch.mul(yk, dyk, out=through).sum(2).sub_(xdx)
        dcum[..., -1] += (states[1:] * dstates[1:]).sum((-2, -1)).view(k, h)
        dlog = dcum.flip(-1).cumsum(-1).flip(-1)  # gradient of dt * a
        dsteps = xdx.div_(steps.clamp_min(_TINY_DT)).addcmul_(dlog, a[:, None])
        if d is not None:
            dxk.addcmul_(dyk, d[:, None, None])
        ddt = cut.join(dsteps.view(cut.count, -1, h, size).transpose(2, 3))
        return (
            cut.tokens_first(dxk),
            ddt,
            (dlog * steps).sum((0, 2)),
            cut.from_group(db, g),
            cut.from_group(dc, g),
            dd,
            dstates[0] if ctx.has_initial else None,
            None,
        )


class _ConvSilu(torch.autograd.Function):
    """silu(causal depthwise convolution): x (B, T, C), taps (J, C) oldest first, bias (C,)."""

    @staticmethod
    def _pre(x: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
        pre = torch.addcmul(bias, x, taps[-1])
        for back in range(1, min(len(taps), len(x))):
            pre[back:].addcmul_(x[:-back], taps[-1 - back])
        return pre

    @staticmethod
    @_forward
    def forward(ctx: Any, x: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, taps, bias)
        out = x.new_empty(x.shape)
        for row, out_row in zip(x, out, strict=True):  # one sequence stays in the cache
            torch.ops.aten.silu.out(_ConvSilu._pre(row, taps, bias), out=out_row)
        return out

    @staticmethod
    @once_differentiable
    @_backward
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, taps, bias = ctx.saved_tensors
        dx, dtaps, dbias = x.new_empty(x.shape), torch.zeros_like(taps), torch.zeros_like(bias)
        for row, dx_row, dout_row in zip(x, dx, dout, strict=True):
            dpre = torch.ops.aten.silu_backward(dout_row, _ConvSilu._pre(row, taps, bias))
            dbias += dpre.sum(0)
            torch.mul(dpre, taps[-1], out=dx_row)
            dtaps[-1] += (dpre * row).sum(0)
            for back in range(1, min(len(taps), len(row))):
                dx_row[:-back].addcmul_(dpre[back:], taps[-1 - back])
                dtaps[-1 - back] += (dpre[back:] * row[:-back]).sum(0)
        return dx, dtaps, dbias


class _Gate(torch.autograd.Function):
    """x * silu(z), keeping only x and z."""

    @staticmethod
    @_forward
    def forward(ctx: Any, x: Tensor, z: Tensor) -> Tensor:
        ctx.save_for_backward(x, z)
        return F.silu(z).mul_(x)

    @staticmethod
    @once_differentiable
    @_backward
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
        x, z = ctx.saved_tensors
        return F.silu(z).mul_(dout), torch.ops.aten.silu_backward(dout * x, z)


class _RmsNorm(torch.autograd.Function):
    """x / rms(x) * weight over groups of the last axis: x (..., D), weight (D,), groups of width W."""

    @staticmethod
    @_forward
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, width: int) -> Tensor:
        grouped = x.reshape(-1, x.shape[-1] // width, width)
        norm = torch.linalg.vector_norm(grouped, dim=-1, keepdim=True)
        scale = norm.square_().div_(width).add_(eps).rsqrt_()
        ctx.save_for_backward(grouped, weight, scale)
        return (grouped * scale).mul_(weight.view(-1, width)).view(x.shape)

    @staticmethod
    @once_differentiable
    @_backward
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        weight = weight.view(x.shape[1:])
        dgrouped = dout.reshape(x.shape)
        product = dgrouped * x
        along = torch.bmm(product.transpose(0, 1), weight[:, :, None]).transpose(0, 1)
        dweight = torch.bmm(product.permute(1, 2, 0), scale.transpose(0, 1))
        dx = torch.mul(dgrouped, scale, out=product).mul_(weight)
        dx.addcmul_(x, along.mul_(scale.pow(3)).div_(-x.shape[-1]))
        return dx.view(dout.shape), dweight.view(-1), None, None


class _ReluSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        kept = F.relu(x)
        ctx.save_for_backward(kept)
        return kept * kept

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        (kept,) = ctx.saved_tensors
        return (dout * kept).mul_(2)


def _is_fast(*tensors: Tensor) -> bool:
    return all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)


def _norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    if not _is_fast(hidden_states, self.weight):
        return _stock(self, hidden_states)
    width = self.weight.shape[0]
    return _RmsNorm.apply(hidden_states, self.weight, self.variance_epsilon, width)


def _gated_norm_forward(self: Any, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
    if gate is None or not _is_fast(hidden_states, self.weight):
        return _stock(self, hidden_states, gate)
    gated = _Gate.apply(hidden_states, gate.float())
    return _RmsNorm.apply(gated, self.weight, self.variance_epsilon, self.group_size)


def _relu_squared_forward(self: Any, x: Tensor) -> Tensor:
    return _ReluSquared.apply(x) if _is_fast(x) else _stock(self, x)


def _stock(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of the module's class, past the one set on the instance."""
    return type(module).forward(module, *args, **kwargs)


def _mixer_forward(
    self: Any,
    hidden_states: Tensor,
    cache_params: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Mamba-2 layer: hidden states (B, T, D) to (B, T, D); the mask is (B, T), 0 for padding."""
    batch, tokens, _ = hidden_states.shape
    if hidden_states.device.type != "cpu" or (cache_params is not None and tokens == 1):
        return _stock(self, hidden_states, cache_params, attention_mask, **kwargs)
    dtype, mask = hidden_states.dtype, attention_mask
    state = cache_params and cache_params.get_recurrent_state(self.layer_idx, state_idx=0)
    if mask is not None:
        hidden_states = (hidden_states * mask[:, :, None]).to(dtype)
    inner, maps = self.intermediate_size, self.n_groups * self.ssm_state_size
    widths = [inner, inner + 2 * maps, self.num_heads]
    gate, mixed, dt = self.in_proj(hidden_states).split(widths, dim=-1)
    if cache_params is not None:
        past = {"conv_kernel_size": self.conv_kernel_size}
        mixed = cache_params.update_conv_state(mixed.transpose(1, 2), self.layer_idx, **past)
        mixed = mixed.transpose(1, 2)
    mixed = _convolve(self.conv1d, mixed)[:, -tokens:]
    if mask is not None:
        mixed = mixed * mask[:, :, None]
    x, b, c = mixed.split([inner, maps, maps], dim=-1)
    dt = F.softplus(dt.float() + self.dt_bias.float()).clamp(*self.time_step_limit)
    y, final = ssd_scan(
        x.unflatten(2, (self.num_heads, -1)),
        dt,
        -torch.exp(self.A_log.float()),
        b.unflatten(2, (self.n_groups, -1)),
        c.unflatten(2, (self.n_groups, -1)),
        self.D,
        initial_state=state,
        return_final_state=True,
    )
    if cache_params is not None:
        cache_params.update_recurrent_state(final, layer_idx=self.layer_idx)
    return self.out_proj(self.norm(y.flatten(2), gate).to(dtype))


def _convolve(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """silu of the causal depthwise convolution in fp32: (B, T, C) to (B, T, C)."""
    taps = conv.weight.float().squeeze(1).t().contiguous()
    bias = taps.new_zeros(taps.shape[1]) if conv.bias is None else conv.bias.float()
    return _ConvSilu.apply(x.float(), taps, bias)


_FAST_FORWARD = {
    "NemotronHMamba2Mixer": _mixer_forward,
    "NemotronHRMSNorm": _norm_forward,
    "NemotronHRMSNormGated": _gated_norm_forward,
    "ReLUSquaredActivation": _relu_squared_forward,
}


def install(model: nn.Module) -> int:
    """Give the instances in `model` (not their classes) the fast forward; the Mamba layers changed.

    Modules, parameters and hooks stay as they are: `in_proj`, `norm` (called with the scan output
    and the gate) and `out_proj` are still called as modules. Tensors elsewhere than on the CPU and
    single-token decoding take the stock path. Calling it twice changes nothing.
    """
    changed = 0
    for module in model.modules():
        name = type(module).__name__
        if name in _FAST_FORWARD and "forward" not in vars(module):
            module.forward = types.MethodType(_FAST_FORWARD[name], module)
            changed += name == "NemotronHMamba2Mixer"
    return changed


def uninstall(model: nn.Module) -> int:
    """Undo `install`; the number of Mamba layers changed back."""
    changed = 0
    for module in model.modules():
        name = type(module).__name__
        own = getattr(vars(module).get("forward"), "__func__", None)
        if own is not None and own is _FAST_FORWARD.get(name):
            del module.forward
            changed += name == "NemotronHMamba2Mixer"
    return changed
