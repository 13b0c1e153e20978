"""What a candidate is worth after a repair: narrowed layers whose writers are re-fitted at once.

The full repair (minipuzzle/prune/repair.py) takes every candidate through the text beside its
teacher. Here each layer is fitted alone, on the teacher's own streams, so that a fit serves all
candidates that agree around that layer. Where n layers directly before layer j are gone,

    min over W of  sum over tokens |h_{j+1} - (h_{j-n} + W u)|^2  +  r |W - W_0|^2

with h_k the teacher's stream before its layer k, and u what the writer of layer j reads when the
layer stands on h_{j-n}: u and the stream are exact but for what the repair of earlier layers has
left. Where the last layers are gone, h_{j+1} is the stream after them. Sums of u u^T and u y^T
answer for every choice of channels (FFN width, query heads): its problem is a part of the whole
layer's. Where a norm over those channels stands before the writer (Mamba heads), u depends on the
choice and the sums are gathered from the narrowed layer; so are they for a narrower stream, of
which only the kept channels are read and met.

Letters: B sequences, T tokens, D hidden width, U channels that a writer reads.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import nn

from minipuzzle.architecture import Architecture
from minipuzzle.families.table import axis_sizes
from minipuzzle.model import Model
from minipuzzle.prune.moments import Moments, ridge_solution
from minipuzzle.prune.refit import capturing
from minipuzzle.selection import Indices, LayerSelection, Selection
from minipuzzle.slicing import dim_index, take
from minipuzzle.streams import Stream
from minipuzzle.walk import Sublayer, Walk, narrow_layer

from .trie import cut_axes

RIDGE = 1e-3
CACHE_BYTES = 2**30  # of sums, and as many of layers
Axes = tuple[tuple[str, Indices], ...]
Value = TypeVar("Value")


@dataclass(frozen=True)
class Place:
    """All that a re-fitted layer depends on.

    `axes`: what is kept of layer i, where that is not all; `before`: layers gone directly before
    it; `after`: layers gone directly after it where no layer is left behind them (others are made
    up for by the next one); `channels`: those kept of the stream, None for all.
    """

    i: int
    axes: Axes = ()
    before: int = 0
    after: int = 0
    channels: Indices | None = None

    @classmethod
    def of(cls, architecture: Architecture, selection: Selection, i: int) -> Place | None:
        """The place of layer i in a cut; None where it is gone."""
        axes = selection.layers[i]
        if axes is None:
            return None
        kept = selection.kept
        position = kept.index(i)
        first = kept[position - 1] + 1 if position else 0
        after = len(selection.layers) - 1 - i if i == kept[-1] else 0
        cut = tuple(cut_axes(architecture.layers[i], axes).items())
        channels = selection.hidden
        whole = channels is None or len(channels) == architecture.hidden
        return cls(i, cut, i - first, after, None if whole else channels)

    @property
    def untouched(self) -> bool:
        """Whether the teacher's own layer stands here."""
        return not (self.axes or self.before or self.after or self.channels)


