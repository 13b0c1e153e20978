"""Progress: bars that go, lines that stay, tables that fit; sparse lines where nobody watches."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipuzzle import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_few_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """100 steps of 1 s each at one line every 15 s."""
    clock = [0.0]
    monkeypatch.setattr("minipuzzle.progress.time.monotonic", lambda: clock[0])
    with progress.bar("score", 100, "blocks") as bar:
        for step in range(100):
            clock[0] += 1
            bar.note(f"loss {step}")
            bar.advance()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "  score: 15/100 blocks in 15.0 s loss 14"
    assert lines[-1] == "  score: 100/100 blocks in 1 min 40 s loss 99"
    assert len(lines) == 7


def test_a_log_gets_nothing_about_short_jobs(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("score", 3) as bar:
        bar.advance(3)
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_a_bar_that_fits_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    with progress.bar("a label that is much longer than fits here", 1000, "blocks") as bar:
        bar.advance(500)
        bar.note("a note that is much longer than fits")
        progress.say("a line [in] between")
        with progress.bar("inner", 2) as inner:
            inner.advance()
    progress.stage_line("score", "done in 1.0 s")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", shown)]
    assert max(map(len, lines)) <= 80
    assert any("500/1000 blocks" in line for line in lines)
    assert "a line [in] between" in lines
    assert lines[-2:] == ["score    done in 1.0 s", ""]


def test_a_failure_inside_leaves_no_bar_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", Terminal())
    with pytest.raises(ValueError, match="inside"), progress.bar("score", 2):
        raise ValueError("inside")
    assert progress._live is None


def test_table() -> None:
    text = progress.table(["", "teacher", "student"], [["memory", "8.0 MiB", "6 MiB"]])
    assert text.splitlines() == [
        "        teacher  student",
        "------  -------  -------",
        "memory  8.0 MiB    6 MiB",
    ]


CELLS = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=8)


@given(st.lists(st.tuples(CELLS, CELLS, CELLS), max_size=5))
def test_table_columns_are_aligned_and_complete(rows: list[tuple[str, str, str]]) -> None:
    lines = progress.table(["name", "one", "two"], rows).split("\n")
    assert len(lines) == len(rows) + 2
    assert max(map(len, lines)) <= 80
    edge = [match.end() for match in re.finditer(r"-+", lines[1])]
    for row, line in zip(rows, lines[2:], strict=True):
        padded = line.ljust(len(lines[1]))
        assert padded.startswith(row[0])
        assert padded[: edge[1]].endswith(row[1]) and padded[: edge[2]].endswith(row[2])
