"""Scores of layers and units: fast ways against plain ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minipuzzle import model
from minipuzzle.errors import UserError
from minipuzzle.metrics import CONTROLS, LAYER_METRICS, LayerMetric
from minipuzzle.prune import headsurgeon, meters, reference, score, surgeon, sweep
from minipuzzle.prune.iterative import Iteration
from minipuzzle.scores import Removal, Scores, control
from minipuzzle.selection import Selection
from minipuzzle.streaming import stream
from minipuzzle.walk import Walk
from tests.tiny import write_tiny

IDS = torch.randint(0, 97, (7, 24), generator=torch.Generator().manual_seed(2))
ONE_SEQUENCE = 9 * 24 * 32 * 4  # bytes of one sequence and all its variants


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> model.Model:
    return model.load(write_tiny(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def scores(teacher: model.Model) -> Scores:
    return score.score(teacher, IDS, {"seed": 0}, metrics=LAYER_METRICS)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> model.Model:
    return model.load(write_tiny(tmp_path_factory.mktemp("models") / "llama", family="llama"))


@pytest.mark.parametrize("states_bytes", [None, 1, 3 * ONE_SEQUENCE])
@pytest.mark.parametrize("family", ["teacher", "llama"])
def test_one_sweep_is_the_plain_reference(
    family: str, states_bytes: int | None, request: pytest.FixtureRequest
) -> None:
    """All metrics, in one group of sequences and in several, by layers and by blocks."""
    parent: model.Model = request.getfixturevalue(family)
    units = parent.family.removable(parent.architecture)
    plain = reference.layer_scores_reference(parent, IDS)
    swept = score.score(
        parent, IDS, {}, metrics=LAYER_METRICS, unit_metrics=(), states_bytes=states_bytes
    )
    assert set(plain) == set(swept.layers) == set(LAYER_METRICS)
    for metric, values in plain.items():
        for u, layers in enumerate(units):
            own = swept.layers[metric][list(layers)]
            torch.testing.assert_close(own, values[u].expand(len(layers)), rtol=1e-4, atol=1e-7)
        assert len(set(values.tolist())) == len(units)


def test_metrics_are_the_formulas_on_stock_logits(teacher: model.Model, scores: Scores) -> None:
    """Layer 4 taken out of the stock model by hand."""
    stock: Any = teacher.module
    with torch.no_grad():
        full = stock(IDS, use_cache=False, output_hidden_states=True)
        cut = model.clone(teacher)
        without: Any = cut.module
        without.model.layers[4].mixer.down_proj.weight.zero_()
        lacks = without(IDS, use_cache=False)
    p, q = full.logits.log_softmax(-1), lacks.logits.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    logit_mse = (full.logits - lacks.logits).square().sum() / full.logits.square().sum()
    before, after = full.hidden_states[4], full.hidden_states[5]
    cosine = 1 - torch.nn.functional.cosine_similarity(before, after, dim=-1).mean()
    for metric, value in {"kl": kl, "logit_mse": logit_mse, "cosine": cosine}.items():
        torch.testing.assert_close(scores.layers[metric][4].float(), value, rtol=1e-4, atol=1e-7)


def test_only_what_was_asked_for_is_computed(
    teacher: model.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {"head": 0, "layer": 0}
    logits, layer = Walk.logits, Walk.layer

    def counted_logits(*args: Any) -> torch.Tensor:
        calls["head"] += 1
        return logits(*args)

    def counted_layer(*args: Any) -> torch.Tensor:
        calls["layer"] += 1
        return layer(*args)

    monkeypatch.setattr(Walk, "logits", counted_logits)
    monkeypatch.setattr(Walk, "layer", counted_layer)
    score.score(teacher, IDS, {}, metrics=("hidden_mse",), unit_metrics=())
    assert calls == {"head": 0, "layer": 7 * 8 // 2}
    score.score(teacher, IDS, {}, metrics=("cosine",), unit_metrics=())
    assert calls == {"head": 0, "layer": 28 + 7}
    score.score(teacher, IDS, {}, metrics=("kl",), unit_metrics=())
    assert calls["head"] == 8


def test_a_streamed_model_has_the_scores_of_a_resident_one(
    teacher: model.Model, scores: Scores
) -> None:
    streamed = stream(teacher.folder, dtype=torch.float32, device="cpu")
    for states_bytes in (None, 3 * ONE_SEQUENCE):
        other = score.score(streamed, IDS, {}, metrics=LAYER_METRICS, states_bytes=states_bytes)
        assert_same(other, scores)


def assert_same(other: Scores, scores: Scores) -> None:
    assert other.layers.keys() == scores.layers.keys()
    assert other.units.keys() == scores.units.keys()
    for metric, values in scores.layers.items():
        torch.testing.assert_close(other.layers[metric], values, rtol=1e-5, atol=1e-9)
    for key, values in scores.units.items():
        torch.testing.assert_close(other.units[key], values, rtol=1e-5, atol=1e-9)
    for metric, values in scores.hidden.items():
        torch.testing.assert_close(other.hidden[metric], values, rtol=1e-5, atol=1e-9)


def test_scores_do_not_depend_on_order_or_groups_of_sequences(
    teacher: model.Model, scores: Scores
) -> None:
    assert_same(score.score(teacher, IDS.flip(0), {}, metrics=LAYER_METRICS), scores)
    few = score.score(
        teacher, IDS, {}, metrics=LAYER_METRICS, layer_sequences=7, states_bytes=ONE_SEQUENCE
    )
    assert_same(few, scores)


def test_layers_see_some_sequences_and_units_all(teacher: model.Model, scores: Scores) -> None:
    few = score.score(teacher, IDS, {}, metrics=LAYER_METRICS, layer_sequences=3)
    plain = reference.layer_scores_reference(teacher, IDS[:3])
    torch.testing.assert_close(few.layers["kl"], plain["kl"], rtol=1e-4, atol=1e-7)
    assert_same(replace(few, layers=scores.layers), scores)


def test_published_scores_are_the_formulas(teacher: model.Model, scores: Scores) -> None:
    """Mean over the sequence, L2 over sequences: of relu^2(X W1^T), of the x rows of in_proj."""
    stock: Any = teacher.module
    hidden = stock(IDS, output_hidden_states=True).hidden_states

    def holds(key: tuple[int, str], expected: torch.Tensor) -> None:
        found = scores.units[*key, "activation"].float()
        torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-6)

    ffn, mamba, attention = stock.model.layers[1], stock.model.layers[0], stock.model.layers[3]
    act = torch.relu(ffn.mixer.up_proj(ffn.norm(hidden[1]))).square()
    holds((1, "width"), act.mean(1).square().sum(0).sqrt())
    x = mamba.mixer.in_proj(mamba.norm(hidden[0]))[..., 64:128].abs().mean(1)
    channels = x.square().sum(0).reshape(8, 8)
    holds((0, "heads"), channels.sum(1).sqrt())
    holds((0, "head_dim"), channels.sum(0).sqrt())
    holds((0, "groups"), channels.reshape(2, -1).sum(1).sqrt())
    read = inputs_of(attention.mixer.o_proj, teacher).abs().mean(1).square().sum(0).reshape(4, 8)
    holds((3, "query_heads"), read.sum(1).sqrt())
    holds((3, "kv_heads"), read.reshape(2, -1).sum(1).sqrt())
    norms = [block.norm(hidden[i]).abs().mean(1) for i, block in enumerate(stock.model.layers)]
    expected = torch.stack([mean.square().sum(0).sqrt() for mean in norms]).sum(0)
    found = scores.hidden["activation"].float()
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-6)


def inputs_of(module: torch.nn.Module, teacher: model.Model) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        teacher.module(IDS, use_cache=False)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize(
    ("i", "writer", "axes"),
    [
        (1, "down_proj", {"width": (48,)}),
        (0, "out_proj", {"heads": (8, 8), "groups": (2, 32)}),
        (3, "o_proj", {"query_heads": (4, 8), "kv_heads": (2, 16)}),
    ],
)
def test_energy_and_flap_are_of_what_the_writer_reads(
    teacher: model.Model, scores: Scores, i: int, writer: str, axes: dict[str, tuple[int, ...]]
) -> None:
    stock: Any = teacher.module
    module = getattr(stock.model.layers[i].mixer, writer)
    read = inputs_of(module, teacher).flatten(0, 1).double()
    column = module.weight.detach().double().square().sum(0)
    energy, flap = read.square().mean(0) * column, read.var(0) * column
    for axis, shape in axes.items():
        for metric, values in {"energy": energy, "flap": flap}.items():
            expected = values.reshape(shape[0], -1).sum(1).sqrt()
            torch.testing.assert_close(scores.units[i, axis, metric], expected, rtol=1e-4, atol=0)


def test_units_of_a_llama_are_found_by_its_table(llama: model.Model) -> None:
    found = score.score(llama, IDS, {}, metrics=())
    axes = {0: {"query_heads": 4, "kv_heads": 2}, 1: {"width": 48}}
    for i in range(6):
        assert {a for j, a, _ in found.units if j == i} == axes[i % 2].keys()
    for (i, axis, _), values in found.units.items():
        assert len(values) == axes[i % 2][axis] and bool((values >= 0).all())
    stock: Any = llama.module
    module = stock.model.layers[1].mlp.down_proj
    read, column = inputs_of(module, llama).flatten(0, 1), module.weight.detach().square().sum(0)
    energy = (read.square().mean(0) * column).sqrt()
    torch.testing.assert_close(found.units[3, "width", "energy"].float(), energy, rtol=1e-4, atol=0)
    assert found.hidden["energy"].shape == (32,)


def test_iterative_removal_takes_whole_blocks(llama: model.Model) -> None:
    two = Iteration("kl", lambda gone: len(gone) >= 4)
    found = score.score(llama, IDS, {}, unit_metrics=(), iterative=two)
    assert len(found.removals) == 2
    assert all(b == a + 1 and a % 2 == 0 for a, b in found.removal_order)
    first = found.removals[0]
    assert first.scores == tuple(found.layers["kl"].tolist())


def test_energy_of_hidden_channels_counts_all_that_reads_them(
    teacher: model.Model, scores: Scores
) -> None:
    stock: Any = teacher.module
    hidden = stock(IDS, output_hidden_states=True).hidden_states
    readers = {"in_proj", "q_proj", "k_proj", "v_proj", "up_proj"}
    total = torch.zeros(32)
    for i, block in enumerate(stock.model.layers):
        power = block.norm(hidden[i]).square().mean((0, 1))
        for name, module in block.mixer.named_children():
            if name in readers:
                total += (power * module.weight.square().sum(0)).detach()
    torch.testing.assert_close(scores.hidden["energy"].float(), total.sqrt(), rtol=1e-4, atol=1e-6)


def test_surgeon_scores_need_enough_tokens(teacher: model.Model, scores: Scores) -> None:
    assert scores.units[1, "width", "surgeon"].sort().values.tolist() == list(range(48))
    assert scores.units[0, "heads", "surgeon"].sort().values.tolist() == list(range(8))
    assert scores.units[3, "kv_heads", "surgeon"].sort().values.tolist() == [0, 1]
    few = score.score(teacher, IDS[:3], {}, metrics=())
    assert (1, "width", "surgeon") not in few.units and (3, "query_heads", "surgeon") in few.units
    stock: Any = teacher.module
    module = stock.model.layers[1].mixer.down_proj
    read = inputs_of(module, teacher).flatten(0, 1)
    order = surgeon.surgeon_scores(read.T @ read, module.weight)
    assert torch.equal(order, scores.units[1, "width", "surgeon"])


def test_the_head_surgeon_is_the_plain_greedy_choice() -> None:
    """Against trying every remaining head and re-fitting the others by least squares, fp64."""
    generator = torch.Generator().manual_seed(7)
    read = torch.randn(90, 12, generator=generator, dtype=torch.float64)
    read[:, 5] = read[:, 1] + 0.3 * read[:, 2]
    weight = torch.randn(3, 12, generator=generator, dtype=torch.float64)
    moments = read.T @ read
    damped = moments + surgeon.DAMPING * moments.diagonal().mean() * torch.eye(12).double()
    columns = torch.randperm(12, generator=generator).reshape(4, 3)

    def cost(heads: list[int]) -> float:
        kept = columns[heads].flatten().tolist()
        rest = weight.clone()
        if kept:
            fitted = torch.linalg.solve(damped[kept][:, kept], damped[kept] @ weight.T)
            rest[:, kept] -= fitted.T
        return float(torch.trace(rest @ damped @ rest.T))

    left, expected = list(range(4)), torch.zeros(4, dtype=torch.float64)
    for place in range(4):
        worst = min(left, key=lambda j: cost([k for k in left if k != j]))
        expected[worst] = place
        left.remove(worst)
    inverse = headsurgeon.damped_inverse(moments)
    assert torch.equal(headsurgeon.head_surgeon_scores(inverse, weight, columns), expected)


def test_second_moments_of_one_layer_live_at_a_time(
    teacher: model.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    import weakref

    made: list[weakref.ref[torch.Tensor]] = []
    init = meters.Meter.__init__

    def watched(self: meters.Meter, *args: Any, **kwargs: Any) -> None:
        alive = [ref for ref in made if ref() is not None]
        assert len(alive) <= 1, "an earlier layer's second moments are still there"
        init(self, *args, **kwargs)
        if len(self.moments):
            made.append(weakref.ref(self.moments))

    monkeypatch.setattr(meters.Meter, "__init__", watched)
    score.score(teacher, IDS, {}, metrics=())
    assert len(made) == 7


@pytest.mark.parametrize("metric", LAYER_METRICS)
def test_iterative_removal_scores_again_against_the_uncut_model(
    teacher: model.Model, metric: LayerMetric
) -> None:
    """Against the plain way: every choice by forward passes under selections."""
    found = score.score(
        teacher,
        IDS,
        {},
        metrics=("hidden_mse",),
        unit_metrics=(),
        iterative=Iteration(metric, lambda gone: len(gone) >= 4),
        states_bytes=3 * ONE_SEQUENCE,
    )
    assert len(found.removal_order) == 4
    walk, gone = Walk(teacher), frozenset[int]()
    with torch.no_grad():
        for step in found.removals:
            plain = [
                None if i in gone else _worth(walk, metric, gone, i) for i in range(walk.num_layers)
            ]
            for ours, theirs in zip(step.scores, plain, strict=True):
                assert (ours is None) == (theirs is None)
                if ours is not None and theirs is not None:
                    assert ours == pytest.approx(theirs, rel=2e-3, abs=1e-6)
            kinds = [layer.kind for layer in teacher.architecture.layers]
            able = [
                i
                for i in range(7)
                if i not in gone
                and any(k == kinds[i] for j, k in enumerate(kinds) if j not in gone | {i})
            ]
            lowest = min(able, key=lambda i: step.scores[i] or 0.0)
            assert step.layers == (lowest,)
            gone |= {lowest}


def _worth(walk: Walk, metric: LayerMetric, gone: frozenset[int], i: int) -> float:
    def states(out: frozenset[int]) -> list[torch.Tensor]:
        entered = [walk.embed(IDS)]
        for j in range(walk.num_layers):
            entered.append(entered[-1] if j in out else walk.layer(j, entered[-1]))
        return [*entered, walk.final(entered[-1])]

    whole, cut = states(frozenset()), states(gone | {i})
    if metric == "hidden_mse":
        return float((whole[-1] - cut[-1]).square().mean())
    if metric == "cosine":
        now = states(gone)
        cosine = torch.nn.functional.cosine_similarity(now[i], now[i + 1], dim=-1)
        return float(1 - cosine.mean())
    a, b = walk.logits(whole[-1]), walk.logits(cut[-1])
    if metric == "logit_mse":
        return float((a - b).square().sum() / a.square().sum())
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_iterative_removal_stops_where_nothing_may_go(teacher: model.Model) -> None:
    with pytest.raises(UserError, match="has taken 4 layers and may take no other"):
        score.score(
            teacher, IDS, {}, unit_metrics=(), iterative=Iteration("kl", lambda gone: False)
        )


def test_scores_survive_the_disk(scores: Scores, tmp_path: Path) -> None:
    step = Removal((3,), (1.0, 2.0, 3.0, 0.5, None, 1.0, 1.0))
    written = replace(scores, removals=(step,))
    written.save(tmp_path)
    again = Scores.load(tmp_path)
    units = {key: values.float() for key, values in scores.units.items()}
    hidden = {metric: values.float() for metric, values in scores.hidden.items()}
    assert_same(again, replace(scores, units=units, hidden=hidden))
    assert again.kinds == scores.kinds and again.removals == (step,)
    assert again.hidden.keys() == scores.hidden.keys()


def test_scores_of_another_model_are_refused(teacher: model.Model, scores: Scores) -> None:
    architecture = teacher.architecture
    made = replace(scores, provenance={"teacher": "abc"})
    made.check(architecture, "abc")
    with pytest.raises(UserError, match="other weights; run `minipuzzle score` again"):
        made.check(architecture, "def")
    narrower = Selection(layers=({}, {"width": tuple(range(40))}, *[{}] * 5)).apply(architecture)
    with pytest.raises(UserError, match="of another model"):
        made.check(narrower)
    with pytest.raises(UserError, match="not scored by kl"):
        replace(scores, layers={}).layer_metric("kl")


@pytest.mark.parametrize("name", CONTROLS)
def test_controls_are_rankings(name: Any) -> None:
    values = control(name, 10, seed=3)
    assert sorted(values.tolist()) == list(range(10))
    assert torch.equal(values, control(name, 10, seed=3))
    if name == "random":
        assert not torch.equal(values, control(name, 10, seed=4))
    best = int(values.argmax())
    assert {"order": best == 0, "reverse": best == 9, "random": True}[name]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("backbone.layers.3.mixer.k_proj.weight", "layer 3 .attention.: .*k_proj.weight holds"),
        ("backbone.layers.2.mixer.A_log", "layer 2 .mamba.: .*A_log holds"),
        ("backbone.embeddings.weight", "embeddings.weight holds"),
        ("lm_head.weight", "lm_head.weight holds"),
    ],
)
def test_bad_weights_are_named(teacher: model.Model, name: str, told: str, bad: float) -> None:
    spoilt = model.clone(teacher)
    spoilt.parameter(name).flatten()[5] = bad
    with pytest.raises(UserError, match=told):
        score.score(spoilt, IDS, {})


def test_a_bad_head_of_a_streamed_model_is_named(tmp_path: Path) -> None:
    """It is loaded only where logits are asked for."""
    spoilt = model.load(write_tiny(tmp_path / "whole"))
    spoilt.parameter("lm_head.weight")[3, 4] = float("nan")
    model.save(spoilt, tmp_path / "spoilt", dtype=torch.float32)
    streamed = stream(tmp_path / "spoilt", dtype=torch.float32, device="cpu")
    assert score.score(streamed, IDS, {}, unit_metrics=()).layers.keys() == {"hidden_mse"}
    with pytest.raises(UserError, match="the head gives NaN"):
        score.score(streamed, IDS, {}, metrics=("logit_mse",), unit_metrics=())


def test_bad_activations_are_named(teacher: model.Model) -> None:
    spoilt = model.clone(teacher)
    spoilt.parameter("backbone.layers.4.mixer.up_proj.weight").mul_(1e25)  # squared: beyond fp32
    with pytest.raises(UserError, match="layer 4 .ffn. gives NaN or infinite activations"):
        score.score(spoilt, IDS, {})


def test_no_text_is_said(teacher: model.Model) -> None:
    with pytest.raises(UserError, match="no calibration text"):
        score.score(teacher, IDS[:0], {})


def test_a_sweep_without_metrics_has_no_variants(teacher: model.Model) -> None:
    walk = Walk(teacher)
    sums = sweep.LayerSums.of(walk, [])
    with torch.no_grad():
        after = sweep.sweep(walk, IDS, sums)
        torch.testing.assert_close(walk.final(next(iter(after))), walk.states(IDS))
    assert sums.scores(32) == {}
