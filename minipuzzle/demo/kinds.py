"""The kinds of questions: what is asked at which place of a Python file, and what would be wrong.

The right answer is always what the file says there. The wrong ones are names that are read
elsewhere in the same file, drawn by occurrence, so that how often a name is used decides nothing.
"""

from collections.abc import Iterable, Iterator

from minipuzzle.demo.keywords import next_keyword
from minipuzzle.demo.questions import Draft, Kind, Tokens, shuffled
from minipuzzle.demo.scopes import BUILTINS, Class, Function, SourceFile, Use, words
from minipuzzle.demo.spots import (
    RECEIVERS,
    composed_spot,
    first_word,
    rivals,
    spot,
    unmentioned,
)

FAR = 16
"""Tokens between a name's last mention and the question that make it recall, not repetition."""
NEAR = 8
"""The same for arguments, whose first use is seldom far from the `def`."""
TRIES = 4
"""Places tried per function."""
LONGEST_HEAD = 64
"""Tokens of imports or of `__init__` before a function."""

Sites = Iterator[Iterable[Draft]]


def names_in_scope(file: SourceFile, tokens: Tokens, seed: int) -> Sites:
    """Which name is in scope: one last mentioned far back, or one that belongs to other functions.

    The wrong ones are names read in other functions of the file, not visible in this one and
    not mentioned in the context.
    """
    elsewhere = [use.name for f in file.functions for use in own_uses(f)]

    def drafts(function: Function) -> Iterator[Draft]:
        known = {first_word(name) for name in function.visible}
        pool = [name for name in elsewhere if first_word(name) not in known]
        if len(set(pool)) < 3:
            return
        for use in tried(own_uses(function), seed, "scope", file):
            at = spot(file, tokens, use)
            if at and at.recalls(tokens, FAR, function.start):
                yield at.draft(unmentioned(at, pool, seed))

    return (drafts(function) for function in file.functions)


def next_name(file: SourceFile, tokens: Tokens, seed: int) -> Sites:
    """Which of four names in scope comes next; all four are mentioned in the context."""

    def drafts(function: Function) -> Iterator[Draft]:
        if len(function.bound - RECEIVERS) < 4:
            return
        for use in tried(own_uses(function), seed, "next", file):
            at = spot(file, tokens, use)
            if at and at.mentions(use.name, function.start):
                yield at.draft(rivals(at, function, seed))

    return (drafts(function) for function in file.functions)


def argument(file: SourceFile, tokens: Tokens, seed: int) -> Sites:
    """Which argument comes next: one of this function's, against names of functions above it.

    One wrong choice is another argument of the function (where it has one that is a token); the
    rest are mentioned in the context, above the `def`, and unknown to the function.
    """
    owned = {name for function in file.functions for name in function.bound} - RECEIVERS

    def drafts(function: Function, uses: list[Use]) -> Iterator[Draft]:
        for use in uses[:TRIES]:
            at = spot(file, tokens, use)
            if at and at.begin < function.start and at.recalls(tokens, NEAR, function.start):
                above = words(file.text[at.begin : function.start]) & owned
                below = words(file.text[function.start : use.place])
                known = {first_word(name) for name in function.visible | below}
                strange = [name for name in sorted(above) if first_word(name) not in known]
                own = [name for name in rivals(at, function, seed) if name in function.parameters]
                yield at.draft([*own[:1], *shuffled(strange, seed, file.name, use.place)])

    for function in file.functions:
        for uses in by_name(own_uses(function)):
            if uses[0].name in function.parameters:
                yield drafts(function, uses)


def imported(file: SourceFile, tokens: Tokens, seed: int) -> Sites:
    """Which name was imported: a few import statements, then a function that needs one of them.

    The wrong ones are imported by the same file, but not by the statements that are shown.
    """
    names = set(file.imports) - BUILTINS
    pool = [use.name for f in file.functions for use in f.uses if use.name in names - f.bound]
    few = len({first_word(name) for name in pool}) < 4

    def drafts(function: Function, uses: list[Use]) -> Iterator[Draft]:
        head = imports_shown(file, uses[0].name, seed)
        for use in tried(uses, seed, "imported", file) if short(head, tokens) else ():
            at = composed_spot(file, tokens, head, function, use)
            if at and at.recalls(tokens, FAR):
                yield at.draft(unmentioned(at, pool, seed))

    for function in [] if few else file.functions:
        own = [use for use in function.uses if use.name in names - function.bound]
        for uses in by_name(own):
            yield drafts(function, uses)


