"""Training loop of the demo teacher: batches, optimisers, schedule, bits per byte."""

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from teacher_forward import AnyShape, FastForward, build
from torch import Tensor, nn


@dataclass(frozen=True)
class Settings:
    """How a teacher is trained; it ends at `steps` or `minutes`, whichever comes first.

    Only the first `text_share` of the tokens in `train.bin` is read.
    """

    steps: int | None = None
    minutes: float | None = None
    batch: int = 64
    block: int = 1024
    rate: float = 3.2e-2
    optimizer: str = "muon"
    decay: float = 0.1
    warmup: int = 200
    clip: float = 1.0
    seed: int = 0
    evaluate_every: int = 2000
    text_share: float = 0.5


class Muon:
    """Momentum whose update is orthogonalised, for matrices of equal shape together.

    Newton-Schulz iteration and coefficients of Jordan et al. 2024 (Muon); the update is scaled to
    the size AdamW's has (Liu et al. 2025, arXiv 2502.16982), so that both share one rate. Matrices
    that stack several maps (Mamba's input projection) are orthogonalised part by part.
    """

    def __init__(
        self, matrices: Sequence[tuple[nn.Parameter, tuple[int, ...]]], *, momentum: float = 0.95
    ) -> None:
        self.momentum = momentum
        groups: dict[tuple[int, ...], list[tuple[nn.Parameter, tuple[int, ...]]]]
        groups = defaultdict(list)
        for parameter, parts in matrices:
            groups[(*parameter.shape, *parts)].append((parameter, parts))
        self.groups: list[tuple[list[Tensor], tuple[int, ...]]] = [
            ([parameter for parameter, _ in members], members[0][1]) for members in groups.values()
        ]
        self.averages = [torch.zeros_like(torch.stack(group)) for group, _ in self.groups]

    @torch.no_grad()
    def step(self, rate: float, decay: float) -> None:
        """Apply one update and clear the gradients."""
        for (group, parts), average in zip(self.groups, self.averages, strict=True):
            gradient = torch.stack([_gradient(parameter) for parameter in group])
            average.lerp_(gradient, 1 - self.momentum)
            ahead = gradient.lerp(average, self.momentum)
            pieces = torch.split(ahead, list(parts), dim=1)
            update = torch.cat([_orthogonal(piece) for piece in pieces], dim=1)
            torch._foreach_mul_(group, 1 - rate * decay)
            torch._foreach_add_(group, list(update.to(average.dtype).unbind()), alpha=-rate)
            for parameter in group:
                parameter.grad = None


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _orthogonal(matrices: Tensor) -> Tensor:
    """Nearly orthogonal (K, R, C) with the directions of the input and AdamW's usual size."""
    rows, columns = matrices.shape[1:]
    x = matrices.bfloat16()
    x = x.transpose(1, 2) if rows > columns else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    x = x.transpose(1, 2) if rows > columns else x
    update: Tensor = 0.2 * math.sqrt(max(rows, columns)) * x
    return update


class Optimizer:
    """AdamW for everything, or Muon for the matrices between embedding and head."""

    def __init__(self, model: Any, shape: AnyShape, settings: Settings) -> None:
        self.settings = settings
        named = dict(model.named_parameters())
        inner = {
            name: parameter
            for name, parameter in named.items()
            if parameter.dim() == 2 and ".layers." in name and settings.optimizer == "muon"
        }
        self.muon = Muon([(p, shape.parts(n) or (p.shape[0],)) for n, p in inner.items()])
        rest = [parameter for name, parameter in named.items() if name not in inner]
        weights = [parameter for parameter in rest if parameter.dim() >= 2]
        others = [parameter for parameter in rest if parameter.dim() < 2]
        groups = [
            {"params": weights, "weight_decay": settings.decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.98), fused=True)
        self.parameters = list(named.values())

    def step(self, rate: float) -> None:
        """Clip, update, clear the gradients."""
        nn.utils.clip_grad_norm_(self.parameters, self.settings.clip, foreach=True)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        if self.settings.optimizer == "muon":
            self.muon.step(rate, self.settings.decay)


def batches(tokens: Tensor, settings: Settings) -> Iterator[Tensor]:
    """Endless (batch, block) token ids: every pass cuts the text elsewhere and shuffles anew."""
    generator = torch.Generator(device=tokens.device).manual_seed(settings.seed)
    span = torch.arange(settings.block, device=tokens.device)
    while True:
        where = tokens.device
        offset = int(torch.randint(settings.block, (1,), generator=generator, device=where))
        count = (len(tokens) - offset) // settings.block
        assert count >= settings.batch, "the text is shorter than one batch"
        order = torch.randperm(count, generator=generator, device=where)
        starts = offset + settings.block * order
        for chosen in torch.split(starts, settings.batch):
            if len(chosen) == settings.batch:
                yield tokens[chosen[:, None] + span].long()


