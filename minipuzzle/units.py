"""Sizes, shares and token counts as people write them, read strictly and written back.

Bytes: ``"31.7GiB"`` (binary) or ``"50GB"`` (decimal); budgets: a size or a share, ``"83%"``;
contexts: ``"2048"``, ``"128k"`` = 128 * 2^10, ``"1M"`` = 2^20 tokens. A unit that is none of these
is refused with the nearest one: a "Gb" read as something is a wrong budget nobody sees.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from minipuzzle.errors import UserError

BYTE_UNITS = {
    "B": 1,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
TOKEN_UNITS = {"": 1, "k": 2**10, "M": 2**20}
PARAMETER_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
TIME_UNITS = {"us": Fraction(1, 10**6), "ms": Fraction(1, 1000), "s": Fraction(1)}
_NUMBER = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z%]*)\s*\Z", re.ASCII)


@dataclass(frozen=True)
class Budget:
    """A limit of memory: either ``fraction`` of the teacher's total or a number of ``bytes``."""

    fraction: Fraction | None = None
    bytes: int | None = None

    def __post_init__(self) -> None:
        assert (self.fraction is None) != (self.bytes is None), self

    def of(self, teacher_bytes: int) -> int:
        """The limit in bytes for a teacher of ``teacher_bytes``, rounded down."""
        if self.bytes is not None:
            return self.bytes
        assert self.fraction is not None
        return math.floor(self.fraction * teacher_bytes)


@dataclass(frozen=True)
class Limit:
    """A limit of something else: a ``fraction`` of the teacher's, or an ``amount``."""

    fraction: Fraction | None = None
    amount: Fraction | None = None

    def of(self, teachers: float) -> float:
        """The limit where the teacher has ``teachers``."""
        if self.amount is not None:
            return float(self.amount)
        assert self.fraction is not None
        return float(self.fraction * Fraction(teachers))


def parse_bytes(text: str) -> int:
    """``"31.7GiB"`` -> bytes, rounded down. UserError for a missing or unknown unit."""
    number, unit = _split(text, "size", "31.7GiB")
    if unit not in BYTE_UNITS:
        raise UserError(_unit_message(text, "size", unit, list(BYTE_UNITS), "31.7GiB"))
    return math.floor(number * BYTE_UNITS[unit])


def parse_budget(text: str) -> Budget:
    """``"83%"`` or ``"31.7GiB"`` -> Budget. UserError unless it is above zero."""
    number, unit = _split(text, "budget", '"83%" or "31.7GiB"')
    if unit == "%":
        if not 0 < number <= 100:
            raise UserError(f'budget "{text}" must be above 0% and at most 100% of the teacher')
        return Budget(fraction=number / 100)
    if not unit:
        raise UserError(f'budget "{text}" has no unit; write it like "83%" or "31.7GiB"')
    size = parse_bytes(text)
    if size == 0:
        raise UserError(f'budget "{text}" must be above zero')
    return Budget(bytes=size)


def parse_parameters(text: str) -> Limit:
    """``"4B"``, ``"6.9M"``, ``"83%"`` -> Limit in parameters (decimal). UserError otherwise."""
    return _parse_limit(text, "number of parameters", PARAMETER_UNITS, '"4B" or "83%"')


def parse_latency(text: str) -> Limit:
    """``"12ms"``, ``"0.2s"``, ``"83%"`` -> Limit in seconds. UserError otherwise."""
    return _parse_limit(text, "latency", TIME_UNITS, '"12ms" or "83%"')


def _parse_limit(text: str, what: str, units: Mapping[str, int | Fraction], example: str) -> Limit:
    number, unit = _split(text, what, example)
    if unit == "%" and 0 < number <= 100:
        return Limit(fraction=number / 100)
    if unit not in units:
        raise UserError(_unit_message(text, what, unit, [u for u in units if u], example))
    if number == 0:
        raise UserError(f'{what} "{text}" must be above zero')
    return Limit(amount=number * units[unit])


def parse_tokens(text: str | int) -> int:
    """``"128k"``, ``"1M"``, ``"2048"`` or an integer -> tokens, at least 1. UserError otherwise."""
    number, unit = _split(str(text), "number of tokens", "128k")
    if unit not in TOKEN_UNITS:
        message = _unit_message(str(text), "number of tokens", unit, ["k", "M"], "128k")
        raise UserError(message)
    tokens = number * TOKEN_UNITS[unit]
    if tokens != int(tokens) or tokens < 1:
        raise UserError(f'"{text}" is not a whole number of tokens of at least 1')
    return int(tokens)


def format_bytes(count: float) -> str:
    """Bytes in the largest binary unit that leaves at least 1: ``"13.1 MiB"``."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if abs(count) >= BYTE_UNITS[unit]:
            return f"{count / BYTE_UNITS[unit]:,.2f} {unit}"
    return f"{count:.0f} B"


def format_tokens(count: int) -> str:
    """Tokens in the largest unit that divides them: 131072 -> ``"128k"``, 1000 -> ``"1000"``."""
    for unit in ("M", "k"):
        if count and count % TOKEN_UNITS[unit] == 0:
            return f"{count // TOKEN_UNITS[unit]}{unit}"
    return str(count)


def format_count(count: float) -> str:
    """Parameters in short: 56324350464 -> ``"56.32 B"``, 8290000 -> ``"8.29 M"``."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(count) >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f}"


def format_seconds(seconds: float) -> str:
    """A duration: ``"4.2 s"``, ``"3 min 20 s"``, ``"5 h 07 min"``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _split(text: str, what: str, example: str) -> tuple[Fraction, str]:
    """The exact number and the unit of ``text``. UserError unless it is a number and a word."""
    match = _NUMBER.match(text)
    if match is None:
        raise UserError(f'"{text}" is not a {what}; write it like {example}')
    return Fraction(match[1]), match[2]


def _unit_message(text: str, what: str, unit: str, known: list[str], example: str) -> str:
    """The one line for a unit that is missing or not known, with the nearest known one."""
    if not unit:
        return f'{what} "{text}" has no unit; write one of {", ".join(known)}, like {example}'
    near = [name for name in known if name.lower() == unit.lower()]
    hint = f"did you mean {near[0]}?" if near else f"known units are {', '.join(known)}"
    return f'{what} "{text}" has the unknown unit {unit}; {hint}'