def attribute(file: SourceFile, tokens: Tokens, seed: int) -> Sites:
    """Which attribute was set: lines of `__init__`, then a method up to a `self.`.

    One wrong choice is the other attribute that those lines set, one a name that the method
    mentions and no class of the file has as an attribute (where there are such names); the rest
    are attributes that the file reads elsewhere and the context does not mention.
    """
    pool = [use.name for _, use in file.attributes]
    taken = {first_word(name) for c in file.classes for name in c.initial}
    taken |= {first_word(name) for name in pool}
    reads: dict[int, tuple[Function, list[Use]]] = {}
    for function, use in file.attributes:
        if function.owner is not None and use.name in function.owner.initial:
            reads.setdefault(function.start, (function, []))[1].append(use)

    def drafts(function: Function, uses: list[Use]) -> Iterator[Draft]:
        owner = function.owner
        assert owner is not None
        heads = (assignments_shown(file, owner, uses[0].name, seed, more=n) for n in (1, 0))
        head = next((head for head in heads if short(head, tokens)), None)
        if head is None:
            return
        for use in tried(uses, seed, "attribute", file):
            at = composed_spot(file, tokens, head, function, use)
            if at and at.recalls(tokens, FAR):
                both = [name for name in words(head) & set(owner.initial) if name != use.name]
                plain = [n for n in rivals(at, function, seed) if first_word(n) not in taken]
                yield at.draft([*sorted(both)[:1], *plain[:1], *unmentioned(at, pool, seed)])

    for function, own in reads.values():
        for uses in by_name(own) if function.name != "__init__" else ():
            yield drafts(function, uses)


KINDS = (
    Kind("scope", 4, names_in_scope),
    Kind("next", 4, next_name),
    Kind("argument", 3, argument),
    Kind("imported", 4, imported),
    Kind("attribute", 4, attribute),
    Kind("keyword", 4, next_keyword),
)
"""All kinds, in the order of the tasks."""


def own_uses(function: Function) -> list[Use]:
    """Names read in a function that are its own."""
    own = function.bound - RECEIVERS
    return [use for use in function.uses if use.name in own]


def by_name(uses: list[Use]) -> list[list[Use]]:
    """The uses of each name."""
    found: dict[str, list[Use]] = {}
    for use in uses:
        found.setdefault(use.name, []).append(use)
    return list(found.values())


def tried(uses: list[Use], seed: int, kind: str, file: SourceFile) -> list[Use]:
    """The few uses that are tried, in the order they are."""
    return shuffled(uses, seed, kind, file.name, *(use.place for use in uses[:1]))[:TRIES]


def short(head: str, tokens: Tokens) -> bool:
    """Whether the head of a composed context leaves room for the function."""
    return len(tokens.ids(head)) <= LONGEST_HEAD


def imports_shown(file: SourceFile, name: str, seed: int) -> str:
    """The statement that imports the name and one other, in the file's order."""
    needed = file.imports[name]
    spare = sorted(place for place in set(file.imports.values()) if place != needed)
    shown = sorted([needed, *shuffled(spare, seed, file.name, name)[:1]])
    return "\n".join(file.text[start:end] for start, end in shown) + "\n\n\n"


def assignments_shown(file: SourceFile, owner: Class, name: str, seed: int, *, more: int) -> str:
    """Class and `__init__` with the statement that sets the attribute and so many others."""
    needed = owner.initial[name]
    spare = sorted(place for place in set(owner.initial.values()) if place != needed)
    shown = sorted([needed, *shuffled(spare, seed, file.name, name)[:more]])
    lines = [file.text[owner.start : owner.header_end], "    def __init__(self, **options):"]
    lines += [" " * 8 + file.text[start:end] for start, end in shown]
    return "\n".join(lines) + "\n\n    "
