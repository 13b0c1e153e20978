"""Many candidates walk through one model together: those that begin alike share computation.

A candidate is a sequence of decisions, one per layer. Candidates whose decisions agree up to a
layer have the same state there, so they form a trie whose nodes are the layers really computed. The
walk goes layer by layer: all prefixes that decide alike there run in one batch through one layer,
narrowed once; a state is dropped after the last layer that reads it.

States of all leaves at once would outgrow the memory for many or long texts: sequences, and then
candidates, are split so that the states alive stay under a bound. Candidates are sorted before, so
that those with long common beginnings stay together.

Shapes: ids (B, T), states (B, T, D) before the final norm; D is narrower for a candidate that cuts
hidden channels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from minipuzzle.architecture import Layer
from minipuzzle.residency import free_bytes
from minipuzzle.selection import Indices, LayerSelection, Selection, with_units_of_groups
from minipuzzle.walk import Walk, narrow_layer

STATE_BYTES = {"cpu": 2**30, "cuda": 16 * 2**30}  # of the states alive, at most

GONE = -1  # in a row of decisions
LayerFunction = Callable[[torch.Tensor], torch.Tensor]
Key = Callable[[Selection, int], Hashable | None]


class Maker(Protocol):
    """Says what layer i of a candidate is."""

    def key(self, selection: Selection, i: int) -> Hashable | None:
        """Equal for equal layers (hidden channels included); None: the layer is gone."""

    def layer(self, selection: Selection, i: int) -> LayerFunction:
        """The layer, its residual included: (B, T, D) -> (B, T, D).

        Asked for once per walk and key, while the teacher's layer i is on the device.
        """


class CutMaker:
    """Layers as they are cut: the kept part of the teacher's, exactly as in a sliced checkpoint."""

    def __init__(self, walk: Walk) -> None:
        self.walk = walk
        self._layers = walk.model.architecture.layers
        self._hidden = walk.model.architecture.hidden

    def key(self, selection: Selection, i: int) -> Hashable | None:
        """What is kept of the layer and of the stream; axes that are kept whole do not count."""
        axes = selection.layers[i]
        if axes is None:
            return None
        return self._channels(selection), tuple(cut_axes(self._layers[i], axes).items())

    def layer(self, selection: Selection, i: int) -> LayerFunction:
        """The narrowed layer."""
        axes = selection.layers[i]
        assert axes is not None
        axes, channels = cut_axes(self._layers[i], axes), self._channels(selection)
        if not axes and channels is None:
            return partial(self.walk.layer, i)
        return partial(self.walk.through, i, narrow_layer(self.walk.model, i, axes, channels))

    def _channels(self, selection: Selection) -> Indices | None:
        whole = selection.hidden is None or len(selection.hidden) == self._hidden
        return None if whole else selection.hidden


def cut_axes(layer: Layer, axes: LayerSelection) -> LayerSelection:
    """The axes that lose units, in a fixed order; a choice of groups with the units it implies."""
    completed = with_units_of_groups(layer, axes)
    return {axis: completed[axis] for axis in sorted(completed) if _loses(layer, axis, completed)}


def _loses(layer: Layer, axis: str, axes: LayerSelection) -> bool:
    return len(axes[axis]) < int(getattr(layer, axis))


def plain_key(selection: Selection, i: int) -> Hashable | None:
    """The decision of a selection at layer i as it stands there."""
    axes = selection.layers[i]
    return None if axes is None else (selection.hidden, tuple(axes.items()))


def decisions(selections: Sequence[Selection], key: Key = plain_key) -> list[tuple[int, ...]]:
    """Candidates as rows of numbers: of the stream's channels, then of every layer, GONE or not.

    Equal numbers of a column are equal decisions. Rows that are sorted have common beginnings
    together.
    """
    known: list[dict[Hashable, int]] = [{} for _ in range(1 + len(selections[0].layers))]

    def number(place: int, decision: Hashable | None) -> int:
        return GONE if decision is None else known[place].setdefault(decision, len(known[place]))

    return [
        (
            number(0, ("channels", selection.hidden)),
            *(number(i + 1, key(selection, i)) for i in range(len(selection.layers))),
        )
        for selection in selections
    ]


