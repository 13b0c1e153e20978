"""The scan for GPUs, on the CPU: its arithmetic does not depend on the device."""

from __future__ import annotations

import copy
import gc
import sys
import types
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from minipuzzle import fastscan, gpuscan
from minipuzzle.model import load
from minipuzzle.ssd import ssd_reference
from tests.tiny import write_tiny


@pytest.mark.parametrize("tokens", [1, 16, 77])
def test_scan_is_the_recurrence(tokens: int) -> None:
    torch.manual_seed(tokens)
    batch, heads, width, groups, state = 2, 6, 4, 2, 8
    x = torch.randn(batch, tokens, heads, width)
    dt = 2 * torch.rand(batch, tokens, heads)
    a = -16 * torch.rand(heads)  # strong decays: exp above the diagonal would overflow
    b, c = torch.randn(2, batch, tokens, groups, state)
    d = torch.randn(heads)
    expected, _ = ssd_reference(*(t.double() for t in (x, dt, a, b, c, d)))
    got = gpuscan.scan(x, dt, a, b, c, d, chunk=16)
    assert torch.allclose(got.double(), expected, rtol=1e-4, atol=1e-4)


def test_scan_takes_strided_views() -> None:
    torch.manual_seed(0)
    mixed = torch.randn(2, 40, 24 + 16 + 16)
    x, b, c = mixed.tensor_split((24, 40), -1)
    shapes = x.view(2, 40, 6, 4), b.view(2, 40, 2, 8), c.view(2, 40, 2, 8)
    dt, a, d = torch.rand(2, 40, 6), -torch.rand(6), torch.randn(6)
    args = shapes[0], dt, a, shapes[1], shapes[2], d
    expected = gpuscan.scan(*(t.contiguous() for t in args), chunk=8)
    assert torch.equal(gpuscan.scan(*args, chunk=8), expected)


def _stock(module: Any) -> None:
    for part in module.modules():
        vars(part).pop("forward", None)


@pytest.mark.parametrize("tokens", [1, 2, 50, 128])
def test_installed_model_gives_the_stock_logits(tokens: int, tmp_path: Path) -> None:
    module = load(write_tiny(tmp_path / "model")).module
    ids = torch.randint(0, 97, (2, tokens), generator=torch.Generator().manual_seed(tokens))
    with torch.no_grad():
        fastscan.uninstall(module)
        _stock(module)
        expected = module(ids, use_cache=False).logits
        assert (gpuscan.install(module), gpuscan.install(module)) == (3, 0)
        got = module(ids, use_cache=False).logits
    assert not torch.equal(got, expected) or tokens == 1
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_gradients_caches_and_autocast_take_the_stock_path(tmp_path: Path) -> None:
    module = load(write_tiny(tmp_path / "model")).module
    ids = torch.randint(0, 97, (1, 20), generator=torch.Generator().manual_seed(0))
    fastscan.uninstall(module)
    _stock(module)
    module.requires_grad_(True)
    expected = module(ids, use_cache=False).logits
    with torch.no_grad():
        cached = module(ids, use_cache=True).logits
        with torch.autocast("cpu", torch.bfloat16):
            mixed = module(ids, use_cache=False).logits
    gpuscan.install(module)
    got = module(ids, use_cache=False).logits
    assert torch.equal(got, expected) and got.requires_grad
    with torch.no_grad():
        got = module(ids, use_cache=True).logits
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(module(ids, use_cache=False).logits, mixed)
    assert torch.allclose(got, cached, rtol=1e-5, atol=1e-5)


def test_a_dropped_model_is_freed_at_once(tmp_path: Path) -> None:
    module = load(write_tiny(tmp_path / "model")).module
    fastscan.uninstall(module)
    _stock(module)
    gpuscan.install(module)
    twin = copy.deepcopy(module)
    parts = [weakref.ref(part) for part in module.modules() if hasattr(part, "stock")]
    gc.disable()
    try:
        del module
        assert parts and not any(part() is not None for part in parts)
    finally:
        gc.enable()
    assert gpuscan.install(twin) == 0
    gpuscan.uninstall(twin)
    assert not any(hasattr(part, "stock") for part in twin.modules())


@pytest.mark.parametrize("missing", [True, False])
def test_kernels_are_those_that_import(missing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def combined(*args: Any, **kwargs: Any) -> None:
        called.append((len(args), sorted(kwargs)))

    name = "mamba_ssm.ops.triton.ssd_combined"
    module = types.ModuleType(name)
    module.mamba_chunk_scan_combined = combined  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, None if missing else module)
    gpuscan.kernel_scan.cache_clear()
    try:
        run = gpuscan.kernel_scan()
        assert (run is None) == missing
        if run is not None:
            run(*torch.zeros(6))
            assert called == [(6, ["D"])]
    finally:
        gpuscan.kernel_scan.cache_clear()
