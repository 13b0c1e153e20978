"""Memory and plan: against published figures and against tensors that `generate` allocates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minipuzzle import families, model
from minipuzzle.cli import main
from minipuzzle.errors import UserError
from minipuzzle.memory import Deployment, memory
from minipuzzle.plan import plan, render
from minipuzzle.prune.select import select
from minipuzzle.search.listing import published_scores
from tests.test_core import P47, PUBLISHED
from tests.tiny import write_tiny

GIB = 2**30
CURVE = Path(__file__).parent.parent / "recipes" / "nemotron-h-56b-layer-mse.json"


def test_weights_of_the_56b_in_nvfp4_are_the_papers() -> None:
    family, architecture = families.read(PUBLISHED["56B"][0])
    need = memory(architecture, family, Deployment(weights="nvfp4"))
    assert (need.weights + need.embeddings) / GIB == pytest.approx(29.507, abs=5e-4)


def test_the_published_curve_gives_the_released_47b() -> None:
    """9 Mamba, 6 FFN and 5 attention layers removed by hidden MSE (arXiv 2504.03624, figure 9)."""
    _, architecture = families.read(PUBLISHED["56B"][0])
    scores, _ = published_scores(CURVE, architecture)
    chosen = select(scores, architecture, removed={"mamba": 9, "ffn": 6, "attention": 5}, sizes={})
    assert chosen.apply(architecture).pattern == P47


@pytest.mark.parametrize("family", ["nemotron_h", "llama"])
@pytest.mark.parametrize(("batch", "tokens"), [(3, 20), (1, 7)])
def test_caches_are_what_generate_allocates(
    tmp_path: Path, family: str, batch: int, tokens: int
) -> None:
    """scripts/check_memory.py does the same for more models and dtypes, the bundled one too."""
    loaded = model.load(write_tiny(tmp_path / "tiny", family=family))
    ids = torch.randint(2, 97, (batch, tokens - 2))
    stock: Any = loaded.module
    out = stock.generate(
        ids, max_new_tokens=3, min_new_tokens=3, do_sample=False, return_dict_in_generate=True
    )
    sizes = {"kv": 0, "conv": 0, "ssm": 0}
    for layer in out.past_key_values.layers:
        for name, value in vars(layer).items():
            for tensor in _tensors(value):
                if name in ("keys", "values"):
                    sizes["kv"] += tensor.nbytes
                elif "conv" in name:
                    sizes["conv"] += tensor.nbytes
                elif "recurrent" in name:
                    sizes["ssm"] += tensor.nbytes
    bits: Any = dict.fromkeys(("weights", "kv", "state", "conv"), "fp32")
    at = Deployment(context=tokens, batch=batch, **bits)
    need = memory(loaded.architecture, loaded.family, at)
    assert sizes == {"kv": need.kv_cache, "conv": need.conv_state, "ssm": need.ssm_state}
    parameters = sum(p.numel() * 4 for p in stock.parameters())
    assert need.weights + need.embeddings == parameters


def _tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


@pytest.fixture
def folder_56b(tmp_path: Path) -> Path:
    (tmp_path / "56b").mkdir()
    (tmp_path / "56b" / "config.json").write_text(json.dumps(PUBLISHED["56B"][0]))
    return tmp_path / "56b"


def test_plan_of_the_paper(folder_56b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--budget", "31.7GiB", "--context", "1M", "--batch", "1", "--weights", "nvfp4"]
    options += ["--kv", "nvfp4", "--state", "fp32"]
    assert main(["plan", str(folder_56b), *options, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["parameters"] == 56_324_350_464
    assert record["layers"] == {"mamba": 54, "attention": 10, "ffn": 54}
    items = record["memory_bytes"]
    assert items["kv_cache"] == 2**20 * 10 * 2 * 8 * 128 * 4.5 / 8
    assert items["ssm_state"] == 54 * 256 * 64 * 256 * 4
    assert items["total"] == sum(size for name, size in items.items() if name != "total")
    assert record["to_remove_bytes"] == items["total"] - int(31.7 * GIB)
    assert main(["plan", str(folder_56b), *options]) == 0
    text = capsys.readouterr().out
    assert "to remove" in text and max(map(len, text.splitlines())) <= 80


def test_an_infeasible_budget_says_what_binds(
    folder_56b: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = Deployment(context=2**20, weights="nvfp4", kv="bf16")
    with pytest.raises(UserError, match=r"still needs \d.* and kv_cache binds with"):
        plan(str(folder_56b), budget="3GiB", deployment=at)
    assert main(["plan", str(folder_56b), "--budget", "1GiB"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_every_single_step_that_fits_is_minimal(folder_56b: Path) -> None:
    at = Deployment(weights="nvfp4")
    made = plan(str(folder_56b), budget="90%", deployment=at)
    assert made.budget_bytes is not None and {s.action.split()[0] for s in made.steps} >= {"FFN"}
    assert any(step.total <= made.budget_bytes for step in made.steps)
    assert "fits" in render(made)


@pytest.mark.parametrize(
    "options",
    [
        ["--budget", "31.7GB2"],
        ["--budget", "-3GiB"],
        ["--context", "1G"],
        ["--weights", "int3"],
        ["--batch", "0"],
        ["--budget", "0GiB"],
        ["--reserve", "1"],
    ],
)
def test_wrong_options_are_refused(
    folder_56b: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(folder_56b), *options]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in told.err
