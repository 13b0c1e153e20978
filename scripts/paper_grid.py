"""The paper's grid for the 56B: how many candidates there are, and where the published ones stand.

Counts recipes/nemotron-h-56b-rtx5090.yaml and variations of it from a config.json and the published
curve of layer scores alone, looks up the architectures that the paper names, and writes both as the
tables of docs/the-paper-case.md.

    python scripts/paper_grid.py
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from figures import record
from paper_memory import Shape, paper_memory

from minipuzzle.architecture import FFNLayer, Layer
from minipuzzle.recipe import Recipe
from minipuzzle.search.listing import Listing, list_space, published_scores
from minipuzzle.search.space import Point
from minipuzzle.source import resolve_config

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"
PAGE = ROOT / "docs" / "the-paper-case.md"
GIB = 2**30

# Shape with Nemotron-H-47B-Base: hybrid_override_pattern of its config.json.
RELEASED = (
    "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-M-"
    "M-M-M-M-"
)
TEXT = frozenset((7, 29, 73, 84, 95)) | {
    77,
    79,
    81,
    83,
    86,
    88,
    90,
    97,
    99,
    101,
    87,
    89,
    91,
    93,
    96,
}


PUBLISHED = {
    "released 47B": Shape(45, 48, 5, 30720),
    "section 3.5 = candidate 2": Shape(44, 49, 5, 30720),
    "candidates 1 and 3, figure 11": Shape(46, 48, 4, 32768),
}
VARIATIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("the recipe", ()),
    (
        "as many of each kind as any published one lost",
        ("search.max_removed={mamba: 10, ffn: 6, attention: 6}",),
    ),
    ("the same, 5 attention layers", ("search.max_removed.mamba=10",)),
    ("one Mamba layer more", ("search.max_removed.mamba=12",)),
    ("one FFN layer more", ("search.max_removed.ffn=7",)),
    ("limit of 32,500 MiB", ("budget=31.73828125GiB",)),
    (
        "that limit, states in fp32, 1.33 GiB reserved",
        ("budget=31.73828125GiB", "deployment.state=fp32", "deployment.reserve=1.33GiB"),
    ),
    (
        "10^6 tokens, 1.88 GiB reserved",
        ("deployment.context=1000000", "deployment.reserve=1.88GiB"),
    ),
)


def main() -> None:
    """Count, record, write the tables."""
    found = {name: paper_listing(overrides) for name, overrides in VARIATIONS}
    grid = found["the recipe"]
    assert grid.points is not None
    record(
        "search",
        {
            "grid_feasible": (len(grid.points), "candidates"),
            "grid_feasible_without_reserve": (grid.without_reserve, "candidates"),
        },
    )
    page = PAGE.read_text(encoding="utf-8")
    page = insert(page, "\n".join([*counts(found), "", *whereabouts(grid)]), "grid")
    PAGE.write_text(insert(page, paper_memory(grid), "memory"), encoding="utf-8")


def paper_listing(overrides: Sequence[str] = ()) -> Listing:
    """The space of the recipe with the published curve."""
    model = RECIPES / "configs" / "nemotron-h-56b"
    recipe = Recipe.load(RECIPES / "nemotron-h-56b-rtx5090.yaml", [f"model={model}", *overrides])
    family, architecture = resolve_config(recipe.model)
    scores, _ = published_scores(RECIPES / "nemotron-h-56b-layer-mse.json", architecture)
    return list_space(recipe, architecture, family, scores)


def point_of(listing: Listing, wanted: Shape) -> Point | None:
    """The feasible candidate with these counts and width."""
    there = listing.space.architecture.counts()
    for point in listing.points or ():
        kept = [there[k] - point[f"removed.{k}"] for k in ("mamba", "ffn", "attention")]
        if (*kept, point["width"]) == (wanted.mamba, wanted.ffn, wanted.attention, wanted.width):
            return point
    return None


def counts(found: dict[str, Listing]) -> Iterator[str]:
    """How many candidates fit, for every variation."""
    yield "| most that go: Mamba, FFN, attention | combinations | fit | fit without reserve |"
    yield "|---|---|---|---|"
    for name, listing in found.items():
        space = listing.space
        most = {p.name: p.choices[-1] for p in space.parameters}
        ranges = ", ".join(str(most[f"removed.{k}"]) for k in ("mamba", "ffn", "attention"))
        assert listing.points is not None
        yield (
            f"| {ranges}: {name} | {space.cardinality:,} | {len(listing.points):,} "
            f"| {listing.without_reserve:,} |"
        )


def whereabouts(grid: Listing) -> Iterator[str]:
    """Memory of the published architectures, and whether the grid has them layer for layer."""
    yield "| published | Mamba, FFN, attention | FFN width | GiB | by figure 10 | in the grid |"
    yield "|---|---|---|---|---|---|"
    for name, one in PUBLISHED.items():
        point = point_of(grid, one)
        kinds = f"{one.mamba}, {one.ffn}, {one.attention}"
        need = memory_bytes(grid, one) / GIB
        yield (
            f"| {name} | {kinds} | {one.width} | {need:.2f} | {one.mib / 1024:.2f} "
            f"| {verdict(grid, point)} |"
        )


def memory_bytes(grid: Listing, one: Shape) -> int:
    """What it needs at the recipe's deployment, in the grid or not."""
    whole = grid.space.architecture
    left = {"mamba": one.mamba, "ffn": one.ffn, "attention": one.attention}
    layers = [layer for kind, n in left.items() for layer in _some(grid, kind, n, one.width)]
    return grid.space.model.of(replace(whole, layers=tuple(layers))).memory_bytes


def _some(grid: Listing, kind: str, number: int, width: int) -> list[Layer]:
    layers = [layer for layer in grid.space.architecture.layers if layer.kind == kind]
    return [FFNLayer(width) if kind == "ffn" else layer for layer in layers[:number]]


def verdict(grid: Listing, point: Point | None) -> str:
    """Whether the curve gives the published layers."""
    if point is None:
        return "no"
    if grid.space.shape(point).pattern == RELEASED:
        return "yes, layer for layer"
    return "yes, layer for layer" if set(grid.gone(point)) == TEXT else "yes, with other layers"


def insert(page: str, text: str, name: str) -> str:
    """The page with the text between the markers of that name."""
    begin, end = f"<!-- {name}: scripts/paper_grid.py -->", f"<!-- end of {name} -->"
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    assert rest and after, f"{PAGE} has lost the markers of {name}"
    return f"{before}{begin}\n{text}\n{end}{after}"


if __name__ == "__main__":
    main()