@dataclass(frozen=True)
class Step:
    """Nodes of the trie at one layer that decide alike.

    `candidate`: one that decides so; `pairs`: (state that enters, state that leaves) of each node.
    """

    candidate: int
    pairs: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Trie:
    """The distinct prefixes of candidates, their states numbered.

    `roots`: a candidate for each choice of the stream's channels; state k is its embedding.
    `levels[i]`: the nodes at layer i. `leaves`: the state of each candidate after the last layer.
    """

    roots: tuple[int, ...]
    levels: tuple[tuple[Step, ...], ...]
    leaves: tuple[int, ...]

    @classmethod
    def of(cls, rows: Sequence[tuple[int, ...]]) -> Trie:
        """The trie of candidates whose `decisions` these are."""
        first = {channels: c for c, (channels, *_) in reversed(list(enumerate(rows)))}
        roots = sorted(first.values())
        place = {rows[c][0]: state for state, c in enumerate(roots)}
        states = [place[channels] for channels, *_ in rows]
        born, levels = len(roots), []
        for column in range(1, len(rows[0])):
            steps: dict[int, tuple[int, dict[int, int]]] = {}
            for c, row in enumerate(rows):
                if row[column] == GONE:
                    continue
                _, pairs = steps.setdefault(row[column], (c, {}))
                if states[c] not in pairs:
                    pairs[states[c]] = born
                    born += 1
                states[c] = pairs[states[c]]
            levels.append(tuple(Step(c, tuple(pairs.items())) for c, pairs in steps.values()))
        return cls(tuple(roots), tuple(levels), tuple(states))

    @property
    def nodes(self) -> int:
        """Layers that are computed."""
        return sum(len(step.pairs) for level in self.levels for step in level)

    def uses(self) -> Counter[int]:
        """How often each state is read by a layer or handed out."""
        readers = (old for level in self.levels for step in level for old, _ in step.pairs)
        return Counter([*readers, *set(self.leaves)])


def node_ratio(selections: Sequence[Selection], key: Key = plain_key) -> float:
    """Layers computed together / layers computed one candidate after another.

    Its inverse bounds the speed-up; what every candidate pays (final norm, head) is not in it.
    """
    alone = sum(len(selection.kept) for selection in selections)
    return Trie.of(decisions(selections, key)).nodes / alone


def room_for_states(device: torch.device) -> int:
    """Bytes that the states of candidates may take on a device, by what is free there now."""
    return min(STATE_BYTES.get(device.type, STATE_BYTES["cpu"]), free_bytes(device) // 3)


def passes(
    rows: int, candidates: int, *, row_bytes: int, chunk_rows: int, state_bytes: int
) -> Iterator[tuple[slice, slice]]:
    """(sequences, candidates) of each walk, so that its states take about `state_bytes` at most.

    Sequences are split first, down to what a layer takes at once: that costs no shared work.
    """
    room = max(1, state_bytes // row_bytes)  # sequences of any candidates
    part = max(min(chunk_rows, rows), min(rows, room // candidates), 1)
    group = max(1, room // part)
    for start in range(0, rows, part):
        for first in range(0, candidates, group):
            yield slice(start, min(rows, start + part)), slice(first, first + group)


@torch.no_grad()
def walk_together(
    walk: Walk, selections: Sequence[Selection], trie: Trie, ids: torch.Tensor, maker: Maker
) -> list[torch.Tensor]:
    """States of all candidates after the last layer, (B, T, D) each; equal candidates share one.

    `trie` is of their decisions by the maker's key. A streamed model is read once.
    """
    uses = trie.uses()
    states = {k: walk.embed(ids, selections[c].hidden) for k, c in enumerate(trie.roots)}
    for i in walk.layers():
        for step in trie.levels[i]:
            layer = maker.layer(selections[step.candidate], i)
            _advance(walk, layer, step, states, uses)
    return [states[leaf] for leaf in trie.leaves]


def _advance(
    walk: Walk,
    layer: LayerFunction,
    step: Step,
    states: dict[int, torch.Tensor],
    uses: Counter[int],
) -> None:
    """Run all nodes of a step through its layer, and drop the states that nothing reads any more.

    Rows of several states share a call where one state has fewer than a layer takes at once.
    """
    batch: list[tuple[torch.Tensor, torch.Tensor]] = []  # rows that enter, where the result goes
    size = 0
    rows = walk.rows_per_chunk(next(iter(states.values())).shape[1])
    for old, new in step.pairs:
        entering = states[old]
        states[new] = torch.empty_like(entering)
        uses[old] -= 1
        if not uses[old]:
            del states[old]
        for start in range(0, len(entering), rows):
            part = entering[start : start + rows]
            if size + len(part) > rows:
                _flush(layer, batch)
                size = 0
            batch.append((part, states[new][start : start + rows]))
            size += len(part)
    _flush(layer, batch)


def _flush(layer: LayerFunction, batch: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    if not batch:
        return
    entering = [part for part, _ in batch]
    left = layer(entering[0] if len(entering) == 1 else torch.cat(entering))
    for (_, out), result in zip(
        batch, left.split_with_sizes([len(p) for p in entering]), strict=True
    ):
        out.copy_(result)
    batch.clear()
