"""Cached teachers against the online one: bytes, writing speed, step time, held-out KL.

    python scripts/bench_cache.py runs/demo

Takes the demo's teacher and recipe, and the repaired model of its run. One epoch of the recipe's
distillation text is cached as draws, as the likeliest ids, and as so many likeliest ids as take
the bytes of the draws; then four students of the same start train on it, one step of each in turn,
so that what else runs on the machine slows all of them. Held-out text is the search split's.
Writes docs/results/distillation.json and the table of docs/cached-teachers.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from figures import RESULTS, record
from torch import Tensor, nn

from minipuzzle.checkpoint import Checkpoint
from minipuzzle.data.blocks import recipe_blocks
from minipuzzle.distill.cache import CachedTeacher, bytes_per_token, identity, write_cache
from minipuzzle.distill.heldout import evaluate
from minipuzzle.distill.stage import settings_of
from minipuzzle.distill.teacher import OnlineTeacher, Targets, Teacher, TeacherStates
from minipuzzle.distill.trainer import make_optimizer, train_step
from minipuzzle.model import load
from minipuzzle.recipe import Recipe, demo_recipe
from minipuzzle.source import resolve

PAGE = RESULTS.parent / "cached-teachers.md"
HELD_OUT_BLOCKS = 16
TOPK_BYTES = 4  # of one likeliest id: two for the id up to 2^16 words, two for its probability
Figures = dict[str, tuple[float | int | None, str]]


@dataclass
class Way:
    """One kind of teacher, and what training from it cost."""

    source: Teacher | Targets
    student: nn.Module
    size: int = 0
    bytes: float = 0.0
    written: float = 0.0
    seconds: list[float] = field(default_factory=list)
    kl: float = 0.0


def cached(
    kind: str, size: int, states: TeacherStates, ran: float, blocks: Tensor, known: str, place: Path
) -> Way:
    """Write a cache from the states of a teacher that `ran` so many seconds; no student yet."""
    made_of = identity(kind, size, known, len(states.head), blocks)
    folder = place / f"{kind}-{size}"
    begun = time.perf_counter()
    write_cache(folder, states, blocks, made_of)
    written = blocks.numel() / (time.perf_counter() - begun + ran)
    source = CachedTeacher(folder, blocks, made_of)
    return Way(source, nn.Module(), size, bytes_per_token(folder, blocks), written)


def measure(recipe: Recipe, start: Path, place: Path) -> Figures:
    """All figures; caches are written to `place`."""
    settings, folder = settings_of(recipe), resolve(recipe.model, recipe.revision)
    teacher = load(folder)
    needed = settings.steps * settings.batch
    blocks = recipe_blocks(recipe, "distillation", teacher.tokenizer, needed)
    held_out = recipe_blocks(recipe, "search", teacher.tokenizer, HELD_OUT_BLOCKS)
    online, judge = OnlineTeacher(teacher.module, blocks), TeacherStates(teacher.module, held_out)
    begun = time.perf_counter()
    states = TeacherStates(teacher.module, blocks)
    ran = time.perf_counter() - begun
    draws, top = recipe.distill.cache_draws, recipe.distill.cache_top
    known = Checkpoint.open(folder).fingerprint()
    sampled = cached("sampled", draws, states, ran, blocks, known, place)
    likeliest = cached("topk", top, states, ran, blocks, known, place)
    same = round(sampled.bytes / TOPK_BYTES)
    short = cached("topk", same, states, ran, blocks, known, place)
    ways = {
        "online": Way(online, nn.Module()),
        "sampled": sampled,
        "topk": likeliest,
        "topk_short": short,
    }
    for way in ways.values():
        way.student = load(start).module
    before = evaluate(sampled.student, judge, held_out).kl
    optimizers = {}
    for name, way in ways.items():
        optimizers[name] = make_optimizer(way.student.requires_grad_(True), settings)
    for step in range(settings.steps):
        for name, way in ways.items():
            begun = time.perf_counter()
            train_step(way.student, way.source, blocks, optimizers[name], settings, step)
            way.seconds.append(time.perf_counter() - begun)
        print(f"step {step + 1} of {settings.steps}", flush=True)
    for way in ways.values():
        way.kl = evaluate(way.student, judge, held_out).kl
    return figures(ways, before, blocks.numel())


def figures(ways: Mapping[str, Way], before: float, tokens: int) -> Figures:
    """What is recorded of each way."""
    online = ways["online"]
    found: Figures = {
        "cache_training_tokens": (tokens, "tokens"),
        "cache_heldout_kl_start": (round(before, 5), "nats"),
        "cache_heldout_kl_online": (round(online.kl, 5), "nats"),
    }
    for name, way in ways.items():
        if way is online:
            continue
        ratios = [a / b for a, b in zip(way.seconds, online.seconds, strict=True)]
        found |= {
            f"cache_ids_{name}": (way.size, "draws" if name == "sampled" else "ids"),
            f"cache_bytes_per_token_{name}": (round(way.bytes, 1), "bytes"),
            f"cache_write_speed_{name}": (round(way.written), "tokens/s"),
            f"cache_step_time_over_online_{name}": (
                round(statistics.median(ratios), 3),
                "median ratio of a step's time",
            ),
            f"cache_heldout_kl_{name}": (round(way.kl, 5), "nats"),
        }
    return found


def render() -> None:
    """Write the page's table between its markers."""
    found = json.loads((RESULTS / "distillation.json").read_text())
    values = {name: entry["value"] for name, entry in found.items()}
    rows = [
        "| teacher | bytes a token | written, tokens/s | step time over online | held-out KL |",
        "|---|---|---|---|---|",
        f"| before training | | | | {values['cache_heldout_kl_start']:.5f} |",
        f"| online | 0 | | 1 | {values['cache_heldout_kl_online']:.5f} |",
    ]
    labels = {"sampled": "{} draws", "topk": "{} likeliest ids", "topk_short": "{} likeliest ids"}
    for name, label in labels.items():
        rows.append(
            f"| {label.format(values[f'cache_ids_{name}'])} "
            f"| {values[f'cache_bytes_per_token_{name}']:.1f} "
            f"| {values[f'cache_write_speed_{name}']:,} "
            f"| {values[f'cache_step_time_over_online_{name}']:.2f} "
            f"| {values[f'cache_heldout_kl_{name}']:.5f} |"
        )
    origin = found["cache_bytes_per_token_sampled"]
    tokens = f"{values['cache_training_tokens']:,} training tokens"
    rows += ["", f"{tokens}; `{origin['command']}`, {origin['device']}, {origin['date']}."]
    begin, end = "<!-- cache: scripts/bench_cache.py -->", "<!-- end of cache -->"
    page = PAGE.read_text(encoding="utf-8")
    head, _, rest = page.partition(begin)
    _, _, tail = rest.partition(end)
    assert rest and tail, f"{PAGE} has lost its markers"
    PAGE.write_text(f"{head}{begin}\n" + "\n".join(rows) + f"\n{end}{tail}", encoding="utf-8")


def main() -> None:
    """Measure, record, render."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="what `make demo` made")
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--render", action="store_true", help="only write the table")
    given = parser.parse_args()
    if not given.render:
        changes = [] if given.steps is None else [f"distill.steps={given.steps}"]
        recipe = Recipe.load(demo_recipe(), changes)
        with tempfile.TemporaryDirectory() as place:
            found = measure(recipe, given.run / "repaired", Path(place))
        record("distillation", found)
    render()


if __name__ == "__main__":
    main()
