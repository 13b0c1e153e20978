"""What a tournament is worth: its winner against the first choice of the proxy.

A study on the search split gives the candidates; the finalists play a tournament (repair, rungs of
distillation, tasks of the search split). The proxy's first choice is then trained on to the last
rung's steps, even where the tournament had dropped it, so that both have had the same tokens. Only
then, and once, text of the report split is read: bits per byte of both, of the finalist that is
best by KL where that is a third one, and of the teacher.

    python scripts/tournament_experiment.py --model demo --run runs/tournament
    python scripts/tournament_experiment.py --model FOLDER --name 27m --run runs/tournament-27m
        --steps 100 250 600 --limit 1000 --set distill.batch=16

Killed, it goes on where it was. The tables go to docs/results/tournament.json, the two figures of
the issue to docs/results/search.json.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from figures import RESULTS, command, device, record, versions
from scipy.stats import spearmanr

from minipuzzle.data.blocks import recipe_blocks
from minipuzzle.data.packing import byte_lengths
from minipuzzle.eval.bpb import BitsPerByte, bits_per_byte
from minipuzzle.families import parameter_count
from minipuzzle.files import atomic_write_json, read_json
from minipuzzle.model import Model, load
from minipuzzle.prune.score import run as run_score
from minipuzzle.recipe import Recipe
from minipuzzle.runfolder import RunFolder
from minipuzzle.scores import Scores
from minipuzzle.search.finalists import finalists
from minipuzzle.search.ranges import recipe_space
from minipuzzle.search.stage import find_trials
from minipuzzle.search.standings import Finalist, Record, rank_table, value_after
from minipuzzle.search.tournament import Tournament, check_tournament
from minipuzzle.source import resolve

DEMO = Path(__file__).resolve().parent.parent / "minipuzzle" / "demo" / "demo.yaml"
PAIRED_BLOCKS = 4  # of report text in one paired difference


def main(arguments: Sequence[str] | None = None) -> None:
    """Study, tournament, one look at the report split, results."""
    options = parse(arguments)
    recipe = make_recipe(options)
    check_tournament(recipe)
    options.run.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    teacher = load(resolve(recipe.model, recipe.revision), device=options.device)
    players = choose(recipe, teacher, options.run)
    tournament = Tournament(recipe, teacher, options.run / "tournament")
    records = tournament.play(players)
    print(rank_table(records), flush=True)
    roles = roles_of(players, records, tournament.steps)
    measured = report(recipe, tournament, roles, options)
    result = {
        "parameters": parameter_count(teacher.architecture, teacher.family),
        "trials": recipe.search.trials,
        "finalists": len(players),
        "steps": [rung.steps for rung in recipe.search.tournament.rungs],
        "tokens": tournament.steps * tournament.settings.batch * tournament.distillation.shape[1],
        "learning_rate": tournament.settings.learning_rate,
        "search_tokens": tournament.search.numel(),
        "ranks": [summary(player) for player in records],
        "rank_correlations": correlations(records),
        "report": measured,
        "command": command(),
        "device": device(),
        "versions": versions(),
        "seconds_of_this_call": round(time.monotonic() - started, 1),
    }
    write(options, result)
    if options.clear:
        tournament.clear()


def choose(recipe: Recipe, teacher: Model, run: Path) -> list[Finalist]:
    """Score, search, and take the finalists, the proxy's first choice in front."""
    folder = RunFolder(run)
    run_score(recipe, folder)
    scores = Scores.load(folder.artefact("scores"))
    space = recipe_space(recipe, teacher.architecture, teacher.family, scores)
    trials = find_trials(recipe, teacher, space, scores, run)
    chosen = finalists(trials, space, recipe.search.tournament.finalists)
    return [Finalist(t, space.selection(t.point, scores), run / "tournament") for t in chosen]


def roles_of(
    players: Sequence[Finalist], records: Sequence[Record], steps: int
) -> dict[str, Finalist]:
    """Who is compared: the winner, the proxy's first choice, the best by KL in the last rung."""
    by_number = {player.number: player for player in players}
    ended = [player for player in players if player.after(steps) is not None]
    return {
        "winner": by_number[records[0]["number"]],
        "proxy_first": players[0],
        "best_by_kl": min(ended, key=lambda player: value_after(player, steps)),
    }


