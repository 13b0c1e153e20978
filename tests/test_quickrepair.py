"""The quick repair: its closed form against plain least squares, and what candidates gain by it."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import proxy_correlation
import rank_correlations

from minipuzzle import model
from minipuzzle.errors import UserError
from minipuzzle.prune.moments import Moments
from minipuzzle.prune.refit import capturing
from minipuzzle.search import quickrepair
from minipuzzle.search.proxies import ProxyEvaluator
from minipuzzle.search.quickrepair import Cache, Place, QuickRepair
from minipuzzle.selection import Selection
from minipuzzle.walk import Walk, narrow_layer
from tests.tiny import write_tiny

IDS = torch.randint(0, 97, (40, 32), generator=torch.Generator().manual_seed(3))
RIDGE = 1e-3
WIDTH = {"width": tuple(range(0, 48, 2))}
QUERIES, KV = {"query_heads": (0, 3)}, {"kv_heads": (1,), "query_heads": (2, 3)}
MAMBA = {"heads": (0, 1, 4, 7)}
FEWER_GROUPS = {"groups": (1,), "heads": (4, 5, 6, 7)}

# M - M * - M -
NEMOTRON: dict[str, Selection] = {
    "width": Selection(({}, WIDTH, {}, {}, WIDTH, {}, {})),
    "layer": Selection(({}, {}, None, {}, {}, {}, {})),
    "run": Selection(({}, None, None, None, WIDTH, {}, {})),
    "first": Selection((None, {}, {}, {}, {}, {}, {})),
    "last": Selection(({}, {}, {}, {}, WIDTH, None, None)),
    "heads": Selection((MAMBA, {}, MAMBA, {}, None, MAMBA, {})),
    "groups": Selection((FEWER_GROUPS, {}, {}, {}, {}, {}, {})),
    "queries": Selection(({}, {}, None, QUERIES, {}, {}, {})),
    "stream": Selection(({}, {}, {}, {}, WIDTH, {}, {}), hidden=tuple(range(28))),
}
# three blocks of attention and gated FFN
LLAMA: dict[str, Selection] = {
    "block": Selection(({}, {}, None, None, {}, WIDTH)),
    "last": Selection(({}, {}, KV, WIDTH, None, None)),
}
CASES = [
    *(("nemotron_h", name, cut) for name, cut in NEMOTRON.items()),
    *(("llama", name, cut) for name, cut in LLAMA.items()),
]
CASE_IDS = [f"{family}-{name}" for family, name, _ in CASES]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, model.Model]:
    root = tmp_path_factory.mktemp("models")
    names = ("nemotron_h", "llama")
    return {name: model.load(write_tiny(root / name, family=name)) for name in names}


@pytest.fixture(scope="module")
def makers(teachers: dict[str, model.Model]) -> dict[str, QuickRepair]:
    return {name: QuickRepair(teacher, IDS) for name, teacher in teachers.items()}


def streams(teacher: model.Model) -> list[torch.Tensor]:
    """The teacher's stream before every layer and after the last, (B, T, D) each."""
    walk = Walk(teacher)
    found = [walk.embed(IDS)]
    for i in range(walk.num_layers):
        found.append(walk.layer(i, found[-1]))
    return found


def least_squares(teacher: model.Model, selection: Selection, i: int) -> torch.Tensor:
    """Output of layer i on the calibration text after a direct fit of its writer, (B, T, D)."""
    h, kept = streams(teacher), list(selection.kept)
    if selection.hidden:
        h = [hidden[..., list(selection.hidden)] for hidden in h]
    before = h[kept[kept.index(i) - 1] + 1] if i != kept[0] else h[0]
    after = h[-1] if i == kept[-1] else h[i + 1]
    layer = narrow_layer(teacher, i, selection.layers[i] or {}, selection.hidden)
    kind = teacher.architecture.layers[i].kind
    name = teacher.family.writer(kind).name.removesuffix(".weight").rpartition(".")[2]
    writer: Any = layer.mixer.get_submodule(name)
    walk = Walk(teacher)
    with capturing(writer) as seen:
        walk.through(i, layer, before)
    u = torch.cat(seen).flatten(0, 1).double()
    y = (after - before).flatten(0, 1).double()
    pull = (RIDGE * u.square().sum(0).mean()).sqrt()
    rows = torch.cat([u, pull * torch.eye(u.shape[1], dtype=torch.float64)])
    wanted = torch.cat([y, pull * writer.weight.double().T])
    fitted = torch.linalg.lstsq(rows, wanted).solution
    output: torch.Tensor = before + (u @ fitted).reshape(before.shape).float()
    return output


