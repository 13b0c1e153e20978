"""Candidates that walk together are what each is alone, and what its checkpoint is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minipuzzle import model
from minipuzzle.model import Model
from minipuzzle.prune.slice import slice_checkpoint
from minipuzzle.search.proxies import Proxies, ProxyEvaluator
from minipuzzle.search.trie import (
    GONE,
    CutMaker,
    Trie,
    decisions,
    node_ratio,
    passes,
    walk_together,
)
from minipuzzle.selection import LayerSelection, Selection
from minipuzzle.streaming import stream
from minipuzzle.walk import Walk
from tests.tiny import write_tiny

IDS = torch.randint(0, 97, (5, 24), generator=torch.Generator().manual_seed(6))
FAMILIES = ("nemotron_h", "llama")
AXES = {
    "mamba": ({}, {"heads": (0, 2, 4, 7)}, {"head_dim": (0, 1, 2, 5)}, {"groups": (1,)}),
    "attention": ({}, {"query_heads": (0, 3)}, {"kv_heads": (1,)}),
    "ffn": ({}, {"width": tuple(range(0, 48, 2))}, {"width": tuple(range(40))}),
}
HIDDEN = (None, tuple(range(0, 32, 2)), tuple(range(24)))


@pytest.fixture(scope="module", params=FAMILIES)
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return model.load(write_tiny(tmp_path_factory.mktemp("tiny") / "m", family=request.param))


def choices(teacher: Model, seed: int, number: int) -> list[Selection]:
    """Random cuts that share beginnings: layers gone, narrowed each in its own way, channels."""
    generator = torch.Generator().manual_seed(seed)

    def draw(most: int) -> int:
        return int(torch.randint(0, most, (), generator=generator))

    units = teacher.family.removable(teacher.architecture)
    found: list[Selection] = []
    for _ in range(number):
        layers: list[LayerSelection | None] = []
        for layer in teacher.architecture.layers:
            options = AXES[layer.kind]
            layers.append(options[max(0, draw(len(options) + 2) - 2)])
        for unit in units:
            if not draw(4):
                for i in unit:
                    layers[i] = None
        if all(axes is None for axes in layers):
            layers = [{} for _ in layers]
        selection = Selection(tuple(layers), HIDDEN[max(0, draw(6) - 3)])
        if found and draw(2):  # begins as an earlier one
            cut = draw(len(layers))
            other = found[draw(len(found))]
            mixed = (*other.layers[:cut], *layers[cut:])
            if any(axes is not None for axes in mixed):
                selection = Selection(mixed, other.hidden)
        found.append(selection)
    return found


@torch.no_grad()
def plain(teacher: Model, selection: Selection, ids: torch.Tensor) -> Proxies:
    """The proxies by definition, from one walk of one candidate and whole distributions."""
    walk = Walk(teacher)
    states = walk.states(ids, selection.completed(teacher.architecture))
    ours = walk.logits(states).log_softmax(-1)
    theirs = teacher.module(ids, use_cache=False).logits.log_softmax(-1)
    kl = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    right = (ours[:, :-1].argmax(-1) == ids[:, 1:]).float().mean()
    same = (ours.argmax(-1) == theirs.argmax(-1)).float().mean()
    return Proxies(float(kl), float(right), float(same), len(ids))


def assert_same(found: Sequence[Proxies], expected: Sequence[Proxies]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.kl == pytest.approx(other.kl, rel=1e-4, abs=1e-6)
        assert one.accuracy == pytest.approx(other.accuracy, abs=0.02)  # ties after rounding
        assert one.agreement == pytest.approx(other.agreement, abs=0.02)
        assert one.blocks == other.blocks


@pytest.mark.parametrize("seed", range(3))
def test_together_is_one_by_one(teacher: Model, seed: int) -> None:
    selections = choices(teacher, seed, 12)
    assert node_ratio(selections) < 0.9  # there is something to share
    evaluate = ProxyEvaluator(teacher, IDS)
    assert_same(evaluate(selections), [plain(teacher, each, IDS) for each in selections])
    assert_same(evaluate(selections), [evaluate([each])[0] for each in selections])


@torch.no_grad()
def test_a_candidate_is_its_sliced_checkpoint(teacher: Model, tmp_path: Path) -> None:
    """Uniform cuts, which a checkpoint can hold, with hidden channels among them."""
    units = teacher.family.removable(teacher.architecture)
    width, heads = {"width": tuple(range(0, 48, 3))}, {"heads": (0, 3, 4, 6)}
    axes: dict[str, LayerSelection] = {"mamba": heads, "attention": {}, "ffn": width}
    layers = [
        None if i in units[1] else axes[x.kind] for i, x in enumerate(teacher.architecture.layers)
    ]
    evaluate = ProxyEvaluator(teacher, IDS)
    for place, hidden in enumerate(HIDDEN):
        selection = Selection(tuple(layers), hidden)
        folder = tmp_path / str(place)
        slice_checkpoint(teacher.folder, folder, selection)
        ours = model.load(folder).module(IDS, use_cache=False).logits
        theirs = teacher.module(IDS, use_cache=False).logits.log_softmax(-1)
        kl = (theirs.exp() * (theirs - ours.log_softmax(-1))).sum(-1).mean()
        assert evaluate([selection])[0].kl == pytest.approx(float(kl), rel=1e-4)
        walk = Walk(teacher)
        torch.testing.assert_close(
            walk.logits(walk.states(IDS, selection)), ours, atol=1e-4, rtol=1e-3
        )


def test_the_teacher_is_itself(teacher: Model) -> None:
    whole = ProxyEvaluator(teacher, IDS)([Selection.identity(teacher.architecture)])[0]
    assert whole.kl == pytest.approx(0, abs=1e-7) and whole.agreement == 1


def test_memory_bound_changes_nothing(teacher: Model) -> None:
    selections = choices(teacher, 7, 9)
    expected = ProxyEvaluator(teacher, IDS)(selections)
    for state_bytes in (1, 3 * 24 * 32 * 4, 8 * 24 * 32 * 4):
        evaluate = ProxyEvaluator(teacher, IDS, state_bytes=state_bytes)
        assert_same(evaluate(selections), expected)


def test_some_sequences_and_no_candidates(teacher: Model) -> None:
    evaluate = ProxyEvaluator(teacher, IDS)
    selections = choices(teacher, 1, 4)
    expected = [plain(teacher, each, IDS[1:3]) for each in selections]
    assert_same(evaluate(selections, blocks=slice(1, 3)), expected)
    assert evaluate([]) == []


def test_a_streamed_model_gives_the_same(teacher: Model) -> None:
    selections = choices(teacher, 5, 6)
    streamed = stream(teacher.folder, dtype=torch.float32, device="cpu")
    found = ProxyEvaluator(streamed, IDS)(selections)
    assert_same(found, ProxyEvaluator(teacher, IDS)(selections))


def test_nodes_by_hand() -> None:
    """Three layers: A keeps all, B lacks the last, C narrows the middle, D lacks the first."""
    narrow: LayerSelection = {"width": (0, 1)}
    a, b = Selection(({}, {}, {})), Selection(({}, {}, None))
    c, d = Selection(({}, narrow, {})), Selection((None, {}, {}))
    # layer 0: one node; 1: after it whole and narrow, and whole on the embedding; 2: a, c, d
    trie = Trie.of(decisions([a, b, c, d]))
    assert trie.nodes == 1 + 3 + 3
    assert node_ratio([a, b, c, d]) == pytest.approx(7 / (3 + 2 + 3 + 2))
    assert node_ratio([a, a]) == pytest.approx(1 / 2)
    other_stream = Selection(a.layers, hidden=(0, 1))
    assert Trie.of(decisions([a, other_stream])).nodes == 6
    # whole and narrow are one step each at layer 1, whatever comes before
    assert [len(level) for level in trie.levels] == [1, 2, 1]


def test_axes_kept_whole_do_not_count(teacher: Model) -> None:
    layers = teacher.architecture.layers
    i = next(i for i, layer in enumerate(layers) if layer.kind == "ffn")
    axes: list[LayerSelection] = [{} for _ in layers]
    axes[i] = {"width": tuple(range(48))}
    same = [Selection.identity(teacher.architecture), Selection(tuple(axes))]
    key = CutMaker(Walk(teacher)).key
    assert node_ratio(same, key) == 0.5 and node_ratio(same) > 0.5


@torch.no_grad()
def test_each_node_runs_once(teacher: Model) -> None:
    """Sequences that pass through layers are those of the trie's nodes, and layers are made once
    for all prefixes that decide alike."""
    selections, rows, made = choices(teacher, 2, 8), 0, []

    class Counting(CutMaker):
        def layer(self, selection: Selection, i: int):  # type: ignore[no-untyped-def]
            made.append((i, self.key(selection, i)))
            inner = super().layer(selection, i)

            def counted(hidden: torch.Tensor) -> torch.Tensor:
                nonlocal rows
                rows += len(hidden)
                return inner(hidden)

            return counted

    walk = Walk(teacher, tokens_per_chunk=3 * IDS.shape[1])
    maker = Counting(walk)
    trie = Trie.of(decisions(selections, maker.key))
    walk_together(walk, selections, trie, IDS, maker)
    assert rows == len(IDS) * trie.nodes
    assert len(made) == len(set(made))


def test_order_keeps_beginnings_together() -> None:
    narrow: LayerSelection = {"width": (0,)}
    mixed = [Selection(({}, {})), Selection((narrow, {})), Selection(({}, None))]
    rows = decisions(mixed)
    assert rows == [(0, 0, 0), (0, 1, 0), (0, 0, GONE)]
    assert sorted(range(3), key=rows.__getitem__) == [2, 0, 1]


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.integers(1, 20),
    candidates=st.integers(1, 20),
    chunk=st.integers(1, 8),
    room=st.integers(1, 100),
)
def test_passes_cover_everything_once_under_the_bound(
    rows: int, candidates: int, chunk: int, room: int
) -> None:
    found = list(passes(rows, candidates, row_bytes=10, chunk_rows=chunk, state_bytes=10 * room))
    pairs = [
        (r, c) for part, group in found for r in range(rows)[part] for c in range(candidates)[group]
    ]
    assert sorted(pairs) == [(r, c) for r in range(rows) for c in range(candidates)]
    least = min(chunk, rows)  # a layer's own chunk of one candidate goes through in any case
    for part, group in found:
        size = len(range(rows)[part]) * len(range(candidates)[group])
        assert size <= max(room, least)
