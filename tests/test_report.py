"""The report: one page, whatever part of a run there is, self-contained, everything escaped."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipuzzle import families
from minipuzzle.errors import UserError
from minipuzzle.eval.compare import comparison
from minipuzzle.families import parameter_count
from minipuzzle.memory import memory
from minipuzzle.recipe import Recipe
from minipuzzle.report import charts, contest, run, words
from minipuzzle.report.plot import Scale, short
from minipuzzle.runfolder import RunFolder
from minipuzzle.selection import Selection
from tests.tiny import CONFIG

EVIL = "<script>alert('x')</script>\"&"
VOID = {"meta", "link", "br", "hr", "img", "input"}
TEACHER_ANSWERS = {EVIL: dict(enumerate([1.0, 1.0, 1.0, 0.0])), "b": dict(enumerate([1.0, 0.0]))}
STUDENT_ANSWERS = {EVIL: dict(enumerate([1.0, 1.0, 0.0, 0.0])), "b": dict(enumerate([1.0, 0.0]))}


class Page(HTMLParser):
    """Tags, texts and headings of a page; closing tags must match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.headings: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def records(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Stage -> file -> contents of a run that removed layers 1 and 6 and narrowed the FFN."""
    family, teacher = families.read(CONFIG)
    narrow: dict[str, tuple[int, ...]] = {"width": tuple(range(36))}
    selection = Selection(({}, None, {}, {}, narrow, {}, None))
    student = selection.apply(teacher)
    trials = [
        {
            "number": n,
            "point": {"removed.mamba": 0, "removed.attention": 0, "removed.ffn": n, "width": 36},
            "memory_bytes": 200_000 + 1000 * n,
            "parameters": 20_000,
            "latency": None,
            "kl": 0.1 * (n + 1),
            "accuracy": 0.5,
            "agreement": 0.8,
            "blocks": 8,
            "screened": n == 3,
        }
        for n in range(4)
    ]
    played = [finalist(trials[n], rungs, len(teacher.layers)) for n, rungs in FINALISTS]
    steps = [{"kind": "step", "step": i, "loss": 0.5 - 0.1 * i} for i in range(4)]
    measured = [{"kind": "evaluation", "step": i, "kl": 0.5 - 0.1 * i} for i in (0, 4)]
    models = {}
    for name, shape, loss, speed, answers in (
        ("teacher", teacher, 1.0, 50.0, TEACHER_ANSWERS),
        ("student", student, 1.025, 60.0, STUDENT_ANSWERS),
    ):
        sizes = memory(shape, family, recipe.deployment.build()).to_json()
        models[name] = {
            "path": name,
            "parameters": parameter_count(shape, family),
            "memory_bytes": sizes.pop("total"),
            "memory": sizes,
            "bits_per_byte": loss,
            "tasks": {
                task: {"acc": sum(a.values()) / len(a), "acc_stderr": 0.01, "n": len(a)}
                for task, a in answers.items()
            },
            "decode_tokens_per_second": speed,
            "prefill_tokens_per_second": 10 * speed,
        }
    layers = [{"kind": x.kind, "hidden_mse": 10.0**-i} for i, x in enumerate(teacher.layers)]
    best = {"budget_bytes": 203_000, "architecture": student.to_json()}
    best |= {"selection": selection.to_json(), **trials[1]}
    against = {"student": comparison(TEACHER_ANSWERS, STUDENT_ANSWERS)}
    return {
        "score": {"scores.json": {"layers": layers}},
        "search": {
            "trials.json": {"trials": trials},
            "finalists.json": {"finalists": played},
            "front.json": {"objectives": ["kl", "memory"], "numbers": [0, 1]},
            "best.json": best,
        },
        "prune": {"x.json": {}},
        "repair": {"x.json": {}},
        "distill": {
            "history.jsonl": [*steps, *measured],
            "distill.json": {"tokens": 4096, "before": measured[0], "after": measured[1]},
        },
        "eval": {"evaluation.json": {"models": models, "against_teacher": against}},
        "export": {
            "verified.json": {
                "max_logit_difference": 1.5e-5,
                "tokens_agree": 64,
                "tokens": [1] * 64,
            }
        },
    }


# number -> KL after its rungs; the proxy's first choice, 0, comes in as number 2
FINALISTS = ((1, (0.04, 0.02)), (0, (0.03, 0.025)), (2, (0.05,)))


def finalist(trial: dict[str, Any], kls: tuple[float, ...], layers: int) -> dict[str, Any]:
    """A trial after the tournament; its last layer is gone, layer 1 is narrowed."""
    whole: list[dict[str, int] | None] = [{} for _ in range(layers)]
    whole[1], whole[-1] = {"width": 36}, None
    stations = ("step 4", "step 8")
    ranks = {"proxy": trial["number"] + 1, "repair": trial["number"] + 1}
    for i, kl in enumerate(kls):
        field = sorted(rungs[i] for _, rungs in FINALISTS if len(rungs) > i)
        ranks[stations[i]] = 1 + field.index(kl)
    rungs = [
        {"steps": int(name.split()[1]), "kl": kl, "agreement": 0.9, "loss": 2.0}
        for name, kl in zip(stations, kls, strict=False)
    ]
    record = {"layers": whole, "rungs": rungs, "ranks": ranks}
    record |= {"cut": {"kl": trial["kl"]}, "repaired": {"kl": 0.06}}
    if len(kls) == 2:
        record["tasks"] = {EVIL: 0.5 + 0.1 * trial["number"]}
        ranks["tasks"] = 2 - trial["number"]
    return {**trial, **record}


ARTEFACTS = {
    "score": "scores",
    "search": "search",
    "prune": "pruned",
    "repair": "repaired",
    "distill": "student",
    "eval": "evaluation",
    "export": "export",
}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(CONFIG))
    title = {"title": f"A {EVIL} title"}
    return Recipe.from_mapping({"model": str(tmp_path / "teacher"), "report": title})


def make_run(
    place: Path, recipe: Recipe, stages: list[str], search: dict[str, Any] | None = None
) -> RunFolder:
    """A run folder with these stages; `search` replaces files of that stage (None: no file)."""
    folder = RunFolder(place / "run")
    everything = records(recipe)
    files = everything["search"] | (search or {})
    everything["search"] = {name: value for name, value in files.items() if value is not None}

    def write(files: dict[str, Any]) -> Callable[[Path], None]:
        def body(work: Path) -> None:
            for name, value in files.items():
                lines = [json.dumps(v) + "\n" for v in value] if name.endswith("jsonl") else None
                (work / name).write_text("".join(lines) if lines else json.dumps(value))

        return body

    for stage in stages:
        folder.run_stage(stage, ARTEFACTS[stage], {}, write(everything[stage]))
    return folder


def page_of(place: Path, recipe: Recipe, stages: list[str]) -> tuple[str, Page]:
    html = (run(recipe, make_run(place, recipe, stages)) / "report.html").read_text()
    return html, Page(html)


def test_a_whole_run(tmp_path: Path, recipe: Recipe) -> None:
    html, page = page_of(tmp_path, recipe, list(ARTEFACTS))
    assert page.headings == [
        "Layers",
        "Importance",
        "Search",
        "Finalists",
        "Distillation",
        "Evaluation",
        "Memory",
        "How it was made",
    ]
    assert len(html) < 3_000_000
    for sentence in (
        "2 of 3 FFN layers removed; FFN width 48 to 36",
        "+2.5 %",  # bits per byte
        "1.20×",  # decode
        "80.0 %",  # accuracy kept: (0.5 + 0.5) / (0.75 + 0.5)
        "\N{MINUS SIGN}25.0 ±",  # the first task's difference
        "over 4,096 tokens",
        "4 candidates under the budget",
        "The 1 faint ones",
        "up to step 4 (all) and step 8 (2 of them)",
        "The first before healing, #0, came in as number 2",
        "60.0 %",  # accuracy of the winner
        "64 of 64 greedy tokens",
        "minipuzzle plan teacher --budget 83% --context 2k",
    ):
        assert sentence in page.text, sentence


def test_nothing_comes_from_outside(tmp_path: Path, recipe: Recipe) -> None:
    html, page = page_of(tmp_path, recipe, list(ARTEFACTS))
    assert not re.search(r"https?://|//[a-z]+\.|url\(|@import", html)
    assert {"script", "link", "img", "iframe", "object"}.isdisjoint(tag for tag, _ in page.tags)
    assert not any(name in {"src", "href", "onload"} for _, attrs in page.tags for name in attrs)


def test_texts_of_others_are_escaped(tmp_path: Path, recipe: Recipe) -> None:
    html, page = page_of(tmp_path, recipe, list(ARTEFACTS))
    assert EVIL not in html
    assert page.text.count(EVIL) >= 4  # title, heading, table, chart


@pytest.mark.parametrize("last", range(1, len(ARTEFACTS)))
def test_a_part_of_a_run(tmp_path: Path, recipe: Recipe, last: int) -> None:
    stages = list(ARTEFACTS)[:last]
    _, page = page_of(tmp_path, recipe, stages)
    wanted = {
        "score": {"Layers", "Importance"},
        "search": {"Search", "Finalists"},
        "distill": {"Distillation"},
        "eval": {"Evaluation", "Memory"},
    }
    expected = set().union({"How it was made"}, *(wanted.get(stage, set()) for stage in stages))
    assert set(page.headings) == expected


@pytest.mark.parametrize("only", list(ARTEFACTS))
def test_a_single_stage(tmp_path: Path, recipe: Recipe, only: str) -> None:
    assert "How it was made" in page_of(tmp_path, recipe, [only])[1].headings


def test_a_teacher_that_is_gone(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "teacher" / "config.json").unlink()
    _, page = page_of(tmp_path, recipe, list(ARTEFACTS))
    assert "Evaluation" in page.headings and "Layers" not in page.headings


def test_no_stage(tmp_path: Path, recipe: Recipe) -> None:
    with pytest.raises(UserError, match="no finished stage"):
        run(recipe, RunFolder(tmp_path / "run"))


def test_the_strip_shows_every_layer(tmp_path: Path, recipe: Recipe) -> None:
    _, page = page_of(tmp_path, recipe, list(ARTEFACTS))
    every = [attrs for tag, attrs in page.tags if tag == "li"]
    assert len(every) == 7 * (1 + len(FINALISTS))
    cells, theirs = every[:7], every[7:14]
    assert [cell["class"] for cell in theirs] == ["kept"] * 6 + ["removed"]
    assert "--share:0.75" in str(theirs[1]["style"])
    assert theirs[1]["title"] == "layer 1, FFN, width 48 to 36"
    assert [cell["class"] for cell in cells] == [
        "removed" if i in (1, 6) else "kept" for i in range(7)
    ]
    styles = [str(cell["style"]) for cell in cells]
    assert "--share:0.75" in styles[4] and all("--share:1.0" in styles[i] for i in (0, 2, 3, 5))
    assert "--rank:1.0" in styles[0] and "--rank:0.0" in styles[6]
    assert cells[4]["title"] == "layer 4, FFN, width 48 to 36, error without it 0.0001"


# --- drawing


values = st.floats(-1e6, 1e6).filter(lambda value: value == 0 or abs(value) > 1e-6)


@given(st.tuples(values, values), st.integers(3, 9), st.booleans())
def test_ticks_lie_inside_and_are_few(pair: tuple[float, float], most: int, log: bool) -> None:
    low, high = sorted(abs(value) + 1e-3 for value in pair) if log else sorted(pair)
    if high - low < 1e-6 * max(abs(low), abs(high), 1e-3):
        return
    scale = Scale(low, high, 10, 500, log)
    ticks = scale.ticks(most)
    slack = 1e-6 * (high - low)
    assert all(low - slack <= tick <= high + slack for tick in ticks)
    assert ticks == sorted(set(ticks)) and len(ticks) <= 2 * most + 1
    assert scale(low) == 10 and scale(high) == 500
    assert [scale(tick) for tick in ticks] == sorted(scale(tick) for tick in ticks)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.02, "0.02"),
        (1500.0, "1500"),
        (25_000.0, "25k"),
        (4e-6, "4e\N{MINUS SIGN}6"),
        (-2.5, "\N{MINUS SIGN}2.5"),
    ],
)
def test_tick_labels(value: float, text: str) -> None:
    assert short(value) == text


def test_running_mean_keeps_a_line() -> None:
    line = [2.0 * i for i in range(30)]
    assert charts.running_mean(line, 3)[3:-3] == pytest.approx(line[3:-3])
    assert charts.running_mean([1.0, 5.0], 0) == [1.0, 5.0]


def search_parts(recipe: Recipe) -> tuple[Any, Any, Any, Any]:
    """Trials, finalists, front and best of the run."""
    files = records(recipe)["search"]
    trials, finalists = files["trials.json"]["trials"], files["finalists.json"]["finalists"]
    return trials, finalists, files["front.json"], files["best.json"]


@pytest.mark.parametrize("width", [charts.WIDE, charts.NARROW])
def test_marks_lie_on_the_drawing(recipe: Recipe, width: float) -> None:
    trials, finalists, front, best = search_parts(recipe)
    drawn = (
        contest.candidates(trials, finalists, front, best, width),
        contest.ranks(finalists, best, width),
        contest.divergences(finalists, best, width),
    )
    for chart, marks in zip(drawn, (4, 5 + 5 + 3, 4 + 4 + 3), strict=True):
        assert chart is not None and len(chart.dots) == marks
        for dot in chart.dots:
            assert chart.left <= dot.x <= width - chart.right
            assert chart.top <= dot.y <= chart.height - chart.bottom
    assert drawn[0] is not None
    higher = sorted(drawn[0].dots, key=lambda dot: dot.y)
    assert "KL 0.4000" in higher[0].title and "KL 0.1000" in higher[-1].title


def test_candidates_are_told_apart(recipe: Recipe) -> None:
    """Given up, in front, finalist, chosen; a front of two objectives is a line, of three not."""
    trials, finalists, front, best = search_parts(recipe)
    few = [record for record in finalists if record["number"] == best["number"]]
    chart = contest.candidates(trials, few, front, best, charts.WIDE)
    assert chart is not None
    roles = {dot.title.split(";")[0]: dot.css for dot in chart.dots}
    assert roles == {
        "candidate 0": "front edge",
        "candidate 1": "chosen edge",
        "candidate 2": "trial",
        "candidate 3": "screened",
    }
    assert "given up" in next(dot.title for dot in chart.dots if dot.css == "screened")
    assert [len(line.points) for line in chart.lines if line.css == "front"] == [2]
    front = {"objectives": ["kl", "memory", "latency"], "numbers": [0, 1]}
    chart = contest.candidates(trials, few, front, best, charts.WIDE)
    assert chart is not None and not [line for line in chart.lines if line.css == "front"]
    single = contest.candidates(trials, few, {"objectives": ["kl"], "numbers": [1]}, best, 800)
    assert single is not None and not [dot for dot in single.dots if "edge" in dot.css]


def test_ranks_cross_where_they_change(recipe: Recipe) -> None:
    _, finalists, _, best = search_parts(recipe)
    chart = contest.ranks(finalists, best, charts.WIDE)
    assert chart is not None
    assert [tick.label for tick in chart.x_ticks] == [
        "proxy",
        "repair",
        "step 4",
        "step 8",
        "tasks",
    ]
    heights = {tick.label: tick.at for tick in chart.y_ticks}
    assert heights["1"] < heights["2"] < heights["3"]
    chosen = next(line for line in chart.lines if line.css == "chosen")
    assert [y for _, y in chosen.points] == [heights[rank] for rank in "22211"]


def test_a_latency_has_a_drawing_of_its_own(recipe: Recipe) -> None:
    trials, finalists, front, best = search_parts(recipe)
    assert contest.candidates(trials, finalists, front, best, charts.WIDE, "latency") is None
    timed = [trial | {"latency": 0.001 * (trial["number"] + 1)} for trial in trials]
    chart = contest.candidates(timed, finalists, front, best, charts.WIDE, "latency")
    assert chart is not None and "ms a step" in chart.x_label
    across = sorted(chart.dots, key=lambda dot: dot.x)
    assert [dot.title.split(";")[0] for dot in across] == [f"candidate {n}" for n in range(4)]


@pytest.mark.parametrize(
    ("point", "removed", "sizes"),
    [
        ({"removed.mamba": 2, "removed.ffn": 1, "width": 48}, "2 Mamba-2, 1 FFN", "FFN width 48"),
        ({"removed.block": 1, "kv_heads": 2}, "1 blocks", "KV heads 2"),
        ({"layer.3": 1, "layer.4": 0, "layer.12": 1}, "layers 3, 12", ""),
        (
            {"width.1": 48, "width.3": 32, "hidden": 64},
            "no layer",
            "FFN width 32 to 48, hidden size 64",
        ),
    ],
)
def test_points_in_words(point: dict[str, int], removed: str, sizes: str) -> None:
    assert words.removed_words(point) == removed and words.size_words(point) == sizes


@pytest.mark.parametrize("file", ["trials.json", "finalists.json", "front.json", "best.json"])
@pytest.mark.parametrize("broken", [None, []])
def test_a_search_without_one_of_its_files(
    tmp_path: Path, recipe: Recipe, file: str, broken: Any
) -> None:
    folder = make_run(tmp_path, recipe, list(ARTEFACTS), {file: broken})
    page = Page((run(recipe, folder) / "report.html").read_text())
    assert f"The search left no {file}:" in page.text
    assert "Search" in page.headings and "Evaluation" in page.headings


def test_no_tournament_is_said(tmp_path: Path, recipe: Recipe) -> None:
    alone = records(recipe)["search"]["finalists.json"]["finalists"][0]
    alone = {key: alone[key] for key in alone if key not in ("cut", "repaired", "tasks")}
    alone |= {"rungs": [], "ranks": {"proxy": 1}}
    files = {"finalists.json": {"finalists": [alone]}}
    folder = make_run(tmp_path, recipe, ["score", "search"], files)
    page = Page((run(recipe, folder) / "report.html").read_text())
    assert "No tournament was held" in page.text and "Ranks" not in page.text