@pytest.mark.parametrize(("family", "name", "cut"), CASES, ids=CASE_IDS)
@torch.no_grad()
def test_layers_are_those_of_a_direct_least_squares(
    teachers: dict[str, model.Model],
    makers: dict[str, QuickRepair],
    family: str,
    name: str,
    cut: Selection,
) -> None:
    teacher, maker = teachers[family], makers[family]
    h, fitted = streams(teacher), 0
    if cut.hidden:
        h = [hidden[..., list(cut.hidden)] for hidden in h]
    for i in cut.kept:
        place = Place.of(teacher.architecture, cut, i)
        assert place is not None
        stands_on = h[i - place.before]
        output = maker.layer(cut, i)(stands_on)
        if place.untouched:
            assert torch.equal(output, h[i + 1])
            continue
        fitted += 1
        torch.testing.assert_close(output, least_squares(teacher, cut, i), atol=2e-4, rtol=1e-4)
        own = Walk(teacher).layer(i, stands_on, cut.layers[i], cut.hidden)
        aim = h[i + 1 + place.after]
        assert (aim - output).square().sum() < 0.98 * (aim - own).square().sum()
    assert fitted


@pytest.mark.parametrize("family", ["nemotron_h", "llama"])
@torch.no_grad()
def test_keeping_all_gives_the_teachers_layers(
    teachers: dict[str, model.Model], makers: dict[str, QuickRepair], family: str
) -> None:
    teacher, maker = teachers[family], makers[family]
    whole = Selection.identity(teacher.architecture)
    hidden = streams(teacher)
    for i in whole.kept:
        assert torch.equal(maker.layer(whole, i)(hidden[i]), hidden[i + 1])


@pytest.mark.parametrize(("family", "name", "cut"), CASES, ids=CASE_IDS)
def test_repaired_candidates_are_nearer_to_the_teacher(
    teachers: dict[str, model.Model],
    makers: dict[str, QuickRepair],
    family: str,
    name: str,
    cut: Selection,
) -> None:
    teacher = teachers[family]
    whole = Selection.identity(teacher.architecture)
    same, plain = ProxyEvaluator(teacher, IDS)([whole, cut])
    repaired = ProxyEvaluator(teacher, IDS, maker=makers[family])([cut, whole, cut])
    assert repaired[0] == repaired[2]
    assert repaired[0].kl < 0.99 * plain.kl
    assert repaired[1] == same and same.kl == pytest.approx(0, abs=1e-6)


def test_keys_are_equal_where_layers_are(makers: dict[str, QuickRepair]) -> None:
    maker = makers["nemotron_h"]
    whole = Selection.identity(maker.teacher.architecture)
    one, run, last = NEMOTRON["layer"], NEMOTRON["run"], NEMOTRON["last"]
    assert maker.key(one, 2) is None
    assert maker.key(one, 3) != maker.key(whole, 3)  # takes over from layer 2
    assert maker.key(one, 4) == maker.key(whole, 4)
    assert maker.key(NEMOTRON["width"], 4) != maker.key(run, 4)  # same channels, more to take over
    # layer 4 is the last one: it takes over from what came after it
    assert maker.key(last, 4) != maker.key(NEMOTRON["width"], 4)
    # axes that are kept whole do not count
    everything = Selection(({}, {"width": tuple(range(48))}, *({} for _ in range(5))))
    assert maker.key(everything, 1) == maker.key(whole, 1)


