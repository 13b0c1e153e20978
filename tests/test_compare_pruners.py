"""The scripts that compare scores and pruners: their arithmetic, without the long runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import ablate_scores
import compare_pruners
import our_cuts
import peer_pruners
import render_scores
from texts import split_blocks

from minipuzzle.errors import UserError
from minipuzzle.families import parameter_count
from minipuzzle.masks import masked
from minipuzzle.metrics import LAYER_METRICS
from minipuzzle.model import Model, load
from minipuzzle.prune.prices import channel_prices, loss_metrics
from minipuzzle.prune.score import score
from minipuzzle.recipe import Recipe, demo_recipe
from minipuzzle.selection import Selection
from tests.tiny import write_tiny


@pytest.fixture
def llama(tmp_path: Path) -> Model:
    return load(write_tiny(tmp_path / "llama", family="llama"))


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 97, (4, 24), generator=torch.Generator().manual_seed(0))


def contest(model: Model, ids: torch.Tensor) -> compare_pruners.Contest:
    scores = score(model, ids, {}, metrics=LAYER_METRICS)
    prices = channel_prices(model, ids, loss_metrics(model, ids))
    return compare_pruners.Contest(model, scores, prices, ids, ids[:2], ids[2:], {"ridge": 1e-3})


def test_block_influence_equals_the_formula_on_the_stock_models_states(
    llama: Model, ids: torch.Tensor
) -> None:
    # the last of the stock model's states has the final norm applied, so it is left out
    states = llama.module(ids, output_hidden_states=True).hidden_states
    expected = [
        1 - torch.cosine_similarity(a, b, dim=-1).mean()
        for a, b in zip(states[:-2], states[1:-1], strict=True)
    ]
    found = peer_pruners.block_influence(llama, llama.family.removable(llama.architecture), ids)
    assert len(found) == len(states) - 1
    torch.testing.assert_close(found[:-1].float(), torch.stack(expected), atol=1e-5, rtol=1e-4)


def test_gradients_are_those_of_the_mean_loss(llama: Model, ids: torch.Tensor) -> None:
    in_parts = peer_pruners.gradients(llama.module, ids, batch=1)
    at_once = peer_pruners.gradients(llama.module, ids, batch=4)
    for name, expected in at_once.items():
        torch.testing.assert_close(in_parts[name], expected, atol=1e-5, rtol=1e-3)
    assert not next(llama.module.parameters()).requires_grad


def test_what_a_pruned_llama_kept_is_read_from_its_rows(llama: Model) -> None:
    selection = Selection(
        ({"query_heads": (0, 3)}, {"width": (1, 4, 7)}) * 2 + ({"query_heads": (1, 2)}, {})
    )
    cut = {"query_heads": (0, 1, 2, 3), "width": tuple(range(48))}
    uniform = Selection(
        tuple(
            {axis: units for axis, units in cut.items() if axis == name} | dict(axes or {})
            for axes, name in zip(selection.layers, ("query_heads", "width") * 3, strict=True)
        )
    )
    pruned: Any = load(llama.folder).module
    for b, block in enumerate(pruned.model.layers):
        heads, width = uniform.layers[2 * b], uniform.layers[2 * b + 1]
        assert heads is not None and width is not None
        rows = [8 * head + d for head in heads["query_heads"] for d in range(8)]
        attention, mlp = block.self_attn, block.mlp
        attention.q_proj.weight = torch.nn.Parameter(attention.q_proj.weight[rows])
        mlp.gate_proj.weight = torch.nn.Parameter(mlp.gate_proj.weight[list(width["width"])])
    assert our_cuts.selection_of(llama, pruned) == uniform


def test_plans_meet_the_share_to_half_a_channel(llama: Model, ids: torch.Tensor) -> None:
    found = contest(llama, ids)
    per_channel = 3 * 32 * 3  # gate, up and down of three blocks
    seen = 0
    for plan in our_cuts.plans(llama.architecture):
        selection = our_cuts.selection_by(llama, found.scores, found.prices, plan, 0.2)
        if selection is None:
            continue
        seen += 1
        left = parameter_count(selection.apply(llama.architecture), llama.family)
        assert abs(left - 0.8 * found.whole) <= per_channel / 2 + 1
        assert len(selection.layers) - len(selection.kept) == 2 * plan.blocks
        if plan.widths is not None:
            student = our_cuts.narrowed(llama, selection)
            assert peer_pruners.size(student.module) == left
            with masked(llama, selection) as module:
                expected = module(ids).logits
            torch.testing.assert_close(student.module(ids).logits, expected, atol=1e-4, rtol=1e-3)
    assert seen >= 4


def test_only_the_best_of_a_method_is_measured_and_recorded(
    llama: Model, ids: torch.Tensor
) -> None:
    found = contest(llama, ids)
    row = {"cut": "widths", "share": 0.2, "method": compare_pruners.OURS, "state": "repaired"}
    found.enter(llama.module, 0.0, **row, how={"name": "uncut"})
    cut = our_cuts.sliced(llama, Selection(({}, {}) * 2 + (None, None)))
    found.enter(cut.module, 0.0, **row, how={"name": "cut"})
    found.measure_best()
    uncut, other = found.rows
    kept = min(found.rows, key=lambda r: float(r["excess_choosing"]))
    assert uncut["excess_choosing"] == pytest.approx(0, abs=1e-6)
    assert ("excess" in uncut, "excess" in other) == (kept is uncut, kept is other)
    figures = compare_pruners.figures(found.rows)
    assert figures == {"loss_excess_ours_20": (kept["excess"], "nats")}


def test_a_later_run_takes_the_place_of_its_own_part_only(
    llama: Model, ids: torch.Tensor, tmp_path: Path
) -> None:
    found, path = contest(llama, ids), tmp_path / "out.json"

    def run(share: float, name: str, texts: dict[str, int]) -> list[str]:
        found.rows.clear()
        row = {"cut": "widths", "share": share, "method": compare_pruners.OURS, "state": "cut"}
        found.enter(llama.module, 0.0, **row, how=name)
        compare_pruners.write(path, "llama", found, texts)
        return [row["how"] for row in json.loads(path.read_text())["rows"]]

    assert run(0.1, "first", {"tokens": 1}) == ["first"]
    assert run(0.2, "second", {"tokens": 1}) == ["first", "second"]
    assert run(0.1, "again", {"tokens": 1}) == ["second", "again"]
    assert run(0.2, "other texts", {"tokens": 2}) == ["other texts"]


@pytest.mark.parametrize(
    ("setting", "share"),
    [
        (peer_pruners.Setting("l2", "all", "uniform"), 0.2),
        (peer_pruners.Setting("taylor", "heads+ffn", "global"), 0.2),
        (peer_pruners.Setting("taylor-joint", "ffn", "uniform"), 0.1),
    ],
)
def test_torch_pruning_cuts_a_llama_to_the_share(
    tmp_path: Path,
    ids: torch.Tensor,
    setting: peer_pruners.Setting,
    share: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("torch_pruning")
    monkeypatch.setattr(peer_pruners, "TOLERANCE", 0.02)  # one channel of so few is much
    folder = write_tiny(tmp_path / "l", family="llama", intermediate_size=400, vocab_size=512)
    model = load(folder)
    grads = peer_pruners.gradients(model.module, ids)
    pruned = peer_pruners.cut_to(model.module, setting, share, grads)
    assert pruned is not None
    removed = 1 - peer_pruners.size(pruned) / peer_pruners.size(model.module)
    assert abs(removed - share) <= peer_pruners.TOLERANCE
    assert torch.isfinite(pruned(ids).logits).all()
    if setting.scope != "all":
        selection = our_cuts.selection_of(model, pruned)
        heads = [len((axes or {}).get("query_heads", ())) for axes in selection.layers[::2]]
        assert heads == [2 if setting.scope == "heads+ffn" else 4] * 3


def test_without_torch_pruning_the_message_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(UserError, match="pip install --no-deps torch-pruning==1.6.1"):
        peer_pruners.torch_pruning()


def test_numbers_of_units_are_the_nearest_and_never_repeat() -> None:
    assert ablate_scores.counts(704) == [70, 141, 211]
    assert ablate_scores.counts(6) == [1, 2]
    assert ablate_scores.counts(2) == [1]
    assert ablate_scores.counts(16, 2) == [2, 4]


def test_every_ranking_of_an_axis_is_measured(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "hybrid"))
    ids = torch.randint(0, 97, (3, 24), generator=torch.Generator().manual_seed(1))
    scores = score(model, ids, {}, metrics=LAYER_METRICS)
    bench = ablate_scores.Bench(model, scores, ids, ids, {}, ids)
    ablate_scores.cut_axis(bench, "query_heads")
    ablate_scores.cut_axis(bench, "hidden")
    by = {row["by"] for row in bench.rows if row["axis"] == "query_heads"}
    assert {"order", "reverse", "random 1", "random 2", "random 3", "energy"} <= by
    assert all(row["kl"] > 0 for row in bench.rows)
    ablate_scores.cut_layers(bench)
    layers = [row for row in bench.rows if row["axis"] == "layers"]
    assert {len(row["layers"]) for row in layers} == {1, 2}
    assert {"hidden_mse", "kl, iterative", "order", "reverse", "random 3"} <= {
        row["by"] for row in layers
    }
    path = tmp_path / "scores.json"
    ablate_scores.write(path, bench, {"search_tokens": 72})
    bench.rows = [row for row in bench.rows if row["axis"] == "hidden"]
    ablate_scores.write(path, bench, {"search_tokens": 72})
    record = json.loads(path.read_text())
    assert {row["axis"] for row in record["rows"]} == {"query_heads", "hidden", "layers"}
    assert len(record["rows"]) == len({(r["axis"], r["by"], r["removed"]) for r in record["rows"]})


def test_tables_put_the_best_score_in_bold_and_average_random_draws() -> None:
    rows = [
        {"axis": "width", "by": by, "removed": n, "units": 40, "state": "cut", "excess": excess}
        for by, n, excess in (
            ("energy", 4, 0.2),
            ("surgeon", 4, 0.1),
            ("energy", 8, 0.3),
            ("surgeon", 8, 0.5),
            ("random 1", 4, 0.4),
            ("random 2", 4, 0.8),
            ("random 1", 8, 0.05),
        )
    ]
    table = render_scores.means(rows)
    assert table["random"] == {4: pytest.approx(0.6), 8: 0.05}
    assert render_scores.best(table, 4) == "surgeon"
    assert render_scores.best(table, 8) == "energy", "a control never wins"
    assert render_scores.best(table) == "energy"
    text = render_scores.axis_table({"rows": rows}, "width")
    assert "| `surgeon` | **+0.1000** | +0.5000 |" in text
    assert "-4 (10 %)" in text
    drawn = render_scores.drawing({"rows": rows})
    assert drawn.count("<svg") == 2
    assert 'class="line surgeon"' in drawn


def test_only_what_stands_between_the_markers_changes() -> None:
    text = "a\n<!-- cuts -->\nold\n<!-- end of cuts -->\nb\n"
    assert render_scores.between(text, "cuts", "new") == text.replace("old", "new")


def test_kept_tokens_are_read_again(tmp_path: Path) -> None:
    class Tokenizer:
        eos_token_id = 0

    recipe = Recipe.load(demo_recipe(), [])
    kept = tmp_path / "texts.safetensors"
    from safetensors.torch import save_file

    save_file({"search": torch.arange(12).reshape(3, 4)}, kept)
    found = split_blocks(recipe, Tokenizer(), {"search": 2}, kept)
    assert found["search"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(UserError, match="less than 4 blocks of search"):
        split_blocks(recipe, Tokenizer(), {"search": 4}, kept)