@torch.no_grad()
def bits_per_byte(
    losses: Callable[[Tensor], Tensor], tokens: Tensor, sizes: Tensor, *, block: int, batch: int
) -> float:
    """Nats / ln 2 / UTF-8 bytes over windows of `block` tokens, each begun without context.

    The first token of a window is not predicted and its bytes are not counted; an end-of-text
    token is predicted and has no bytes. The last, incomplete window is left out.
    """
    windows = tokens[: len(tokens) // block * block].view(-1, block).long()
    nats = torch.zeros((), dtype=torch.float64, device=tokens.device)
    for chosen in torch.split(windows, batch):
        nats += losses(chosen).double().sum()
    return float(nats / math.log(2) / sizes[windows[:, 1:]].sum())


class Log:
    """Lines of JSON in a file and on the screen."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")

    def __call__(self, **values: Any) -> None:
        """Write one line; floats to five digits."""
        rounded = {k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()}
        line = json.dumps(rounded)
        with self.path.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)


def read_tokens(path: Path, device: torch.device) -> Tensor:
    """Tokens of a `.bin` file as int32 on the device."""
    return torch.from_numpy(np.fromfile(path, dtype="<u2").astype(np.int32)).to(device)


def read_count(tokens: int, settings: Settings) -> int:
    """How many of the tokens in `train.bin` are read, counted from its beginning."""
    if not 0 < settings.text_share <= 1:
        raise ValueError(f"`0 < text_share <= 1` must hold, but got {settings.text_share}")
    return int(tokens * settings.text_share)


def train(
    data: Path,
    shape: AnyShape,
    settings: Settings,
    log: Log,
    *,
    held_out: Sequence[str],
    keep: Callable[[Any], None],
) -> FastForward:
    """Train a teacher on `train.bin`; `keep(model)` is called at every evaluation.

    The learning rate rises over the warm-up and falls linearly to 0 at the end.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = build(shape, seed=settings.seed, device=device)
    forward = FastForward(model, shape, kind, compiled=device.type == "cuda")
    optimizer = Optimizer(model, shape, settings)
    text = read_tokens(data / "train.bin", device)
    text = text[: read_count(len(text), settings)]
    sizes = torch.from_numpy(np.load(data / "token_bytes.npy")).to(device)
    unseen = {name: read_tokens(data / f"{name}.bin", device) for name in held_out}

    def evaluate(block: int = 512) -> dict[str, float]:
        batch = max(1, settings.batch * settings.block // block // 2)
        return {
            name: bits_per_byte(forward.uncompiled, tokens, sizes, block=block, batch=batch)
            for name, tokens in unseen.items()
        }

    parameters = sum(parameter.numel() for parameter in model.parameters())
    log(parameters=parameters, tokens_of_text=len(text), device=_device_name(device))
    started = last = time.monotonic()
    total = torch.zeros((), device=device)
    step = seen = 0
    for ids in batches(text, settings):
        progress = _progress(step, time.monotonic() - started, settings)
        if progress >= 1:
            break
        loss = forward(ids).mean()
        torch.autograd.backward(loss)
        optimizer.step(settings.rate * min(1.0, (step + 1) / settings.warmup) * (1 - progress))
        step, seen = step + 1, seen + 1
        total += loss.detach()
        if step == 1:
            log(first_loss=float(total), compile_seconds=time.monotonic() - started)
            started = last = time.monotonic()
            seen = 0
        elif step % 100 == 0:
            mean, now = float(total) / 100, time.monotonic()
            speed = seen * ids.numel() / (now - last)
            log(step=step, seconds=now - started, loss=mean, tokens_per_second=round(speed))
            total.zero_()
            last, seen = now, 0
        if step % settings.evaluate_every == 0:
            log(step=step, bits_per_byte=evaluate())
            keep(model)
            last = time.monotonic()
            seen = 0
    seconds = time.monotonic() - started
    tokens = step * settings.batch * settings.block
    log(finished=True, step=step, seconds=seconds, tokens=tokens, bits_per_byte=evaluate())
    if device.type == "cuda":
        log(peak_gib=torch.cuda.max_memory_allocated() / 2**30)
    keep(model)
    return forward


def _progress(step: int, seconds: float, settings: Settings) -> float:
    shares = [0.0]
    if settings.steps is not None:
        shares.append(step / settings.steps)
    if settings.minutes is not None and step > 0:
        shares.append(seconds / 60 / settings.minutes)
    return max(shares)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
