"""What a long job shows: one moving bar, one line that stays for each stage, plain text in logs.

On a terminal a bar moves and vanishes when done. Elsewhere (a file, a pipe, CI) a bar writes a
line at most every :data:`PLAIN_SECONDS`. Nothing is wider than 80 columns. Standard output only;
rich is imported when the first bar appears.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from minipuzzle.units import format_seconds

if TYPE_CHECKING:
    from rich.progress import Progress

WIDTH = 80
PLAIN_SECONDS = 15.0

_live: Progress | None = None  # the bar on the screen: a second one joins it, `say` writes above it


class Bar(Protocol):
    """What ``bar`` hands out."""

    def advance(self, steps: int = 1) -> None:
        """Count ``steps`` more of the bar's total."""

    def note(self, text: str) -> None:
        """Show ``text`` (a loss, a size) beside the bar."""


@contextmanager
def bar(label: str, total: int, unit: str = "") -> Iterator[Bar]:
    """A progress bar over ``total`` steps of ``unit`` ("blocks", "trials")."""
    if sys.stdout.isatty():
        with _screen() as screen:
            row = _ScreenBar(screen, label, total, unit)
            try:
                yield row
            finally:
                row.close()
    else:
        plain = _PlainBar(label, total, unit)
        yield plain
        plain.close()


def say(text: str = "") -> None:
    """Print ``text``, above the moving bar where there is one."""
    if _live is not None:
        _live.console.print(text, markup=False, highlight=False, soft_wrap=True)
    else:
        print(text, flush=True)


def stage_line(name: str, text: str) -> None:
    """The line that stays for a stage: its name in a column, then ``text``."""
    say(f"{name:<8} {text}")


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned text columns: the first to the left, the others to the right.

    Columns are two spaces apart, or one where that is what makes the table fit 80 columns.
    """
    assert all(len(row) == len(headers) for row in rows), (headers, rows)
    lines = [list(headers), *[list(row) for row in rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    gap = "  " if sum(widths) + 2 * len(widths) - 2 <= WIDTH else " "
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(gap.join(_aligned(line, widths)).rstrip() for line in lines)


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [
        cell.ljust(width) if column == 0 else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]


@contextmanager
def _screen() -> Iterator[Progress]:
    """The bar area of the terminal: the one that is there, or a new one that vanishes at exit."""
    global _live
    if _live is not None:
        yield _live
        return
    from rich import progress as rich_progress
    from rich.console import Console

    screen = rich_progress.Progress(
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(bar_width=20),
        rich_progress.TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}"),
        rich_progress.TimeRemainingColumn(),
        rich_progress.TextColumn("{task.fields[note]}"),
        console=Console(width=min(WIDTH, Console().width)),
        transient=True,
    )
    with screen:
        _live = screen
        try:
            yield screen
        finally:
            _live = None


class _ScreenBar:
    """A row of the rich display; it goes when its work is done."""

    def __init__(self, screen: Progress, label: str, total: int, unit: str) -> None:
        self._screen = screen
        self._task = screen.add_task(label[:24], total=total, unit=unit, note="")

    def advance(self, steps: int = 1) -> None:
        self._screen.advance(self._task, steps)

    def note(self, text: str) -> None:
        self._screen.update(self._task, note=text[:20])

    def close(self) -> None:
        self._screen.remove_task(self._task)


class _PlainBar:
    """Lines for a log: one after every ``PLAIN_SECONDS``, one at the end if there was any."""

    def __init__(self, label: str, total: int, unit: str) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._done = 0
        self._note = ""
        self._started = self._printed = time.monotonic()

    def advance(self, steps: int = 1) -> None:
        self._done += steps
        if time.monotonic() - self._printed >= PLAIN_SECONDS:
            self._print()

    def note(self, text: str) -> None:
        self._note = text

    def close(self) -> None:
        if self._printed != self._started:
            self._print()

    def _print(self) -> None:
        self._printed = time.monotonic()
        took = format_seconds(self._printed - self._started)
        line = f"  {self._label}: {self._done}/{self._total} {self._unit} in {took} {self._note}"
        say(line.rstrip()[:WIDTH])