def report(
    recipe: Recipe,
    tournament: Tournament,
    roles: Mapping[str, Finalist],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Bits per byte on the report split, after the same training; measured once, then kept."""
    path = options.run / "report.json"
    numbers = {role: player.number for role, player in roles.items()}
    kept = read_json(path)
    if kept is not None and kept["numbers"] == numbers and kept["steps"] == tournament.steps:
        return kept
    teacher = tournament.teacher
    blocks = recipe_blocks(recipe, "report", teacher.tokenizer, options.report_blocks)
    lengths = byte_lengths(teacher.tokenizer, teacher.architecture.vocabulary)
    parts = {"teacher": pieces(teacher, blocks, lengths)}
    search: dict[str, Record] = {}
    for role, player in roles.items():
        # goes on from the checkpoint of the rung after which a finalist was dropped
        student = tournament.student(player, tournament.steps)
        search[role] = tournament.measure(student)
        parts[role] = pieces(student, blocks, lengths)
    result = {
        "numbers": numbers,
        "steps": tournament.steps,
        "tokens": sum(part.tokens for part in parts["teacher"]),
        "bits_per_byte": {name: value(found) for name, found in parts.items()},
        "search_split": search,
        "winner_minus_proxy_first": paired(parts["winner"], parts["proxy_first"]),
        "winner_minus_best_by_kl": paired(parts["winner"], parts["best_by_kl"]),
        "proxy_first_was_dropped": roles["proxy_first"].after(tournament.steps) is None,
    }
    atomic_write_json(path, result)
    return result


def pieces(model: Model, blocks: torch.Tensor, lengths: torch.Tensor) -> list[BitsPerByte]:
    """The loss of every few blocks, so that two models can be compared piece by piece."""
    return [
        bits_per_byte(model.module, part, lengths) for part in torch.split(blocks, PAIRED_BLOCKS)
    ]


def value(found: Sequence[BitsPerByte]) -> float:
    """Bits per byte over all pieces."""
    nats, sizes = sum(part.nats for part in found), sum(part.bytes for part in found)
    return nats / math.log(2) / sizes


def paired(one: Sequence[BitsPerByte], other: Sequence[BitsPerByte]) -> dict[str, float]:
    """Difference of bits per byte and its standard error over pieces of the same text."""
    total = sum(part.bytes for part in one)
    share = [part.bytes * len(one) / total for part in one]
    gaps = [s * (a.value - b.value) for s, a, b in zip(share, one, other, strict=True)]
    mean = sum(gaps) / len(gaps)
    spread = sum((gap - mean) ** 2 for gap in gaps) / max(1, len(gaps) - 1)
    return {"difference": mean, "standard_error": math.sqrt(spread / len(gaps))}


def summary(player: Record) -> dict[str, Any]:
    """What the table of ranks says of a finalist."""
    kl = {"proxy": player["kl"], "cut": player["cut"]["kl"], "repair": player["repaired"]["kl"]}
    kl |= {f"step {rung['steps']}": rung["kl"] for rung in player["rungs"]}
    keys = ("number", "point", "memory_bytes", "parameters", "ranks", "tasks")
    return {key: player[key] for key in keys if key in player} | {"kl": kl}


def correlations(records: Sequence[Record]) -> dict[str, float]:
    """Spearman's rank correlation of every two columns that all finalists have."""
    columns = [c for c in records[0]["ranks"] if all(c in r["ranks"] for r in records)]
    return {
        f"{a} and {b}": float(
            spearmanr(*([r["ranks"][c] for r in records] for c in (a, b))).statistic
        )
        for i, a in enumerate(columns)
        for b in columns[i + 1 :]
    }


def write(options: argparse.Namespace, result: Mapping[str, Any]) -> None:
    """Both results files; entries of other models stay."""
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / "tournament.json"
    atomic_write_json(path, {**(read_json(path) or {}), options.name: result})
    difference = result["report"]["winner_minus_proxy_first"]["difference"]
    figures: dict[str, tuple[float | int | None, str]] = {
        "finalists": (result["finalists"], "candidates in the tournament"),
        "winner_minus_proxy_first_bits_per_byte": (
            round(difference, 5),
            "bits per byte of report text",
        ),
    }
    record("search", figures, folder=options.results)
    print(f"winner minus proxy's first choice: {difference:+.5f} bits per byte", flush=True)


def make_recipe(options: argparse.Namespace) -> Recipe:
    """The recipe with the options in it; --set has the last word."""
    keep = [*options.keep, 1]
    assert len(keep) == len(options.steps), "--keep takes one number less than --steps"
    rungs = ", ".join(
        f"{{steps: {s}, keep: {k}}}" for s, k in zip(options.steps, keep, strict=True)
    )
    own = [
        f"model={options.model}",
        f"search.trials={options.trials}",
        f"search.tournament.finalists={options.finalists}",
        f"search.tournament.rungs=[{rungs}]",
        f"search.tournament.tasks=[{', '.join(options.tasks)}]",
        f"search.tournament.limit={options.limit}",
    ]
    return Recipe.load(options.recipe, [*own, *options.set])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="demo", help="`demo`, a folder or a hub id")
    add("--name", default="demo", help="of the entry in tournament.json")
    add("--recipe", type=Path, default=DEMO, help="all settings that no option gives")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override of the recipe")
    add("--run", type=Path, required=True, help="folder to work in; resumed from")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--trials", type=int, default=64, help="candidates of the study")
    add("--finalists", type=int, default=8)
    add("--steps", type=int, nargs="+", default=[16, 40, 80], help="of the rungs, counted from 0")
    add("--keep", type=int, nargs="*", default=[5, 3], help="that go on, of all rungs but the last")
    add("--tasks", nargs="*", default=["demo_search"], help="that rank the last")
    add("--limit", type=int, default=200, help="questions per task")
    add("--report-blocks", type=int, default=192, help="sequences of report text")
    add("--results", type=Path, default=RESULTS, help="folder of the results files")
    add("--clear", action="store_true", help="remove the finalists' models in the end")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