class QuickRepair:
    """Makes the layers of candidates, re-fitted (a `trie.Maker`).

    Holds the teacher's streams before all layers: (L + 1) x B x T x D values.
    """

    def __init__(
        self,
        teacher: Model,
        ids: torch.Tensor,
        *,
        ridge: float = RIDGE,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """`ids`: calibration text (B, T); `ridge`: relative to the mean power of what is read."""
        assert teacher.store is None, "a streamed model's layers are not there when asked for"
        self.teacher, self.ridge = teacher, ridge
        self.walk = Walk(teacher)
        self.streams = teacher_streams(self.walk, ids)
        self._sums: Cache[Moments] = Cache(cache_bytes, _bytes_of_sums)
        self._layers: Cache[Sublayer] = Cache(cache_bytes, _bytes_of_layer)

    def key(self, selection: Selection, i: int) -> Hashable | None:
        """Equal for layers that are the same; None where layer i is gone."""
        return Place.of(self.teacher.architecture, selection, i)

    def layer(self, selection: Selection, i: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """Layer i of a candidate: hidden (B, T, D) -> hidden (B, T, D), the residual included.

        Raises:
            UserError: when activations are not finite.
        """
        place = Place.of(self.teacher.architecture, selection, i)
        assert place is not None, f"layer {i} is gone"
        if place.untouched:
            return lambda hidden: self.walk.layer(i, hidden)
        fitted = self.fitted(place)
        return lambda hidden: self.walk.through(i, fitted, hidden)

    def fitted(self, place: Place) -> Sublayer:
        """The re-fitted layer of a place."""
        return self._layers.get(place, lambda: self._fit(place))

    @torch.no_grad()
    def _fit(self, place: Place) -> Sublayer:
        fitted = narrow_layer(self.teacher, place.i, dict(place.axes), place.channels)
        writer = self._writer(place.i, fitted)
        old = writer.weight
        if place.channels or self._has_inner_norm(place.i):
            sums = self._sums.get(place, lambda: self._gather(place, fitted))
            gram, cross = sums.gram, sums.cross
        else:
            gram, cross = self._part(place)
        where = f"the writer of layer {place.i}"
        new = old + ridge_solution(gram, cross, self.ridge, where=where)
        # narrow_layer shares what it does not cut with the teacher: replaced, never changed
        writer.weight = nn.Parameter(new.to(old.dtype), requires_grad=False)
        return fitted

    def _part(self, place: Place) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums for some of the writer's channels, from those of the whole layer.

        What the other channels wrote is missing too: y = h_{j+1} - (h_{j-n} + W_S u_S).
        """
        whole = Place(place.i, (), place.before, place.after)
        layer = self.walk.sublayer(place.i)
        sums = self._sums.get(whole, lambda: self._gather(whole, layer))
        kept = self._columns(place.i, dict(place.axes))
        if kept is None:
            return sums.gram, sums.cross
        kept = kept.to(sums.gram.device)
        cut = torch.ones(len(sums.gram), dtype=torch.bool, device=kept.device)
        cut[kept] = False
        written = self._writer(place.i, layer).weight.T.to(sums.gram.dtype)[cut]
        rows = sums.gram[kept]
        return take(rows, (None, kept)), sums.cross[kept] + rows[:, cut] @ written

    @torch.no_grad()
    def _gather(self, place: Place, layer: Sublayer) -> Moments:
        """Sums over the text of u u^T (U, U) and of u y^T (U, D)."""
        writer = self._writer(place.i, layer)
        sums = Moments(writer.weight.shape[1], writer.weight.shape[0], self.walk.device)
        stream = self.streams[place.i - place.before]
        target = self.streams[place.i + 1 + place.after]
        for hidden, aim in zip(stream, target, strict=True):
            if place.channels:
                kept = torch.tensor(place.channels, device=hidden.device)
                hidden, aim = hidden[..., kept], aim[..., kept]
            with capturing(writer) as seen:
                output = self.walk.through(place.i, layer, hidden)
            sums.add(torch.cat(seen).flatten(0, 1), (aim - output).flatten(0, 1))
        return sums

    def _writer(self, i: int, layer: Sublayer) -> nn.Linear:
        """The projection by which a layer in layer i's place writes the stream."""
        family, kind = self.teacher.family, self.teacher.architecture.layers[i].kind
        name = family.writer(kind).name.removeprefix(f"{family.mixers[kind]}.")
        writer = layer.mixer.get_submodule(name.removesuffix(".weight"))
        assert isinstance(writer, nn.Linear)
        return writer

    def _columns(self, i: int, axes: LayerSelection) -> torch.Tensor | None:
        """Channels of layer i's writer that `axes` keep; None for all of them."""
        architecture = self.teacher.architecture
        layer = architecture.layers[i]
        dim = self.teacher.family.writer(layer.kind).dims[-1]
        return dim_index(dim, axis_sizes(architecture, layer), axes)

    def _has_inner_norm(self, i: int) -> bool:
        kind = self.teacher.architecture.layers[i].kind
        return any(t.role == "inner_norm" for t in self.teacher.family.layer_tensors[kind])


@torch.no_grad()
def teacher_streams(walk: Walk, ids: torch.Tensor) -> list[Stream]:
    """The stream of ids (B, T) before every layer and after the last one: L + 1 streams."""
    stream = walk.stream(ids)
    streams = [stream.copy()]
    for i in walk.layers():
        stream.advance(lambda hidden, i=i: walk.layer(i, hidden))  # type: ignore[misc]
        streams.append(stream.copy())
    return streams


class Cache(Generic[Value]):
    """The values asked for last, as many as fit in `limit` bytes (one always does)."""

    def __init__(self, limit: int, size: Callable[[Value], int]) -> None:
        self.limit, self._size = limit, size
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of a key, made where it is not there."""
        if key not in self._values:
            self._values[key] = make()
            self.bytes += self._size(self._values[key])
        self._values.move_to_end(key)
        while self.bytes > self.limit and len(self._values) > 1:
            self.bytes -= self._size(self._values.popitem(last=False)[1])
        return self._values[key]


def _bytes_of_sums(sums: Moments) -> int:
    return sums.gram.nbytes + sums.cross.nbytes


def _bytes_of_layer(layer: Sublayer) -> int:
    """Of its parameters; those shared with the teacher are counted too."""
    return sum(p.nbytes for p in layer.mixer.parameters())
