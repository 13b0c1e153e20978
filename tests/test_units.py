"""Units: what people write is read exactly, and what is not understood is refused."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipuzzle.errors import UserError
from minipuzzle.units import (
    BYTE_UNITS,
    Budget,
    format_bytes,
    format_count,
    format_seconds,
    format_tokens,
    parse_budget,
    parse_bytes,
    parse_tokens,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("31.7GiB", 34_037_615_820),  # 31.7 x 2^30 = 34037615820.8
        ("0GiB", 0),
        ("16 MiB", 16_777_216),
        (" 1.5KiB ", 1536),
        (".5KiB", 512),
        ("80GB", 80_000_000_000),
        ("3kB", 3000),
        ("12B", 12),
        ("2TiB", 2**41),
    ],
)
def test_bytes(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("31.7gib", "did you mean GiB?"),
        ("31.7Gb", "did you mean GB?"),
        ("31.7G", "known units are B, KiB"),
        ("31.7", "has no unit"),
        ("83%", "unknown unit %"),
        ("GiB", "is not a size"),
        ("-1GiB", "is not a size"),
        ("1 2GiB", "is not a size"),
        ("1e3GiB", "is not a size"),
        ("١GiB", "is not a size"),
        ("infGiB", "is not a size"),
        ("", "is not a size"),
    ],
)
def test_strange_bytes(text: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_bytes(text)
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1M", 1_048_576), ("128k", 131_072), ("2048", 2048), (2048, 2048), ("1.5k", 1536)],
)
def test_tokens(text: str | int, expected: int) -> None:
    assert parse_tokens(text) == expected


@pytest.mark.parametrize("text", ["1K", "1m", "1G", "0", "0k", "1.5", "-1", "", "k", "1.0001k"])
def test_strange_tokens(text: str) -> None:
    with pytest.raises(UserError):
        parse_tokens(text)


def test_budget() -> None:
    assert parse_budget("83%") == Budget(fraction=Fraction(83, 100))
    assert parse_budget("83%").of(1000) == 830
    assert parse_budget("31.7GiB").of(1) == 34_037_615_820
    assert parse_budget("100%").of(7) == 7
    assert parse_budget("29%").of(100) == 29  # 28 in floating point


@pytest.mark.parametrize("text", ["0%", "101%", "83", "0GiB", "-5%", "%", "83 percent"])
def test_strange_budgets(text: str) -> None:
    with pytest.raises(UserError):
        parse_budget(text)


@given(st.integers(1, 2**50), st.sampled_from(sorted(BYTE_UNITS)))
def test_whole_numbers_of_any_unit_are_exact(count: int, unit: str) -> None:
    assert parse_bytes(f"{count}{unit}") == count * BYTE_UNITS[unit]


@given(st.integers(1, 2**40))
def test_tokens_written_are_read_back(count: int) -> None:
    assert parse_tokens(format_tokens(count)) == count


@given(st.integers(0, 2**45))
def test_bytes_written_are_read_back_to_three_digits(count: int) -> None:
    assert parse_bytes(format_bytes(count).replace(",", "")) == pytest.approx(count, rel=6e-3)


@pytest.mark.parametrize(
    ("function", "value", "expected"),
    [
        (format_bytes, 13 * 2**20, "13.00 MiB"),
        (format_bytes, 1023, "1023 B"),
        (format_count, 56_324_350_464, "56.32 B"),
        (format_count, 8_290_000, "8.29 M"),
        (format_count, 12, "12"),
        (format_seconds, 4.24, "4.2 s"),
        (format_seconds, 59.97, "1 min 00 s"),
        (format_seconds, 200, "3 min 20 s"),
        (format_seconds, 18_420, "5 h 07 min"),
        (format_tokens, 2**20, "1M"),
        (format_tokens, 131_072, "128k"),
        (format_tokens, 1000, "1000"),
    ],
)
def test_written(function: Callable[[float], str], value: float, expected: str) -> None:
    assert function(value) == expected
