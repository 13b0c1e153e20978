"""Against what a user would pick instead: Torch-Pruning for widths, ShortGPT's score for depth.

One Llama, one calibration text, equal parameter counts. Every method is tried with several
settings; the one with the lowest loss on the first part of the search text is its best, and the
best ones are measured on the rest of it. Needs Torch-Pruning (see peer_pruners.py).

    python scripts/compare_pruners.py --model runs/llama --json docs/results/compare_pruners.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from figures import command, device, record, versions
from our_cuts import Prices, narrowed, plans, selection_by, selection_of, sliced, uniform, without
from peer_pruners import (
    IMPORTANCES,
    SETTINGS,
    VERSION,
    Setting,
    block_influence,
    cut_to,
    gradients,
    next_token_loss,
    size,
)
from texts import split_blocks
from torch import nn

from minipuzzle.architecture import Architecture
from minipuzzle.errors import UserError
from minipuzzle.families import parameter_count
from minipuzzle.files import atomic_write_json
from minipuzzle.metrics import LAYER_METRICS
from minipuzzle.model import Model, clone, load
from minipuzzle.prune.constraints import SLICEABLE
from minipuzzle.prune.depth import REMOVAL_ORDER
from minipuzzle.prune.iterative import Iteration
from minipuzzle.prune.prices import channel_prices, loss_metrics
from minipuzzle.prune.repair import repair
from minipuzzle.prune.score import score
from minipuzzle.prune.select import select
from minipuzzle.recipe import Recipe
from minipuzzle.scores import Scores
from minipuzzle.selection import Selection
from minipuzzle.source import resolve

SHARES = (0.1, 0.2, 0.3)
REPAIRED = 2  # cuts of ours with one width, and with a width per layer: the best before repair
OURS, TORCH_PRUNING, SHORTGPT = "ours", "Torch-Pruning", "ShortGPT"
PARTS = ("peers", "ours", "blocks")
FIGURES = {
    "loss_excess_ours": ("widths", OURS, "repaired"),
    "loss_excess_ours_unrepaired": ("widths", OURS, "cut"),
    "loss_excess_torch_pruning": ("widths", TORCH_PRUNING, "cut"),
    "loss_excess_ours_layers": ("blocks", OURS, "repaired"),
    "loss_excess_shortgpt": ("blocks", SHORTGPT, "cut"),
}


@dataclass
class Contest:
    """The uncut model, the texts, and the rows so far; the best modules are kept to be measured."""

    teacher: Model
    scores: Scores
    prices: Prices
    calibration: torch.Tensor
    choosing: torch.Tensor
    measuring: torch.Tensor
    settings: dict[str, Any]  # of the repair
    rows: list[dict[str, Any]] = field(default_factory=list)
    best: dict[tuple[Any, ...], tuple[dict[str, Any], nn.Module]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.chosen_base = loss(self.teacher.module, self.choosing)
        self.base = loss(self.teacher.module, self.measuring)
        self.whole = size(self.teacher.module)

    @property
    def architecture(self) -> Architecture:
        """Of the uncut model."""
        return self.teacher.architecture

    def enter(self, module: nn.Module, started: float, **row: Any) -> float:
        """Take a cut model: its excess of loss on the choosing part, nats."""
        excess = loss(module, self.choosing) - self.chosen_base
        row |= {"parameters": size(module), "uniform": uniform(module), "excess_choosing": excess}
        row["seconds"] = round(time.monotonic() - started, 1)
        self.rows.append(row)
        key = tuple(row[name] for name in ("cut", "share", "method", "state", "uniform"))
        if key not in self.best or excess < self.best[key][0]["excess_choosing"]:
            self.best[key] = row, module
        print(row, flush=True)
        return excess

    def enter_repaired(self, student: Model, selection: Selection, **row: Any) -> None:
        """Repair a copy of a model that `selection` left and take it."""
        started, student = time.monotonic(), clone(student)
        repair(self.teacher, student, selection, self.calibration, **self.settings)
        self.enter(student.module, started, **row, state="repaired")

    def measure_best(self) -> None:
        """Measure the best of every method on the text that chose nothing."""
        for row, module in self.best.values():
            row["excess"] = loss(module, self.measuring) - self.base
        self.best.clear()


@torch.no_grad()
def loss(module: nn.Module, ids: torch.Tensor, *, batch: int = 4) -> float:
    """Next-token loss on ids (B, T), nats."""
    device = next(module.parameters()).device
    parts = [
        float(next_token_loss(module, rows.to(device))) * len(rows)
        for rows in torch.split(ids, batch)
    ]
    return sum(parts) / len(ids)


def peer_widths(
    contest: Contest,
    share: float,
    grads: Mapping[str, torch.Tensor],
    settings: Sequence[Setting],
) -> None:
    """Torch-Pruning by every setting; its best cut that keeps the stream is repaired as well."""
    best: tuple[float, Setting, nn.Module] | None = None
    row = {"cut": "widths", "share": share, "method": TORCH_PRUNING}
    for setting in settings:
        started = time.monotonic()
        module = cut_to(contest.teacher.module, setting, share, grads)
        if module is None:
            print(f"{setting} has no cut near {share:.0%}", flush=True)
            continue
        excess = contest.enter(module, started, **row, how=vars(setting), state="cut")
        if setting.scope != "all" and (best is None or excess < best[0]):
            best = excess, setting, module
    if best is not None:
        _, setting, module = best
        selection = selection_of(contest.teacher, module)
        student = replace(
            contest.teacher, architecture=selection.apply(contest.architecture), module=module
        )
        contest.enter_repaired(student, selection, **row, how=vars(setting))


def our_widths(contest: Contest, share: float) -> None:
    """Every plan of ours at a share of the parameters, cut; the best ones repaired."""
    row = {"cut": "widths", "share": share, "method": OURS}
    cuts = []
    for plan in plans(contest.architecture):
        selection = selection_by(contest.teacher, contest.scores, contest.prices, plan, share)
        if selection is None:
            continue
        started = time.monotonic()
        student = (narrowed if plan.widths else sliced)(contest.teacher, selection)
        excess = contest.enter(student.module, started, **row, how=vars(plan), state="cut")
        cuts.append((excess, plan, selection, student))
    for one_width in (True, False):
        kind = (cut for cut in cuts if (cut[1].widths is None) == one_width)
        for _, plan, selection, student in sorted(kind, key=lambda cut: cut[0])[:REPAIRED]:
            contest.enter_repaired(student, selection, **row, how=vars(plan))


def block_sets(
    contest: Contest, number: int, swept: torch.Tensor
) -> Iterator[tuple[str, str, Selection]]:
    """(method, metric, selection) of every way to choose `number` blocks."""
    units = contest.teacher.family.removable(contest.architecture)
    influence = block_influence(contest.teacher, units, swept)
    lowest = influence.argsort(stable=True)[:number].tolist()
    yield SHORTGPT, "block influence", without(contest.architecture, units, lowest)
    for metric in LAYER_METRICS:
        if metric == "cosine":  # that is block influence
            continue
        done = Iteration(metric, lambda gone: len(gone) >= number * len(units[0]))
        again = score(
            contest.teacher, swept, {}, metrics=(metric,), unit_metrics=(), iterative=done
        )
        for name, order in ((metric, metric), (f"{metric}, iterative", REMOVAL_ORDER)):
            selection = select(
                again,
                contest.architecture,
                removed=number,
                layer_metric=order,
                units=units,
                constraints=SLICEABLE,
            )
            yield OURS, name, selection


def cut_blocks(contest: Contest, share: float, swept: torch.Tensor) -> None:
    """Whole blocks out, as many as come nearest to a share: by block influence and by ours."""
    units = contest.teacher.family.removable(contest.architecture)
    per_block = contest.whole - parameter_count(
        without(contest.architecture, units, [0]).apply(contest.architecture),
        contest.teacher.family,
    )
    number = max(1, round(share * contest.whole / per_block))
    seen: set[tuple[str, Selection]] = set()
    cuts = []
    for method, metric, selection in block_sets(contest, number, swept):
        if (method, selection) in seen:  # the same blocks by another metric
            continue
        seen.add((method, selection))
        gone = [b for b, layers in enumerate(units) if selection.layers[layers[0]] is None]
        row = {"cut": "blocks", "share": share, "method": method}
        row["how"] = {"metric": metric, "blocks": gone}
        started = time.monotonic()
        student = sliced(contest.teacher, selection)
        contest.enter(student.module, started, **row, state="cut")
        cuts.append((row, selection, student))
    for row, selection, student in cuts:
        contest.enter_repaired(student, selection, **row)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything and write the JSON and, if asked, the figures."""
    options = read_arguments(arguments)
    recipe = Recipe.load(options.recipe, [f"model={options.model}"])
    teacher = load(resolve(recipe.model, recipe.revision), device=options.device)
    if teacher.family.layers_per_block != 2:
        raise UserError(f"{options.model} is no Llama; Torch-Pruning's part handles nothing else")
    wanted = {"calibration": options.calibration, "search": options.choosing + options.measuring}
    blocks = split_blocks(recipe, teacher.tokenizer, wanted, options.texts)
    calibration, search = blocks["calibration"], blocks["search"]
    scored, swept = calibration[: recipe.score.unit_blocks], calibration[: recipe.score.blocks]
    contest = Contest(
        teacher,
        score(teacher, scored, {}, metrics=LAYER_METRICS, layer_sequences=len(swept)),
        channel_prices(teacher, scored, loss_metrics(teacher, scored)),
        calibration,
        search[: options.choosing],
        search[options.choosing :],
        recipe.repair.model_dump(exclude={"blocks"}),
    )
    texts = {
        "unit_tokens": scored.numel(),
        "layer_tokens": swept.numel(),
        "repair_tokens": calibration.numel(),
        "choosing_tokens": contest.choosing.numel(),
        "measuring_tokens": contest.measuring.numel(),
    }
    settings = [s for s in SETTINGS if s.importance in options.importances]
    grads = gradients(teacher.module, scored) if "peers" in options.parts else {}
    for share in options.shares:
        if "peers" in options.parts:
            peer_widths(contest, share, grads, settings)
        if "ours" in options.parts:
            our_widths(contest, share)
        if "blocks" in options.parts:
            cut_blocks(contest, share, swept)
        contest.measure_best()
        write(options.json, options.model, contest, texts)
        if options.figures:
            record("importance", figures(contest.rows))


