"""The search space: how many layers of each kind go, and how wide the FFN stays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from minipuzzle.architecture import Architecture, FFNLayer, Kind
from minipuzzle.errors import UserError
from minipuzzle.families.table import Family
from minipuzzle.memory import Deployment, memory
from minipuzzle.plan import with_width, without
from minipuzzle.prune.constraints import SERVING
from minipuzzle.prune.select import select
from minipuzzle.recipe import SearchConfig
from minipuzzle.scores import Scores
from minipuzzle.selection import Selection
from minipuzzle.units import format_bytes

WIDTH_CHOICES = 3  # the widest that fits and the next two: narrower ones are dominated


@dataclass(frozen=True)
class Point:
    """One architecture of the space: removed layers per kind, and the FFN width of the others."""

    mamba: int
    attention: int
    ffn: int
    width: int

    @property
    def removed(self) -> dict[Kind, int]:
        """Removed layers per kind."""
        return {"mamba": self.mamba, "attention": self.attention, "ffn": self.ffn}


@dataclass(frozen=True)
class Space:
    """Points under a budget. The memory of a point is known before anything is evaluated."""

    architecture: Architecture
    family: Family
    deployment: Deployment
    budget_bytes: int
    limits: dict[Kind, int]
    widths: tuple[int, ...]  # ascending

    def shape(self, point: Point) -> Architecture:
        """The architecture of a point (which layers go does not matter for its size)."""
        cut = self.architecture
        for kind, number in point.removed.items():
            cut = without(cut, kind, number)
        return with_width(cut, point.width)

    def memory_bytes(self, point: Point) -> int:
        """Total memory of a point at the deployment."""
        return memory(self.shape(point), self.family, self.deployment).total

    def fitting_widths(self, mamba: int, attention: int, ffn: int) -> tuple[int, ...]:
        """The widest FFN widths under the budget for these removals, ascending; may be empty."""
        removed: dict[Kind, int] = {"mamba": mamba, "attention": attention, "ffn": ffn}
        if not self.family.whole_blocks(removed):
            return ()
        fits = [
            width
            for width in self.widths
            if self.memory_bytes(Point(mamba, attention, ffn, width)) <= self.budget_bytes
        ]
        return tuple(fits[-WIDTH_CHOICES:])

    def frontier(self) -> Iterator[Point]:
        """For every combination of removals the point with the widest FFN that fits.

        Fewest removed layers first.
        """
        ranges = (range(self.limits[kind] + 1) for kind in ("mamba", "attention", "ffn"))
        for mamba, attention, ffn in sorted(product(*ranges), key=lambda c: (sum(c), c)):
            if widths := self.fitting_widths(mamba, attention, ffn):
                yield Point(mamba, attention, ffn, widths[-1])

    def selection(self, point: Point, scores: Scores) -> Selection:
        """The point as a cut: the best layers and channels by score."""
        sizes = {"width": point.width}
        units = self.family.removable(self.architecture)
        return select(scores, self.architecture, removed=point.removed, sizes=sizes, units=units)


def make_space(
    architecture: Architecture,
    family: Family,
    deployment: Deployment,
    budget_bytes: int,
    config: SearchConfig,
) -> Space:
    """The recipe's space for a model.

    Raises:
        UserError: when the model fits already, or no point of the space is under the budget.
    """
    total = memory(architecture, family, deployment).total
    if total <= budget_bytes:
        raise UserError(
            f"the model needs {format_bytes(total)} and fits the budget of "
            f"{format_bytes(budget_bytes)} as it is; lower the budget"
        )
    space = Space(
        architecture=architecture,
        family=family,
        deployment=deployment,
        budget_bytes=budget_bytes,
        limits=_limits(architecture, family, config),
        widths=_widths(architecture, config),
    )
    if next(space.frontier(), None) is None:
        least = Point(**space.limits, width=space.widths[0])
        raise UserError(
            f"the budget of {format_bytes(budget_bytes)} cannot be reached: the smallest "
            f"architecture of the search space needs {format_bytes(space.memory_bytes(least))}; "
            "raise search.max_removed, lower search.min_width or raise the budget"
        )
    return space


def _limits(architecture: Architecture, family: Family, config: SearchConfig) -> dict[Kind, int]:
    """How many layers of each kind may go: the recipe's number, but one always stays.

    Kinds that share a block go together, so the largest of their numbers counts for all.
    """
    counts = architecture.counts()
    wanted: dict[Kind, int] = {
        "mamba": config.max_removed.mamba,
        "attention": config.max_removed.attention,
        "ffn": config.max_removed.ffn,
    }
    blocks = max((wanted[kind] for kind in family.block), default=0)
    wanted |= dict.fromkeys(family.block, blocks)
    return {kind: max(0, min(number, counts[kind] - 1)) for kind, number in wanted.items()}


def _widths(architecture: Architecture, config: SearchConfig) -> tuple[int, ...]:
    """Multiples of the step from the narrowest width up to the teacher's own that can be served."""
    widest = max((x.width for x in architecture.layers if isinstance(x, FFNLayer)), default=0)
    if not widest:
        return (0,)
    step = config.width_step
    first = max(step, -(-int(config.min_width * widest) // step) * step)
    return tuple(
        sorted({*range(first, widest, step), widest} & {*SERVING.allowed("width", widest)})
    )
