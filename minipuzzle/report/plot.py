"""The little that the report's charts need: scales, ticks, marks. Drawn by charts.html as SVG.

Colours and sizes are CSS classes, so that one drawing serves light, dark and paper.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
LOG_STEPS = ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0))


@dataclass(frozen=True)
class Scale:
    """Values `low` to `high` onto pixels `start` to `stop`, straight or in logarithms."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        low, high, x = map(self._inner, (self.low, self.high, value))
        share = 0.5 if high == low else (x - low) / (high - low)
        return round(self.start + share * (self.stop - self.start), 2)

    def _inner(self, value: float) -> float:
        return math.log(value) if self.log else value

    def ticks(self, most: int) -> list[float]:
        """At most about `most` round values inside."""
        return _log_ticks(self, most) if self.log else _ticks(self.low, self.high, most)


@dataclass(frozen=True)
class Line:
    """A path through points (x, y) in pixels."""

    points: Sequence[tuple[float, float]]
    css: str
    title: str = ""

    @property
    def path(self) -> str:
        """The `d` of an SVG path."""
        return "M" + "L".join(f"{x:.6g} {y:.6g}" for x, y in self.points)


@dataclass(frozen=True)
class Dot:
    """A circle; `title` is what it says when pointed at."""

    x: float
    y: float
    radius: float
    css: str
    title: str = ""


@dataclass(frozen=True)
class Box:
    """A rectangle from its top left corner."""

    x: float
    y: float
    width: float
    height: float
    css: str
    title: str = ""


@dataclass(frozen=True)
class Text:
    """A word at a place; `anchor` is start, middle or end."""

    x: float
    y: float
    text: str
    css: str = ""
    anchor: str = "start"


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis, in pixels."""

    at: float
    label: str


@dataclass
class Chart:
    """A drawing of `width` x `height` pixels: axes, then marks in the order they were added.

    `description` is read out to those who do not see it.
    """

    width: float
    height: float
    description: str
    x_label: str = ""
    y_label: str = ""
    left: float = 52
    right: float = 14
    top: float = 26
    bottom: float = 40
    x_ticks: list[Tick] = field(default_factory=list)
    y_ticks: list[Tick] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)
    dots: list[Dot] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)

    @property
    def narrow(self) -> bool:
        """Whether it is the drawing for a phone."""
        return self.width < 500

    def x_scale(self, values: Iterable[float], *, log: bool = False, pad: float = 0.03) -> Scale:
        """A scale over the values with some room, and its ticks on the axis below."""
        low, high = padded(values, pad, log=log)
        scale = Scale(low, high, self.left, self.width - self.right, log)
        ticks = scale.ticks(4 if self.narrow else 8)
        self.x_ticks = [Tick(scale(value), short(value)) for value in ticks]
        return scale

    def y_scale(self, values: Iterable[float], *, log: bool = False, pad: float = 0.06) -> Scale:
        """As `x_scale`, upwards on the left."""
        low, high = padded(values, pad, log=log)
        scale = Scale(low, high, self.height - self.bottom, self.top, log)
        self.y_ticks = [Tick(scale(value), short(value)) for value in scale.ticks(5)]
        return scale


def padded(values: Iterable[float], pad: float, *, log: bool = False) -> tuple[float, float]:
    """Smallest and largest value, moved apart by a share of their distance."""
    known = list(values)
    low, high = min(known), max(known)
    if log:
        room = (high / low) ** pad if high > low else 1.5
        return low / room, high * room
    room = (high - low) * pad if high > low else max(abs(high), 1.0) * 0.5
    return low - room, high + room


def short(value: float) -> str:
    """A tick's label: 0.02, 1.5, 300, 12k, 4e-6; with a real minus sign."""
    size = abs(value)
    if value == 0:
        text = "0"
    elif size >= 10_000:
        text = f"{value / 1000:g}k"
    elif size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        text = f"{float(mantissa):g}e{int(exponent)}"
    else:
        text = f"{value:.4g}"
    return text.replace("-", "\N{MINUS SIGN}")


def _ticks(low: float, high: float, most: int) -> list[float]:
    if high <= low:
        return [low]
    rough = (high - low) / max(1, most)
    power: float = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in STEPS if s * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _log_ticks(scale: Scale, most: int) -> list[float]:
    """Powers of ten, with as many values between them as there is room for."""
    first, last = math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high))
    if last - first > 2 * most:
        stride = math.ceil((last - first) / most)
        return [10.0**e for e in range(first, last + 1, stride) if _inside(10.0**e, scale)]
    best: list[float] = []
    for steps in LOG_STEPS:
        values = [s * 10.0**e for e in range(first, last + 1) for s in steps]
        inside = [value for value in values if _inside(value, scale)]
        if len(inside) > most and best:
            break
        best = inside or best
    return best if len(best) > 1 else _ticks(scale.low, scale.high, most)


def _inside(value: float, scale: Scale) -> bool:
    return scale.low * (1 - 1e-9) <= value <= scale.high * (1 + 1e-9)
