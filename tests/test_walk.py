"""The walk equals the stock forward pass, for every family, resident and streamed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from minipuzzle.model import load
from minipuzzle.streaming import stream
from minipuzzle.streams import Stream
from minipuzzle.walk import Walk, narrow_layer
from tests.tiny import write_tiny

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 3,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "intermediate_size": 40,
}
MODELS = {"nemotron_h": {}, "llama": LLAMA, "tied": {**LLAMA, "tie_word_embeddings": True}}


@pytest.fixture(params=sorted(MODELS))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "m", **MODELS[request.param])


IDS = torch.randint(0, 97, (5, 24), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_walk_is_the_stock_forward(folder: Path) -> None:
    model = load(folder)
    walk = Walk(model, tokens_per_chunk=48)
    hidden = walk.embed(IDS)
    for i in walk.layers():
        hidden = walk.layer(i, hidden)
    torch.testing.assert_close(walk.logits(walk.final(hidden)), model.module(IDS).logits)


@torch.no_grad()
def test_streamed_is_resident_bit_for_bit(folder: Path) -> None:
    here, there = Walk(load(folder)), Walk(stream(folder, dtype=torch.float32, device="cpu"))
    states = [walk.stream(IDS) for walk in (here, there)]
    for walk, own in zip((here, there), states, strict=True):
        for i in walk.layers():
            own.advance(partial(walk.layer, i))
    for one, other in zip(*states, strict=True):
        assert torch.equal(here.logits(here.final(one)), there.logits(there.final(other)))
    assert there.streamed and all(p.is_meta for p in there.model.layer(0).parameters())


def test_layers_leave_the_device_when_a_walk_is_broken_off(folder: Path) -> None:
    walk = Walk(stream(folder, dtype=torch.float32, device="cpu"))
    with pytest.raises(RuntimeError, match="stop"):
        for _ in walk.layers():
            raise RuntimeError("stop")
    assert all(p.is_meta for i in range(walk.num_layers) for p in walk.model.layer(i).parameters())


def test_narrowing_to_everything_is_the_layer(folder: Path) -> None:
    model = load(folder)
    walk = Walk(model)
    hidden = walk.embed(IDS)
    for i, layer in enumerate(model.architecture.layers):
        axis = {"ffn": "width", "attention": "kv_heads", "mamba": "heads"}[layer.kind]
        sublayer = narrow_layer(model, i, {axis: tuple(range(getattr(layer, axis)))})
        context = walk._context(i, hidden)
        torch.testing.assert_close(sublayer(hidden, **context), walk.layer(i, hidden))


def test_a_stream_advances_all_chunks_and_its_copy_stays() -> None:
    chunks = [torch.full((2, 3, 4), float(k)) for k in range(3)]
    states = Stream(chunks, torch.device("cpu"), waiting=True)
    twin = states.copy()
    states.advance(lambda hidden: hidden + 1)
    assert [float(chunk.mean()) for chunk in states] == [1.0, 2.0, 3.0]
    assert [float(chunk.mean()) for chunk in twin] == [0.0, 1.0, 2.0]
