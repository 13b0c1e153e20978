"""What the training of a teacher shares between families: forward pass, start, checkpoint.

The parameters are those of a stock class; a family's shape (`AnyShape`) gives the functions that
the forward pass used in training consists of, in plain PyTorch that `torch.compile` fuses well.
Letters in the shapes: B batch, T time, D hidden.
"""

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from teacher_tokenizer import write_json
from torch import Tensor, nn

from minipuzzle.writer import write_checkpoint

EPSILON = 1e-5

LayerFunction = Callable[[Tensor, Tensor, dict[str, Tensor], Any, torch.dtype], Tensor]
"""(h, norm, parameters, shape, kind) to h: a layer with its norm and residual."""


@dataclass(frozen=True)
class Route:
    """Where the forward pass of a stock model finds its parameters.

    Attributes:
        embeddings: token embeddings.
        layers: per layer its function, the weight of its norm, its other parameters by name.
        norm: weight of the norm before the head.
        head: weight of the head.
    """

    embeddings: nn.Embedding
    layers: Sequence[tuple[LayerFunction, Tensor, dict[str, Tensor]]]
    norm: Tensor
    head: Tensor


class AnyShape(Protocol):
    """What training needs to know of a family's shape."""

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""

    @property
    def context(self) -> int:
        """Longest sequence of the finished model."""

    @property
    def writers(self) -> int:
        """Projections that write the residual stream; their initial size falls with the root."""

    def config(self) -> dict[str, Any]:
        """Contents of config.json."""

    def stock(self) -> Any:
        """Stock model of this shape."""

    def route(self, model: Any) -> Route:
        """Forward pass through a stock model of this shape."""

    def parts(self, name: str) -> tuple[int, ...] | None:
        """Heights of the maps that a matrix stacks, None where it is one map."""

    def disk_name(self, name: str) -> str:
        """Name on disk of a parameter of the stock model."""


def build(shape: AnyShape, *, seed: int, device: torch.device) -> Any:
    """Stock model in fp32 with this project's initialisation."""
    torch.manual_seed(seed)
    model = shape.stock()
    for name, parameter in model.named_parameters():
        _initialise(name, parameter, shape)
    return model.to(device).eval()


@torch.no_grad()
def _initialise(name: str, parameter: Tensor, shape: AnyShape) -> None:
    if name.endswith("A_log"):
        parameter.copy_(torch.empty_like(parameter).uniform_(1, 16).log_())
    elif name.endswith("dt_bias"):
        step = torch.empty_like(parameter).uniform_(math.log(1e-3), math.log(1e-1)).exp_()
        parameter.copy_(step + torch.log(-torch.expm1(-step)))  # inverse of softplus
    elif "embed" in name:
        parameter.normal_(std=0.1)
    elif name.endswith(("out_proj.weight", "down_proj.weight", "o_proj.weight")):
        parameter.normal_(std=0.5 / math.sqrt(parameter.shape[1] * shape.writers))
    elif name.endswith(("proj.weight", "lm_head.weight")):
        parameter.normal_(std=0.5 / math.sqrt(parameter.shape[1]))


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Root-mean-square norm over the last axis, in fp32."""
    x = x.float()
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON))


def token_losses(h: Tensor, norm: Tensor, head: Tensor, ids: Tensor, kind: torch.dtype) -> Tensor:
    """Negative log-likelihood of each token after the first, in nats: (B, T - 1) fp32."""
    logits = F.linear(rms_norm(h, norm).to(kind), head.to(kind))[:, :-1].float()
    target = logits.gather(-1, ids[:, 1:, None]).squeeze(-1)
    return torch.logsumexp(logits, dim=-1) - target


class FastForward:
    """Losses of a stock model through its route's functions, compiled where there is a GPU."""

    def __init__(self, model: Any, shape: AnyShape, kind: torch.dtype, *, compiled: bool) -> None:
        self.shape, self.kind, self.route = shape, kind, shape.route(model)
        wrap = torch.compile(dynamic=False, fullgraph=True) if compiled else _as_it_is
        distinct = {function for function, _, _ in self.route.layers}
        self.functions = {function: wrap(function) for function in distinct}
        self.losses = wrap(token_losses)

    def __call__(self, ids: Tensor) -> Tensor:
        """Loss of each token after the first of ids (B, T), `T` a multiple of `CHUNK`."""
        return self._run(ids, self.functions.__getitem__, self.losses)

    def uncompiled(self, ids: Tensor) -> Tensor:
        """Return the same for shapes met too seldom to be worth compiling."""
        return self._run(ids, _as_it_is, token_losses)

    def _run(self, ids: Tensor, choose: Any, losses: Any) -> Tensor:
        h: Tensor = self.route.embeddings(ids)
        for function, norm, parameters in self.route.layers:
            h = choose(function)(h, norm, parameters, self.shape, self.kind)
        nats: Tensor = losses(h, self.route.norm, self.route.head, ids, self.kind)
        return nats


def _as_it_is(function: Any) -> Any:
    return function


def save_checkpoint(
    model: Any, shape: AnyShape, tokenizer: Path, folder: Path, *, max_shard_bytes: int = 2**32
) -> None:
    """Write a bf16 checkpoint with its tokenizer; the folder is there whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    state = model.state_dict()
    write_checkpoint(
        partial,
        shape.config(),
        ((shape.disk_name(k), v.detach().to("cpu", torch.bfloat16)) for k, v in state.items()),
        carry_from=tokenizer,
        max_shard_bytes=max_shard_bytes,
    )
    generation = {"eos_token_id": 0, "pad_token_id": 1, "max_new_tokens": 128}
    write_json(partial / "generation_config.json", generation)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
