"""What the study hands out: trials, and what a judge says of points."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .costs import Costs
from .proxies import Proxies
from .space import Point


@dataclass(frozen=True)
class Judged:
    """What a point is worth; `screened`: it was given up early, by few sequences."""

    proxies: Proxies
    screened: bool


Judge = Callable[[Sequence[Point]], list[Judged]]


@dataclass(frozen=True)
class Trial:
    """A point that was evaluated, by the trial `number` of the study."""

    number: int
    point: Point
    costs: Costs
    proxies: Proxies
    screened: bool

    def to_json(self) -> dict[str, Any]:
        """A flat record for trials.json."""
        return {
            "number": self.number,
            "point": self.point.to_json(),
            **asdict(self.costs),
            **asdict(self.proxies),
            "screened": self.screened,
        }
