"""Importance of all layers in one sweep over the model.

At layer i the sweep holds the states of the full model and of every variant that lacks an earlier
layer; the variant "without i" is born as the input of i. All layers together so cost half of one
forward pass per layer, and every weight is read once. Layers that can only go together (a block)
make one variant, born at the first of them and joining after the last.

The metrics are those of minipuzzle/metrics.py; all come from the same sweep, and what was not asked
for is not computed: without `logit_mse` and `kl` the head is left out, for `cosine` alone there are
no variants at all. The plain way, one forward pass per removed layer, is in reference.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from minipuzzle.errors import UserError
from minipuzzle.metrics import LAYER_METRICS, LayerMetric
from minipuzzle.streams import Stream
from minipuzzle.walk import Walk

OF_LOGITS: frozenset[LayerMetric] = frozenset({"logit_mse", "kl"})
OF_VARIANTS: frozenset[LayerMetric] = OF_LOGITS | {"hidden_mse"}
LOGIT_BYTES = {"cpu": 8 * 2**20, "cuda": 128 * 2**20}  # of one fp32 piece of the logits

Listener = Callable[[int], AbstractContextManager[None]]
"""Position of a layer -> a context in which the full model runs it (meters.py)."""


def _no_listener(i: int) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass
class LayerSums:
    """Sums over tokens, fp64 on the device; those of several groups and processes add up.

    `table` (U, 4): one row per removable unit, one column per metric; `shared` (2,): tokens, and
    the sum of squares of the full model's logits.
    """

    units: tuple[tuple[int, ...], ...]
    metrics: frozenset[LayerMetric]
    table: torch.Tensor
    shared: torch.Tensor

    @classmethod
    def of(cls, walk: Walk, metrics: Collection[LayerMetric]) -> LayerSums:
        """Empty sums for a model."""
        units = walk.model.family.removable(walk.model.architecture)
        table = torch.zeros(len(units), len(LAYER_METRICS), dtype=torch.float64, device=walk.device)
        shared = torch.zeros(2, dtype=torch.float64, device=walk.device)
        return cls(units, frozenset(metrics), table, shared)

    def add(self, unit: int, metric: LayerMetric, value: torch.Tensor) -> None:
        """Add to one unit's sum."""
        self.table[unit, LAYER_METRICS.index(metric)] += value

    def scores(self, hidden: int) -> dict[LayerMetric, torch.Tensor]:
        """Metric -> one score per unit, (U,), fp64 on the CPU; `hidden` is the stream's width."""
        tokens, power = self.shared.tolist()
        whole = {"hidden_mse": tokens * hidden, "logit_mse": power, "kl": tokens, "cosine": tokens}
        result: dict[LayerMetric, torch.Tensor] = {}
        for metric in LAYER_METRICS:
            if metric in self.metrics:
                mean = self.table[:, LAYER_METRICS.index(metric)].cpu() / max(whole[metric], 1e-300)
                result[metric] = 1 - mean if metric == "cosine" else mean
        return result


@torch.no_grad()
def sweep(
    walk: Walk,
    ids: torch.Tensor,
    sums: LayerSums,
    *,
    also: torch.Tensor | None = None,
    gone: Collection[int] = (),
    uncut: Stream | None = None,
    listener: Listener = _no_listener,
    advance: Callable[[], None] = lambda: None,
) -> Stream:
    """Walk once over ids (B, T) and add to `sums` what every unit is worth.

    Args:
        walk: of the uncut model, resident or streamed.
        ids: sequences that the layers are scored on.
        sums: says which metrics, and takes the sums.
        also: more sequences for the full model alone, which the listener hears too.
        gone: positions of layers that are out already.
        uncut: what this function returned for these ids with nothing gone: what the variants are
            compared with (None: the model without `gone`).
        listener: context around the full model's layers.
        advance: called after every layer.

    Returns:
        The states of the full model (without `gone`) after the last layer, before the final norm.

    Raises:
        UserError: for NaN or infinity in the model, the text or a variant; it names the layer.
    """
    full, rest = walk.stream(ids), walk.stream(ids[:0] if also is None else also)
    _require_finite([full, rest], walk, None)
    variants = Stream([], walk.device, waiting=walk.streamed)
    units = [u for u, layers in enumerate(sums.units) if not set(layers) & set(gone)]
    first, last = ({sums.units[u][end]: u for u in units} for end in (0, -1))
    born = full
    for i in walk.layers():
        if i in gone:
            continue
        if i in first and sums.metrics:
            born = full.copy()

        def layer(hidden: torch.Tensor, i: int = i) -> torch.Tensor:
            return walk.layer(i, hidden)

        with listener(i):
            full.advance(layer)
            rest.advance(layer)
            _require_finite([full, rest], walk, i)
        variants.advance(layer)
        if i in last:
            _add_cosine(sums, last[i], born, full)
            if sums.metrics & OF_VARIANTS:
                variants.extend(born)
        advance()
    _compare(walk, sums, units, uncut or full, variants)
    sums.shared[0] += ids.numel()
    return full


