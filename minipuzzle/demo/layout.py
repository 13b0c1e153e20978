"""Questions about a file's layout, answered by `tokenize`."""

import io
import re
import tokenize
from collections.abc import Iterable, Iterator

from minipuzzle.demo.questions import Draft, Tokens
from minipuzzle.demo.scopes import SourceFile
from minipuzzle.demo.spots import REST

_NEXT_LINE = re.compile(r"\n( *)[^\s#]")


def indentation(file: SourceFile, tokens: Tokens, seed: int) -> Iterator[Iterable[Draft]]:
    """How far the next line is indented: as the last one, or one or two levels less."""
    for place, width in line_ends(file.text):
        following = _NEXT_LINE.match(file.text, place)
        if following is None or width < 12:
            continue
        levels = (width, width - 4, width - 8)
        if len(following.group(1)) in levels:
            yield _indent(file.text, tokens, place, levels, len(following.group(1)))


def _indent(
    text: str, tokens: Tokens, place: int, levels: tuple[int, ...], truth: int
) -> Iterator[Draft]:
    context = tokens.window(text, place)
    if context is not None:
        # The last space before a word belongs to the word's token.
        spelled = {level: "\n" + " " * (level - 1) for level in levels}
        rest = text[place : place + REST]
        yield Draft(context, spelled[truth], tuple(spelled.values()), rest)


def line_ends(text: str) -> Iterator[tuple[int, int]]:
    """Where logical lines end that open no block, and how far their first line is indented."""
    silent = (tokenize.INDENT, tokenize.DEDENT, tokenize.NL, tokenize.COMMENT)
    width: int | None = None
    for kind, place in _tokens(text):
        if kind == tokenize.NEWLINE:
            if width is not None and text[place - 1] not in ": ":
                yield place, width
            width = None
        elif width is None and kind not in silent:
            width = place - (text.rfind("\n", 0, place) + 1)


def _tokens(text: str) -> Iterator[tuple[int, int]]:
    """Type and place of Python's tokens, as far as the text is Python."""
    lines = [0, *(match.end() for match in re.finditer("\n", text))]
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            row, column = token.start
            yield token.type, lines[min(row, len(lines)) - 1] + column
    except (tokenize.TokenError, SyntaxError):
        return
