"""Prices of channels: layers compete for width by what the model's loss would lose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from minipuzzle import model
from minipuzzle.prune.prices import channel_prices, loss_metrics, widths_by_price
from minipuzzle.prune.surgeon import surgeon_order, surgeon_scores
from tests.tiny import write_tiny

IDS = torch.randint(0, 97, (6, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> model.Model:
    return model.load(write_tiny(tmp_path_factory.mktemp("models") / "tiny"))


def test_metrics_are_the_moments_of_the_stock_models_gradient(teacher: model.Model) -> None:
    states: list[torch.Tensor] = []

    def keep(module: object, args: object, output: torch.Tensor) -> torch.Tensor:
        states.append(output.requires_grad_(True) if not output.requires_grad else output)
        return states[-1]

    handles = [teacher.layer(i).register_forward_hook(keep) for i in range(7)]
    stock: Any = teacher.module
    with torch.enable_grad():
        logits = stock(IDS, use_cache=False).logits[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits, IDS[:, 1:].flatten(), reduction="sum")
        gradients = torch.autograd.grad(loss, states)
    for handle in handles:
        handle.remove()

    for metric, gradient in zip(loss_metrics(teacher, IDS), gradients, strict=True):
        flat = gradient.flatten(0, 1).double()
        torch.testing.assert_close(metric, flat.T @ flat / IDS.numel(), rtol=1e-4, atol=1e-7)


def test_prices_add_up_to_the_loss_of_a_re_fitted_projection() -> None:
    generator = torch.Generator().manual_seed(1)
    read = torch.randn(400, 12, generator=generator).double()
    read[:, 6:] += read[:, :6]
    weight = torch.randn(5, 12, generator=generator).double()
    gram = read.T @ read / len(read)
    order, costs = surgeon_order(gram, weight)
    gone = 4
    kept = sorted(set(range(12)) - set(order[:gone].tolist()))
    wanted = read @ weight.T
    fitted = torch.linalg.lstsq(read[:, kept], wanted).solution
    error = (wanted - read[:, kept] @ fitted).square().sum() / len(read)
    torch.testing.assert_close(costs[:gone].sum(), error, rtol=0.02, atol=0)
    assert surgeon_scores(gram, weight)[order].tolist() == list(range(12))


def test_the_cheapest_channels_of_all_layers_go() -> None:
    prices = {1: torch.tensor([1.0, 5.0, 9.0, 10.0]), 3: torch.tensor([2.0, 1.5, 3.0, 4.0])}
    assert widths_by_price(prices, 8, floor=1) == {1: 4, 3: 4}
    assert widths_by_price(prices, 4, floor=1) == {1: 3, 3: 1}
    assert widths_by_price(prices, 4, floor=2) == {1: 2, 3: 2}


def test_every_ffn_layer_has_a_price_per_channel(teacher: model.Model, tmp_path: Path) -> None:
    prices = channel_prices(teacher, IDS, loss_metrics(teacher, IDS))
    assert {i: len(p) for i, p in prices.items()} == {1: 48, 4: 48, 6: 48}
    assert all(bool((p >= 0).all()) for p in prices.values())
    assert sum(widths_by_price(prices, 100, floor=8).values()) == 100
