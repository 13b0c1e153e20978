"""What a user would pick instead: Torch-Pruning for widths, block influence for depth.

Torch-Pruning is needed here alone and is no dependency of the project:

    pip install --no-deps torch-pruning==1.6.1

Its own example for language models prunes every width by one ratio: hidden channels, query heads
and FFN channels, by the L2 norm of the weights. The settings below add its L1 norm and its two
Taylor scores, cuts that leave the hidden size alone, and one ranking over all FFN layers.

With transformers 5 its tracer needs help or never ends: it takes the concatenation of the rotated
halves of a head, written with dimension -1, for one of channels, and follows it for ever. See
`traceable`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from minipuzzle.errors import UserError
from minipuzzle.model import Model
from minipuzzle.walk import Walk, chunks

VERSION = "1.6.1"
TOLERANCE = 0.0025  # of the uncut model's parameters, around what is asked for
MOST_TRIALS = 8


Importance = Literal["l1", "l2", "taylor", "taylor-joint"]
Scope = Literal["all", "heads+ffn", "ffn"]
Ranking = Literal["uniform", "global"]


@dataclass(frozen=True)
class Setting:
    """How Torch-Pruning is asked to cut.

    `scope`: `all` (hidden channels, query heads, FFN channels), `heads+ffn` or `ffn`. `ranking`:
    `uniform` (every layer loses the same share) or `global` (FFN channels of all layers compete).
    """

    importance: Importance
    scope: Scope
    ranking: Ranking


SCOPES: tuple[tuple[Scope, Ranking], ...] = (
    ("all", "uniform"),
    ("heads+ffn", "uniform"),
    ("heads+ffn", "global"),
    ("ffn", "uniform"),
    ("ffn", "global"),
)
IMPORTANCES: tuple[Importance, ...] = ("l1", "l2", "taylor", "taylor-joint")
SETTINGS = tuple(Setting(i, scope, ranking) for i in IMPORTANCES for scope, ranking in SCOPES)


def torch_pruning() -> Any:
    """The library; UserError where it is not installed."""
    try:
        return import_module("torch_pruning")
    except ImportError:
        raise UserError(
            f"Torch-Pruning is not installed; pip install --no-deps torch-pruning=={VERSION}"
        ) from None


def gradients(module: nn.Module, ids: torch.Tensor, *, batch: int = 4) -> dict[str, torch.Tensor]:
    """Gradient of the mean next-token loss over ids (B, T), by parameter, for the Taylor scores."""
    working = copy.deepcopy(module).requires_grad_(True)
    for rows in torch.split(ids.to(next(working.parameters()).device), batch):
        torch.autograd.backward(next_token_loss(working, rows) * (len(rows) / len(ids)))
    return {n: p.grad for n, p in working.named_parameters() if p.grad is not None}


def next_token_loss(module: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Mean loss of the tokens of ids (B, T) after each sequence's first, nats."""
    logits = module(ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def cut_to(
    module: nn.Module, setting: Setting, share: float, grads: Mapping[str, torch.Tensor]
) -> nn.Module | None:
    """The module less `share` of its parameters, to TOLERANCE; None if no cut comes so near.

    Torch-Pruning takes a ratio of widths; the one that gives the share is searched for.
    """
    whole = size(module)
    ratio, low, high = share, (0.0, 0.0), (2.0, 2.0)  # (ratio of widths, share of parameters)
    for _ in range(MOST_TRIALS):
        pruned = prune(module, setting, ratio, share, grads)
        removed = 1 - size(pruned) / whole
        if abs(removed - share) <= TOLERANCE:
            return pruned
        if removed < share:
            low = ratio, removed
        else:
            high = ratio, removed
        if high[1] > 1:  # none was too much yet
            ratio = min(0.95, ratio * share / max(removed, 1e-3))
        else:
            ratio = low[0] + (high[0] - low[0]) * (share - low[1]) / (high[1] - low[1])
    return None


def prune(
    module: nn.Module,
    setting: Setting,
    ratio: float,
    heads: float,
    grads: Mapping[str, torch.Tensor],
) -> nn.Module:
    """A copy cut by Torch-Pruning: `ratio` of the widths and, where asked, `heads` of the heads."""
    pruned: Any = copy.deepcopy(module).requires_grad_(True)
    for name, parameter in pruned.named_parameters():
        parameter.grad = grads[name].clone() if name in grads else None
    if setting.ranking == "uniform":
        run_pruner(pruned, setting, ratio, heads if setting.scope != "ffn" else 0.0)
    else:  # its global ranking of grouped-query heads miscounts them: heads by layer, before
        if setting.scope != "ffn":
            run_pruner(pruned, setting, ratio, heads, only="heads")
        run_pruner(pruned, setting, ratio, 0.0, only="ffn")
    done: nn.Module = pruned.requires_grad_(False)
    return done


def run_pruner(
    module: nn.Module, setting: Setting, ratio: float, heads: float, *, only: str = ""
) -> None:
    """One pass of its `BasePruner`, in place, set up as in its example for language models."""
    library = torch_pruning()
    body: Any = module
    ignored = [body.lm_head]
    if setting.scope != "all":
        ignored.append(body.model.embed_tokens)
    if only == "heads":
        ignored += [block.mlp for block in body.model.layers]
    numbers = {
        projection: projection.out_features // attention.head_dim
        for attention in attentions(module)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    }
    if not heads:
        ignored += list(numbers)
    with warnings.catch_warnings(), torch.enable_grad(), traceable(module):
        warnings.simplefilter("ignore")  # norms of other classes than its own are handled well
        pruner = library.pruner.BasePruner(
            module,
            torch.arange(16, device=body.lm_head.weight.device)[None],
            importance(library, setting.importance),
            global_pruning=setting.ranking == "global" and only != "heads",
            output_transform=lambda output: output.logits,
            pruning_ratio=heads if only == "heads" else ratio,
            ignored_layers=ignored,
            num_heads=numbers,
            in_channel_groups={},
            out_channel_groups={},
            prune_num_heads=heads > 0,
            prune_head_dims=False,
            head_pruning_ratio=heads,
        )
        spare_keys(pruner.DG, {p for a in attentions(module) for p in (a.k_proj, a.v_proj)})
        for group in pruner.step(interactive=True):
            group.prune()
    for attention in attentions(module):
        queries, keys = attention.q_proj.out_features, attention.k_proj.out_features
        attention.num_key_value_groups = queries // keys


def spare_keys(graph: Any, keys: set[nn.Module]) -> None:
    """Query heads are cut also where one per key is left.

    It leaves keys and values whole when their number differs from the queries' after the cut; where
    both become equal it would cut all of them, finds nothing left, and cuts no head at all.
    """
    check = graph.check_pruning_group

    def without_keys(group: Any) -> Any:
        for k in range(len(group)):
            dep, _ = group[k]
            if dep.target.module in keys and graph.is_out_channel_pruning_fn(dep.handler):
                group[k] = (dep, [])
        return check(group)

    graph.check_pruning_group = without_keys


@contextmanager
def traceable(module: Any) -> Iterator[None]:
    """A Llama computes what it does, in operations that Torch-Pruning's tracer can follow.

    The rotation of heads concatenates along a dimension counted from the front; keys and values are
    repeated in the open (its map of grouped queries looks for that); nothing is cached.
    """
    from transformers.models.llama import modeling_llama as stock

    config, rotate = module.config, stock.rotate_half
    kept = config._attn_implementation, config.use_cache

    def rotate_half(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=x.dim() - 1)
        return torch.cat((-second, first), dim=x.dim() - 1)

    try:
        stock.rotate_half = rotate_half
        config._attn_implementation, config.use_cache = "eager", False
        yield
    finally:
        stock.rotate_half = rotate
        config._attn_implementation, config.use_cache = kept


def importance(library: Any, name: str) -> Any:
    """One of its scores."""
    scores = library.importance
    if name in ("l1", "l2"):
        return scores.GroupMagnitudeImportance(p=int(name[1]))
    return scores.GroupTaylorImportance(multivariable=name == "taylor-joint")


def attentions(module: Any) -> Iterator[Any]:
    """The attention modules of a Llama."""
    for block in module.model.layers:
        yield block.self_attn


def size(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


@torch.no_grad()
def block_influence(
    model: Model, blocks: Sequence[Sequence[int]], ids: torch.Tensor
) -> torch.Tensor:
    """ShortGPT's score of each block of layers on ids (B, T): (blocks,), fp64.

    One minus the mean cosine of what enters a block and what leaves it (arXiv 2403.03853, eq. 1);
    a block of low influence changes the stream little.
    """
    walk = Walk(model)
    total = torch.zeros(len(blocks), dtype=torch.float64)
    for rows in chunks(ids):
        hidden = walk.embed(rows)
        for b, layers in enumerate(blocks):
            entering = hidden
            for i in layers:
                hidden = walk.layer(i, hidden)
            total[b] += F.cosine_similarity(entering, hidden, dim=-1).double().sum().cpu()
    return 1 - total / ids.numel()
