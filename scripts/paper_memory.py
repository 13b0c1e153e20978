"""What the paper counts as memory: read out of the 120 candidates of its figure 10.

Every candidate's memory is a sum over its layers, so the 120 numbers are points of a lattice. This
takes four constants, says how many of the points they explain and how far off, and sets them beside
our own items. scripts/paper_grid.py writes it into docs/the-paper-case.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from textwrap import wrap

from minipuzzle.architecture import Kind
from minipuzzle.memory import stored_bytes
from minipuzzle.search.listing import Listing

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
MIB = 2**20
WIDTH, STEP = 32768, 1024
# MiB: of one layer of a kind (FFN: of WIDTH, proportional to it), and of the rest of the model
MAMBA, ATTENTION, FFN, REST = 265, 1118, 301, 1204
LIMIT_MIB = 32500  # where the figure draws its line
TOLERANCE = 0.15  # MiB; a point of the drawing is about 0.03 wide, the scale drifts by 0.11


@dataclass(frozen=True)
class Shape:
    """Layers of each kind that stay, and the width of the FFNs."""

    mamba: int
    ffn: int
    attention: int
    width: int

    @property
    def layers(self) -> int:
        """All of them."""
        return self.mamba + self.ffn + self.attention

    @property
    def mib(self) -> float:
        """Memory by the constants."""
        ffn = self.ffn * FFN * self.width / WIDTH
        return REST + MAMBA * self.mamba + ATTENTION * self.attention + ffn


def paper_memory(listing: Listing) -> str:
    """A paragraph and a table: what the constants explain, and our items beside them."""
    text = " ".join([*explained(), *counted()])
    return "\n".join([*wrap(text, 100), "", *beside_ours(listing)])


def points() -> list[float]:
    """Memory of the figure's candidates, MiB."""
    record = json.loads((RECIPES / "nemotron-h-56b-figure-10.json").read_text())
    found: list[float] = record["memory_mib"]
    return found


def lattice() -> list[Shape]:
    """Shapes with an even number of layers in the ranges that the points need."""
    ranges = range(41, 55), range(41, 55), range(3, 7), range(28 * STEP, WIDTH + 1, STEP)
    return [shape for one in product(*ranges) if (shape := Shape(*one)).layers % 2 == 0]


def misses(shapes: list[Shape]) -> list[float]:
    """Distance of every point from the nearest shape, MiB."""
    values = [shape.mib for shape in shapes]
    return [min(abs(value - point) for value in values) for point in points()]


def chance(shapes: list[Shape]) -> float:
    """Share of the figure's range that lies within the tolerance of some shape."""
    low, high = min(points()), max(points())
    values = [shape.mib for shape in shapes]
    grid = [low + (high - low) * i / 9999 for i in range(10000)]
    near = sum(any(abs(value - x) <= TOLERANCE for value in values) for x in grid)
    return near / len(grid)


def explained() -> Iterator[str]:
    """How much the constants explain."""
    shapes = lattice()
    found = misses(shapes)
    hits = [miss for miss in found if miss <= TOLERANCE]
    above = sum(point > LIMIT_MIB for point in points())
    yield (
        f"{len(hits)} of its {len(found)} points are sums {REST} + {MAMBA} x Mamba + {ATTENTION} "
        f"x attention + {FFN} x FFN x width / {WIDTH} MiB, within {max(hits):.2f} MiB, of shapes "
        f"that keep 41 to 54 Mamba, 41 to 54 FFN and 3 to 6 attention layers, in all an even "
        f"number of them; a random number would be near such a sum with a chance of "
        f"{100 * chance(shapes):.0f} %. {above} points lie above the limit."
    )


def counted() -> Iterator[str]:
    """How many shapes stay below the figure's line by its own sums."""
    recipe, published = fitting(43, 48, 5), fitting(44, 48, 4)
    even = [shape for shape in published if shape.layers % 2 == 0]
    yield (
        f"By these sums {len(recipe)} candidates of the recipe's ranges stay below {LIMIT_MIB:,} "
        f"MiB, {len(published)} of the ranges that hold all that were circled, and {len(even)} of "
        f"those have an even number of layers."
    )


def fitting(mamba: int, ffn: int, attention: int) -> list[Shape]:
    """Shapes with at least so many layers of each kind, all nine widths, below the line."""
    widths = range(24 * STEP, WIDTH + 1, STEP)
    ranges = range(mamba, 55), range(ffn, 55), range(attention, 11), widths
    return [shape for one in product(*ranges) if (shape := Shape(*one)).mib <= LIMIT_MIB]


def beside_ours(listing: Listing) -> Iterator[str]:
    """The constants beside our items at the recipe's deployment, without a reserve."""
    model = listing.space.model
    architecture, hidden = model.architecture, model.architecture.hidden
    yield "| MiB | the figure's | ours, state in bf16 | ours, state in fp32 |"
    yield "|---|---|---|---|"
    theirs_of: dict[Kind, int] = {"mamba": MAMBA, "attention": ATTENTION, "ffn": FFN}
    for kind, theirs in theirs_of.items():
        layer = architecture.layers[architecture.indices(kind)[0]]
        ours = model.layer_bytes(layer, hidden)
        state = stored_bytes(model.layer(layer, hidden).state, "bf16")
        yield f"| {kind} layer | {theirs} | {ours / MIB:.1f} | {(ours + state) / MIB:.1f} |"
    rest = (model.bytes(model.base(hidden)) - model.deployment.reserve_bytes) / MIB
    yield f"| the rest | {REST} | {rest:.1f} | {rest:.1f} |"
