"""Which keyword comes next: the one kind of question that asks for structure, not for a name."""

import io
import keyword
import re
import tokenize
from collections.abc import Iterable, Iterator

from minipuzzle.demo.questions import Draft, Tokens, shuffled
from minipuzzle.demo.scopes import SourceFile
from minipuzzle.demo.spots import REST

INFIX = frozenset({"and", "else", "for", "if", "in", "is", "not", "or"})
"""Keywords that may follow an expression."""
_WORDS = frozenset(keyword.kwlist) - {"None", "True", "False"}
_OPENING = {getattr(tokenize, name, None) for name in ("FSTRING_START", "TSTRING_START")}
_CLOSING = {getattr(tokenize, name, None) for name in ("FSTRING_END", "TSTRING_END")}


def next_keyword(file: SourceFile, tokens: Tokens, seed: int) -> Iterator[Iterable[Draft]]:
    """Which keyword goes on after an expression; the wrong ones are drawn from the file's others.

    The `in` that every `for` has is not asked for. One question per function.
    """
    places = list(_places(file.text))
    pool = [string for string, _ in places]

    def drafts(inside: list[tuple[str, int]]) -> Iterator[Draft]:
        for string, place in shuffled(inside, seed, "keyword", file.name, inside[0][1])[:4]:
            context = tokens.window(file.text, place - 1)
            if context is not None:
                others = tuple(" " + other for other in shuffled(pool, seed, file.name, place))
                yield Draft(context, " " + string, others, file.text[place - 1 : place + REST])

    for function in file.functions if len(set(pool)) >= 4 else ():
        if inside := [spot for spot in places if function.body <= spot[1] < function.end]:
            yield drafts(inside)


def _places(text: str) -> Iterator[tuple[str, int]]:
    """Keywords after an expression and one space, and where they stand."""
    before, loops = "", 0
    for kind, string, place in _tokens(text):
        if kind == tokenize.NAME and string in INFIX:
            if string == "in" and loops:
                loops -= 1
            elif before not in _WORDS and re.search(r"\S $", text[place - 2 : place]):
                yield string, place
            loops += string == "for"
        before = string


def _tokens(text: str) -> Iterator[tuple[int, str, int]]:
    """Type, text and place of Python's tokens, as far as the text is Python.

    What stands inside formatted strings is left out: Python before 3.12 does not look into them.
    """
    lines = [0, *(match.end() for match in re.finditer("\n", text))]
    strings = 0
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            strings += (token.type in _OPENING) - (token.type in _CLOSING)
            if not strings:
                row, column = token.start
                yield token.type, token.string, lines[min(row, len(lines)) - 1] + column
    except (tokenize.TokenError, SyntaxError):
        return
