"""What every stage of the 8B recipe needs, as the table of docs/an-8b-on-one-gpu.md.

The estimates of `run --dry-run`, for a card of 24 GB and at the speed measured on an H200
(forward_56b_tokens_per_second_kernels in docs/results/importance.json).

    python scripts/stage_needs.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from minipuzzle.deployments import PRESETS
from minipuzzle.estimate import Machine, estimate
from minipuzzle.families import parameter_count
from minipuzzle.recipe import Recipe
from minipuzzle.source import resolve_config
from minipuzzle.units import format_bytes, format_seconds, parse_bytes

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"
PAGE = ROOT / "docs" / "an-8b-on-one-gpu.md"
BEGIN, END = "<!-- needs: scripts/stage_needs.py -->", "<!-- end of needs -->"
SMALL, LARGE = PRESETS["rtx4090-32k"], PRESETS["h200-128k"]


def main() -> None:
    """Write the table between its markers."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert rest and after, f"{PAGE} has lost its markers"
    rows = "\n".join(table())
    PAGE.write_text(f"{before}{BEGIN}\n{rows}\n{END}{after}", encoding="utf-8")


def table() -> Iterator[str]:
    """A row for each stage: disk, memory on both cards, time on the large one."""
    recipe = Recipe.load(
        RECIPES / "nemotron-h-8b-24gb.yaml", [f"model={RECIPES / 'configs' / 'nemotron-h-8b'}"]
    )
    rate = measured_rate()
    small, large = (
        estimate(recipe, Machine(rate, parse_bytes(card.budget), gpu=True))
        for card in (SMALL, LARGE)
    )
    yield "| stage | disk | memory, card of 24 GB | memory, H200 | time, H200 |"
    yield "|---|---|---|---|---|"
    for here, there in zip(small, large, strict=True):
        fits = here.memory_bytes <= parse_bytes(SMALL.budget)
        memory = format_bytes(here.memory_bytes) if fits else "too large"
        yield (
            f"| {here.stage} | {format_bytes(here.disk_bytes)} | {memory} "
            f"| {format_bytes(there.memory_bytes)} | {format_seconds(there.seconds)} |"
        )


def measured_rate() -> float:
    """Operations per second of the 56B's forward pass on an H200."""
    figures = json.loads((ROOT / "docs" / "results" / "importance.json").read_text())
    family, architecture = resolve_config(RECIPES / "configs" / "nemotron-h-56b")
    tokens: float = figures["forward_56b_tokens_per_second_kernels"]["value"]
    return 2 * parameter_count(architecture, family) * tokens


if __name__ == "__main__":
    main()