def write(path: Path, model: str, contest: Contest, texts: Mapping[str, int]) -> None:
    """Put the rows so far into the file, in place of earlier ones of the same method and share."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {
        "name": Path(model).name,
        "parameters": contest.whole,
        "architecture": contest.architecture.pattern,
        "loss": contest.base,
        "loss_choosing": contest.chosen_base,
    }
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if known.get("model") != head or known.get("tokens") != texts:
        known = {}  # of another model or other texts: not to be compared
    new = {part_of(row) for row in contest.rows}
    old = [row for row in known.get("rows", []) if part_of(row) not in new]
    origin = {
        "command": command(),
        "device": device(),
        "versions": versions() | {"torch-pruning": VERSION},
    }
    runs = known.get("runs", {}) | {part: origin for part in sorted(new)}
    rows = [*old, *contest.rows]
    atomic_write_json(path, {"model": head, "tokens": dict(texts), "runs": runs, "rows": rows})


def part_of(row: Mapping[str, Any]) -> str:
    """What is measured in one go: a method at a share."""
    return f"{row['cut']}, {row['share']}, {row['method']}"


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, str]]:
    """Name of a figure and percent removed -> excess of loss of the best of that kind, nats."""
    measured = [row for row in rows if "excess" in row]
    found = {}
    for name, kind in FIGURES.items():
        own = [row for row in measured if (row["cut"], row["method"], row["state"]) == kind]
        for share in sorted({row["share"] for row in own}):
            best = min((r for r in own if r["share"] == share), key=lambda r: r["excess_choosing"])
            found[f"{name}_{round(100 * share)}"] = (best["excess"], "nats")
    return found


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="folder of a Llama")
    parser.add_argument("--recipe", type=Path, default=Path("minipuzzle/demo/demo.yaml"))
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES))
    parser.add_argument("--calibration", type=int, default=96, help="sequences for the repair")
    parser.add_argument("--choosing", type=int, default=16, help="sequences that choose settings")
    parser.add_argument("--measuring", type=int, default=32, help="sequences that measure the best")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--importances", nargs="+", default=IMPORTANCES, choices=IMPORTANCES)
    parser.add_argument("--texts", type=Path, help="file of tokens, written where it is missing")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--figures", action="store_true", help="record them for the results page")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
