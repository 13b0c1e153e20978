"""The Mamba-2 scan on the CPU, group by group, with a derivative written by hand.

The stock scan repeats B and C for every head and lets autograd keep every intermediate.

Letters: B batch, T tokens, H heads, P head dim, N state size, G groups, Q tokens in a chunk,
K = chunks x B (chunk-major, so that states of one chunk are contiguous), R = H // G.

Source: Dao & Gu, "Transformers are SSMs", arXiv 2405.21060, section 6 (block decomposition).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minipuzzle.fastops import call, derivative

# exp2 is three times as fast as exp in PyTorch's CPU kernels, so decays are kept in powers of two.
_LOG2E = math.log2(math.e)
_CPU_CHUNK = 32


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
    y, final = scan_with_state(x, dt, a, b, c, d, chunk_size, initial_state)
    return (y, final) if return_final_state else y


def scan_with_state(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    chunk_size: int = _CPU_CHUNK,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`ssd_scan` that always returns both y and the last state; same arguments."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    inputs = [None if t is None else t.to(dtype) for t in (x, dt, a, b, c, d, initial_state)]
    y, final = call(_Ssd, *inputs, min(chunk_size, x.shape[1]))
    return y.to(x.dtype), final


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
        return t.view(len(t), self.count, self.size, *t.shape[2:]).transpose(0, 1)

    def join(self, t: Tensor) -> Tensor:
        """(chunks, B, Q, ...) -> contiguous (B, T, ...): the inverse of `split`."""
        t = t.transpose(0, 1).reshape(self.batch, self.count * self.size, *t.shape[3:])
        return t if t.shape[1] == self.tokens else t[:, : self.tokens].contiguous()

    def channels_first(self, t: Tensor) -> Tensor:
        """(B, T, H, P) -> contiguous (K, H, P, Q): head-wise products and factors run over Q."""
        return self.split(t).permute(0, 1, 3, 4, 2).flatten(0, 1).contiguous()

    def tokens_first(self, t: Tensor) -> Tensor:
        """(K, H, P, Q) -> contiguous (B, T, H, P)."""
        return self.join(t.view(self.count, self.batch, *t.shape[1:]).permute(0, 1, 4, 2, 3))

    def by_group(self, t: Tensor) -> Tensor:
        """(B, T, G, N) -> contiguous (K G, Q, N)."""
        return self.split(t).transpose(2, 3).flatten(0, 2).contiguous()

    def from_group(self, t: Tensor, groups: int) -> Tensor:
        """(K G, Q, N) -> contiguous (B, T, G, N)."""
        return self.join(t.view(self.count, self.batch, groups, *t.shape[1:]).transpose(2, 3))


def _within_chunk(cum: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Decays 2^(cum_l - cum_s) and the decayed scores, source s for target l: both (K H, s, l).

    cum (K, H, Q); scores (K G, s, l) with zeros for s > l. There the exponent is positive and could
    overflow; cut at zero it gives 0 x 1.
    """
    decay = torch.sub(cum[:, :, None, :], cum[:, :, :, None]).clamp_(max=0.0).exp2_()
    k, h, q, _ = decay.shape
    mixed = decay.view(k, len(scores) // k, -1, q, q) * scores.view(k, -1, 1, q, q)
    return decay.view(k * h, q, q), mixed.view(k * h, q, q)


class _Ssd(torch.autograd.Function):
    @staticmethod
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
        entry, leave = cum.exp2(), (cum[..., -1:] - cum).exp2()
        vk = xk * steps[:, :, None]

        scores = torch.bmm(bk, ck.transpose(1, 2)).triu_()  # K G, s, l
        _, mixed = _within_chunk(cum, scores)
        yk = torch.bmm(vk.view(k * h, p, size), mixed).view(k, h, p, size)

        states = x.new_empty(cut.count + 1, batch, h, p, n)
        states[0] = 0 if initial is None else initial
        pushed = vk.mul_(leave[:, :, None]).view(k * g, -1, size)
        torch.bmm(pushed, bk, out=states[1:].view(k * g, -1, n))
        kept = entry[..., -1].reshape(cut.count, batch, h, 1, 1)
        for i in range(cut.count):
            states[i + 1].addcmul_(states[i], kept[i])
        carried = torch.bmm(states[:-1].view(k * g, -1, n), ck.transpose(1, 2))
        yk.addcmul_(carried.view(k, h, p, size), entry[:, :, None])

        # Kept without the skip connection, which would drown the small gradients of dt and a.
        ctx.save_for_backward(xk, steps, a, bk, ck, d, cum, states, yk)
        ctx.cut, ctx.has_initial = cut, initial is not None
        y = yk if d is None else torch.addcmul(yk, xk, d[:, None, None])
        return cut.tokens_first(y), states[-1].clone()

    @staticmethod
    @derivative
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        dy, dfinal = gradients
        xk, steps, a, bk, ck, d, cum, states, yk = ctx.saved_tensors
        cut: _Chunks = ctx.cut
        (k, h, p, size), n = xk.shape, bk.shape[2]
        g = bk.shape[0] // k
        entry, leave = cum.exp2(), (cum[..., -1:] - cum).exp2()
        dyk, vk = cut.channels_first(dy), xk * steps[:, :, None]

        # Inside a chunk.
        scores = torch.bmm(bk, ck.transpose(1, 2)).triu_()
        decay, mixed = _within_chunk(cum, scores)
        dvk = torch.bmm(dyk.view(k * h, p, size), mixed.transpose(1, 2)).view(k, h, p, size)
        dmixed = torch.bmm(vk.view(k * h, p, size).transpose(1, 2), dyk.view(k * h, p, size))
        dscores = dmixed.mul_(decay).view(k, g, -1, size, size).sum(2)
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
        pushed = vk.mul_(leave[:, :, None]).view(k * g, -1, size)
        db.baddbmm_(pushed.transpose(1, 2), dpushed)
        through = torch.bmm(dpushed, bk.transpose(1, 2)).view(k, h, p, size)
        dvk.addcmul_(through, leave[:, :, None])

        # Every output l grows with 2^cum_l and every input s shrinks with 2^-cum_s, so the gradient
        # of cum needs no derivative of the Q x Q decays: only y . dy, v . dv and state . dstate,
        # where v = dt x.
        dsteps = torch.mul(xk, dvk, out=through).sum(2)
        dcum = torch.mul(yk, dyk, out=through).sum(2).addcmul_(steps, dsteps, value=-1.0)
        dcum[..., -1] += (states[1:] * dstates[1:]).sum((-2, -1)).view(k, h)
        dlog = dcum.flip(-1).cumsum(-1).flip(-1)  # gradient of dt * a
        dsteps.addcmul_(dlog, a[:, None])
        dxk, dd = dvk.mul_(steps[:, :, None]), None
        if d is not None:
            dd = torch.mul(xk, dyk, out=through).sum((0, 2, 3))
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
