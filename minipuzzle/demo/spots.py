"""Places where a name is asked for, and the contexts that lead up to them."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from minipuzzle.demo.questions import CONTEXT_TOKENS, Draft, Tokens, find_last_word, shuffled
from minipuzzle.demo.scopes import WORD, Function, SourceFile, Use

REST = 24
"""Characters after a context that show how its continuation is cut into tokens."""
SHORTEST_TAIL = 24
"""Tokens of the function that a composed context shows at least."""
RECEIVERS = frozenset({"self", "cls"})


@dataclass(frozen=True)
class Spot:
    """A name that is read, after a context.

    Attributes:
        context: ends where the choice begins.
        name: the name that stands there.
        lead: the space before it, or ""; "" too where its first underscores are in the context.
        rest: what follows the context in the file.
        begin: the character of the file where the context begins; of a composed one, where the
            part of the function would begin if all of the context stood in the file.
    """

    context: str
    name: str
    lead: str
    rest: str
    begin: int

    def mentions(self, name: str, start: int = 0) -> bool:
        """Whether the context, from a character of the file on, has the name as a whole word."""
        return find_last_word(self.context[max(0, start - self.begin) :], name) is not None

    def recalls(self, tokens: Tokens, least: int, start: int = 0) -> bool:
        """Whether the name was mentioned, from `start` on, at least so many tokens ago."""
        place = find_last_word(self.context, self.name)
        if place is None or self.begin + place < start:
            return False
        between = self.context[place + len(self.name) :]
        # A token has at least one character: most answers need no tokenizer.
        return len(between) >= least and len(tokens.ids(between)) >= least

    def draft(self, others: Iterable[str]) -> Draft:
        """The question with these wrong names."""
        wrong = tuple(self.lead + first_word(other) for other in others)
        return Draft(self.context, self.lead + first_word(self.name), wrong, self.rest)


def spot(file: SourceFile, tokens: Tokens, use: Use) -> Spot | None:
    """The spot of a use whose context is the lines before it; None if no choice fits there."""
    border = _border(file.text, use, tokens)
    context = tokens.window(file.text, border[0]) if border else None
    return _spot(file, use, border, context)


def composed_spot(
    file: SourceFile, tokens: Tokens, head: str, function: Function, use: Use
) -> Spot | None:
    """The spot of a use whose context is other text, the `def` line, and the lines before it.

    Between the `def` line and those lines there may be a gap; no name in the gap is shown.
    """
    border = _border(file.text, use, tokens)
    if border is None:
        return None
    end = border[0]
    left = CONTEXT_TOKENS - len(tokens.ids(head)) - 1
    tail = tokens.window(file.text, end, left) if left >= SHORTEST_TAIL else None
    if tail is not None and end - len(tail) > function.start:
        definition = file.text[function.start : function.body].rstrip() + "\n"
        left -= len(tokens.ids(definition))
        tail = tokens.window(file.text, end, left) if left >= SHORTEST_TAIL else None
        tail = tail and definition + tail
    elif tail is not None:
        tail = file.text[function.start : end]
    return _spot(file, use, border, tail and head + tail)


def first_word(name: str) -> str:
    """What of a name is a choice: `graph` of `_graph_type`, all of a name that is one word."""
    found = _FIRST_WORD.match(name)
    return found.group(1) if found else name


def rivals(at: Spot, function: Function, seed: int) -> list[str]:
    """Other names of the function that its part of the context mentions, drawn by mention."""
    own = at.context[max(0, function.start - at.begin) :]
    mentions = [word for word in re.findall(WORD, own) if word in function.bound - RECEIVERS]
    return [name for name in shuffled(mentions, seed, at.begin, at.context) if name != at.name]


def unmentioned(at: Spot, pool: Sequence[str], seed: int) -> list[str]:
    """Names of the pool that the context does not mention, drawn by occurrence."""
    mentioned = {first_word(word) for word in re.findall(WORD, at.context)}
    names = shuffled(pool, seed, at.begin, at.context)
    return [name for name in names if first_word(name) not in mentioned]


_FIRST_WORD = re.compile("_*([A-Za-z]+)")


def _border(text: str, use: Use, tokens: Tokens) -> tuple[int, str] | None:
    """Where the context of a use ends, and the space that its choice begins with, if any.

    None after more white space than one space, which would end the context, and where the choice
    is not one token.
    """
    place = use.place + len(use.name) - len(use.name.lstrip("_"))
    before = text[max(0, place - 2) : place]
    if len(before) < 2 or (before[1].isspace() and (before[1] != " " or before[0].isspace())):
        return None
    lead = " " if before[1] == " " else ""
    return (place - len(lead), lead) if tokens.single(lead + first_word(use.name)) else None


def _spot(
    file: SourceFile, use: Use, border: tuple[int, str] | None, context: str | None
) -> Spot | None:
    if border is None or not context:
        return None
    end, lead = border
    return Spot(context, use.name, lead, file.text[end : end + REST], end - len(context))
