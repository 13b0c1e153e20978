"""What can be served: sizes that engines and kernels accept, and the nearest ones to a wish.

Constraints of the files themselves (equal numbers from every group, one shape per kind) belong to
selections and families. These here come from what runs a model: `causal_conv1d` fails where the
number of Mamba heads is no multiple of 8, kernels and quantised formats want rows of 256 weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import gcd, lcm

from minipuzzle.errors import UserError


@dataclass(frozen=True)
class Constraints:
    """Sizes that a cut axis may have; an axis that is not cut may keep any size.

    `heads`: Mamba heads are a multiple of this; `fine`: so are FFN width, hidden channels and head
    channels; `coarse`: but of this where the teacher's own size is at least `coarse_from` and a
    multiple of it. `least_layers`: of every kind that the teacher has, as many must stay.
    """

    heads: int = 8
    fine: int = 8
    coarse: int = 256
    coarse_from: int = 4096
    least_layers: int = 1

    def multiple(self, axis: str, size: int, *, groups: int = 1) -> int:
        """What a cut axis of `size` units must be a multiple of.

        `groups`: how many groups the units come from in equal numbers; for an axis of groups, the
        number of units in each group instead (`groups` of Mamba heads).
        """
        if axis in ("width", "hidden", "head_dim"):
            real = size >= self.coarse_from and size % self.coarse == 0
            return self.coarse if real else self.fine
        if axis == "heads":
            return lcm(self.heads, groups)
        if axis == "groups":
            return self.heads // gcd(self.heads, groups)
        return groups if axis == "query_heads" else 1

    def allowed(self, axis: str, size: int, *, groups: int = 1) -> tuple[int, ...]:
        """All sizes that a cut may leave, ascending, the whole included."""
        step = self.multiple(axis, size, groups=groups)
        return (*range(step, size, step), size)

    def require(self, keep: int, axis: str, size: int, *, where: str, groups: int = 1) -> None:
        """UserError that names the nearest allowed sizes unless `keep` is one."""
        allowed = self.allowed(axis, size, groups=groups)
        if keep in allowed:
            return
        step = self.multiple(axis, size, groups=groups)
        rule = f"it must be all or a multiple of {step} below" if step < size else "it must be all"
        raise UserError(
            f"{where} cannot keep {keep} of {size} `{axis}`: {rule}; {nearest(keep, allowed)}"
        )


SERVING = Constraints()
"""For models that will be used."""
SLICEABLE = Constraints(heads=1, fine=1, coarse=1, least_layers=0)
"""For experiments: whatever a checkpoint can hold."""


def nearest(wish: int, allowed: Iterable[int]) -> str:
    """The allowed numbers on both sides of a wish, in words."""
    below = max((n for n in allowed if n < wish), default=None)
    above = min((n for n in allowed if n > wish), default=None)
    both = [str(n) for n in (below, above) if n is not None]
    assert both, "something is always allowed"
    return (
        f"the nearest is {both[0]}" if len(both) == 1 else f"the nearest are {' and '.join(both)}"
    )