def test_teacher_is_left_alone(teachers: dict[str, model.Model]) -> None:
    for family, _, cut in CASES:
        teacher = teachers[family]
        before = {k: v.clone() for k, v in teacher.module.state_dict().items()}
        maker = QuickRepair(teacher, IDS[:4])
        for i in cut.kept:
            maker.layer(cut, i)
        after = teacher.module.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_every_width_is_answered_by_the_same_sums(
    teachers: dict[str, model.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered: list[int] = []

    class Counting(Moments):
        def __init__(self, channels: int, *others: Any) -> None:
            gathered.append(channels)
            super().__init__(channels, *others)

    monkeypatch.setattr(quickrepair, "Moments", Counting)
    maker = QuickRepair(teachers["nemotron_h"], IDS[:4])
    for width in (8, 16, 40):
        maker.fitted(Place(1, (("width", tuple(range(width))),)))
    assert gathered == [48]
    maker.fitted(Place(0, (("heads", (0, 4)),)))  # a norm of the kept heads alone
    assert gathered == [48, 16]


def test_cache_keeps_what_was_asked_for_last() -> None:
    made: list[str] = []

    def make(key: str) -> str:
        made.append(key)
        return key

    cache: Cache[str] = Cache(4, len)
    for key in ("ab", "cd", "ab", "ef", "ab", "cd", "a long one", "ab"):
        assert cache.get(key, lambda key=key: make(key)) == key  # type: ignore[misc]
        assert cache.bytes <= 4 or len(cache) == 1
    assert made == ["ab", "cd", "ef", "cd", "a long one", "ab"]


def test_a_layer_thrown_away_is_made_again(teachers: dict[str, model.Model]) -> None:
    teacher, cut = teachers["nemotron_h"], NEMOTRON["run"]
    small, large = QuickRepair(teacher, IDS, cache_bytes=1), QuickRepair(teacher, IDS)
    hidden = streams(teacher)[1]
    for i in (*cut.kept, *cut.kept):
        assert torch.equal(small.layer(cut, i)(hidden), large.layer(cut, i)(hidden))


def test_infinite_activations_are_an_error(tmp_path: Path) -> None:
    teacher = model.load(write_tiny(tmp_path / "tiny"))
    with torch.no_grad():
        teacher.module.get_parameter("model.layers.1.mixer.up_proj.weight")[4, 3] = torch.inf
    maker = QuickRepair(teacher, IDS[:4])
    with pytest.raises(UserError, match=r"writer of layer 1 .* not finite"):
        maker.layer(NEMOTRON["width"], 1)


def candidates(number: int) -> list[dict[str, Any]]:
    """Records as the script keeps them: the quick repair knows the end, the cut knows nothing."""
    generator = random.Random(0)
    rows: list[dict[str, Any]] = []
    for place in range(number):
        final, noise = generator.random(), generator.random()
        row = {"number": place, "kind": generator.choice("abc"), "final": {"kl": final}}
        for station, kl in (("cut", noise), ("quick", final**2), ("repaired", final)):
            row[station] = {"kl": kl, "accuracy": round(-kl, 1), "agreement": -kl}
        rows.append(row)
    return rows


def test_rank_correlations_are_those_of_scipy() -> None:
    rows = candidates(40)
    found = rank_correlations.correlations(rows, 0)
    assert found["KL, quick repair"] == pytest.approx({"rho": 1, "low": 1, "high": 1})
    assert found["KL as cut"]["low"] < found["KL as cut"]["rho"] < found["KL as cut"]["high"] < 0.8
    accuracy = [-row["cut"]["accuracy"] for row in rows]  # with ties
    expected = spearmanr(accuracy, [row["final"]["kl"] for row in rows]).statistic
    assert found["accuracy as cut"]["rho"] == pytest.approx(expected)
    gain = rank_correlations.difference(rows, 0)
    assert gain["rho"] == pytest.approx(1 - found["KL as cut"]["rho"])
    assert rank_correlations.picks(rows)["KL, full repair"] == {"best_of_1": 0, "best_of_3": 0}


def test_candidates_are_spread_over_both_judgements() -> None:
    rows = candidates(200)
    taken = proxy_correlation.stratified(rows, 24)
    assert len({row["number"] for row in taken}) == 24
    for proxy in ("cut", "quick"):
        ranked = sorted(rows, key=lambda row: float(row[proxy]["kl"]))
        places = [ranked.index(row) for row in taken]
        assert min(places) < 10 and np.percentile(places, 40) < 100
        assert sum(80 <= place < 120 for place in places) >= 4
    numbers = [sum(row["kind"] == kind for row in taken) for kind in "abc"]
    assert max(numbers) - min(numbers) <= 2