def _add_cosine(sums: LayerSums, unit: int, before: Stream, after: Stream) -> None:
    """Cosines between what enters a unit and what leaves it, summed over the tokens."""
    if "cosine" in sums.metrics:
        for a, b in zip(before, after, strict=True):
            cosines = F.cosine_similarity(a.float(), b.float(), dim=-1)
            sums.add(unit, "cosine", cosines.sum())


def _compare(
    walk: Walk, sums: LayerSums, units: Sequence[int], full: Stream, variants: Stream
) -> None:
    """Hold every variant against the full model, a piece of tokens at a time."""
    if not len(variants):
        return
    for k, start, stop in _pieces(walk, full, heads=bool(sums.metrics & OF_LOGITS)):
        reference = Reference(walk, full.tokens(k, start, stop), sums)
        for place, unit in enumerate(units):
            state = walk.final(variants.tokens(place * len(full) + k, start, stop))
            reference.compare(unit, state)
    if not bool(torch.isfinite(sums.shared).all()):
        raise UserError("the head gives NaN or infinite logits; download the model again")
    finite = torch.isfinite(sums.table).all(1).tolist()
    if not all(finite):
        layer = sums.units[finite.index(False)][0]
        raise UserError(
            f"without layer {layer} the model gives NaN or infinite states; "
            "its numbers overflow: check the checkpoint, or score it in fp32"
        )


def _pieces(walk: Walk, full: Stream, *, heads: bool) -> Iterator[tuple[int, int, int]]:
    """(chunk, first token, token behind the last): as many tokens as logits may be at once."""
    logits = LOGIT_BYTES.get(walk.device.type, LOGIT_BYTES["cpu"])
    most = max(1, logits // (4 * walk.model.architecture.vocabulary))
    for k, size in enumerate(full.sizes()):
        step = most if heads else size
        for start in range(0, size, step):
            yield k, start, min(size, start + step)


class Reference:
    """The full model on a piece of tokens, and how far variants are from it."""

    def __init__(self, walk: Walk, hidden: torch.Tensor, sums: LayerSums) -> None:
        self.walk, self.sums = walk, sums
        self.state = walk.final(hidden)
        if sums.metrics & OF_LOGITS:
            self.logits = walk.logits(self.state)
            sums.shared[1] += self.logits.square().sum()
        if "kl" in sums.metrics:
            self.log_p = F.log_softmax(self.logits, dim=-1)
            self.p = self.log_p.exp()

    def compare(self, unit: int, state: torch.Tensor) -> None:
        """Add what the variant without `unit` differs by: its state before the head, (N, D)."""
        metrics = self.sums.metrics
        if "hidden_mse" in metrics:
            lacks = state.float() - self.state.float()
            self.sums.add(unit, "hidden_mse", lacks.square_().sum())
        if not metrics & OF_LOGITS:
            return
        logits = self.walk.logits(state)
        if "logit_mse" in metrics:
            error = (logits - self.logits).square_().sum()
            self.sums.add(unit, "logit_mse", error)
        if "kl" in metrics:
            log_q = F.log_softmax(logits, dim=-1)
            kl = log_q.neg_().add_(self.log_p).mul_(self.p).sum()
            self.sums.add(unit, "kl", kl)


def _require_finite(streams: Sequence[Stream], walk: Walk, i: int | None) -> None:
    """UserError unless all states are finite; a sum is NaN or infinite where one of them is."""
    sums = [chunk.sum(dtype=torch.float32) for stream in streams for chunk in stream]
    if not sums or bool(torch.isfinite(torch.stack(sums)).all()):
        return
    if i is None:
        raise UserError("the embedding holds NaN or infinite values; download the model again")
    kind = walk.model.architecture.layers[i].kind
    raise UserError(
        f"layer {i} ({kind}) gives NaN or infinite activations; "
        "its numbers overflow: check the checkpoint, or score it in fp32"
    )
