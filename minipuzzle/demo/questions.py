"""Multiple-choice questions made from Python files: windows of text, choices of one token.

A kind of question (`minipuzzle.demo.kinds`) drafts contexts with a right and several wrong
continuations; what stands here cuts contexts to length, keeps drafts whose choices are single
tokens *in place*, orders the choices, and stops when there are enough. Everything that looks random
is a hash of seed, document and place, so the same packages always give the same questions.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from minipuzzle.data.sources import PACKAGES_PREFIX, order_key, shuffled_documents
from minipuzzle.demo.scopes import SourceFile, parse

T = TypeVar("T")

CONTEXT_TOKENS = 128
"""Most tokens of a context; it begins at a line start, so it is usually a few fewer."""
CHARACTERS_PER_TOKEN = 5
"""More than code has on average: how much text is looked at for a context."""
SHORTEST_CONTEXT = 48
"""Tokens below which a context says too little."""
QUESTIONS_PER_FILE = 5
"""Of each kind while a limit is set: 100 questions come from at least 20 files."""


@dataclass(frozen=True)
class Draft:
    """A question before its choices are known to be single tokens.

    Attributes:
        context: text that ends where the choice begins; its last character is no white space.
        truth: the right choice, with the space before it where there is one.
        others: wrong choices, the preferred first; spelled like the truth.
        rest: what follows the context in the file, beginning with the truth.
    """

    context: str
    truth: str
    others: tuple[str, ...]
    rest: str


@dataclass(frozen=True)
class Question:
    """One multiple-choice question.

    Attributes:
        kind: name of its kind.
        source: the document it was made from and the character where the choice stands.
        context: text to continue.
        choices: continuations, each one token after the context.
        answer: index of the right one.
    """

    kind: str
    source: str
    context: str
    choices: tuple[str, ...]
    answer: int


class Tokens:
    """What questions ask of a tokenizer: lengths, windows, and whether a choice is one token."""

    def __init__(self, tokenizer: Any) -> None:
        self._encode = tokenizer.backend_tokenizer.encode
        self._single: dict[str, int | None] = {}

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, no special tokens."""
        ids: list[int] = self._encode(text, add_special_tokens=False).ids
        return ids

    def single(self, text: str) -> bool:
        """Whether a text by itself is one token."""
        if text not in self._single:
            ids = self.ids(text)
            self._single[text] = ids[0] if len(ids) == 1 else None
        return self._single[text] is not None

    def window(self, text: str, end: int, most: int = CONTEXT_TOKENS) -> str | None:
        """The lines before a character, at most so many tokens; None if the last one is longer."""
        begin = max(0, end - CHARACTERS_PER_TOKEN * most)
        piece = text[begin:end]
        offsets = self._encode(piece, add_special_tokens=False).offsets
        earliest = offsets[-most][0] if len(offsets) > most else 0
        if earliest == 0 and (begin == 0 or text[begin - 1] == "\n"):
            return piece
        line = piece.find("\n", max(0, earliest - 1)) + 1
        return piece[line:] if line else None

    def accept(self, draft: Draft, choices: Sequence[str]) -> bool:
        """Whether every choice adds exactly one token, and the truth is what the file goes on with.

        A harness encodes context and choice together: a token that reaches across the border, or a
        choice of two tokens, would be scored as something else than was asked.
        """
        if not draft.context or draft.context[-1].isspace():
            return False
        context = self.ids(draft.context)
        size = len(context)
        if not SHORTEST_CONTEXT <= size <= CONTEXT_TOKENS:
            return False
        natural = self.ids(draft.context + draft.rest)[: size + 1]
        if natural != self.ids(draft.context + draft.truth):
            return False
        after = (self.ids(draft.context + choice) for choice in choices)
        return all(len(ids) == size + 1 and ids[:size] == context for ids in after)


@dataclass(frozen=True)
class Kind:
    """A kind of question.

    Attributes:
        name: letters only; part of the task's name.
        choices: how many choices each question has.
        sites: for a file, the places to ask at; of the drafts of one site the first good one is
            taken.
    """

    name: str
    choices: int
    sites: Callable[[SourceFile, Tokens, int], Iterable[Iterable[Draft]]]


@dataclass
class _Collected:
    kind: Kind
    limit: int | None
    questions: list[Question] = field(default_factory=list)
    seen: set[tuple[str, str]] = field(default_factory=set)

    @property
    def full(self) -> bool:
        return self.limit is not None and len(self.questions) >= self.limit

    def add(self, question: Question) -> bool:
        truth = question.choices[question.answer]
        if (question.context, truth) in self.seen:  # the same lines in two files
            return False
        self.seen.add((question.context, truth))
        self.questions.append(question)
        return True


def make_questions(
    kinds: Sequence[Kind],
    packages: Sequence[str],
    tokenizer: Any,
    *,
    limit: int | None,
    seed: int,
) -> dict[str, list[Question]]:
    """Make questions from installed packages, reading no more files than needed.

    Args:
        kinds: what to ask.
        packages: names of installed packages; their tests are left out.
        tokenizer: a fast transformers tokenizer; each choice is one of its tokens.
        limit: questions per kind, at most `QUESTIONS_PER_FILE` of them from one file; None makes
            every question there is (of a kind one per function, or one per function and name).
            Limited questions are among the unlimited ones.
        seed: decides the order of files and choices, and where in a function is asked.

    Returns:
        name of the kind -> its questions, all different.

    Raises:
        UserError: a package is not installed.
    """
    tokens = Tokens(tokenizer)
    collected = [_Collected(kind, limit) for kind in kinds]
    for file in _files(packages, seed):
        for one in collected:
            if not one.full:
                _ask(one, file, tokens, seed)
        if all(one.full for one in collected):
            break
    return {one.kind.name: one.questions for one in collected}


def shuffled(items: Iterable[T], *key: object) -> list[T]:
    """The items in an order that the key decides: a hash, the same in every process."""
    # Of a generator's methods only random() is promised to give the same numbers in every Python.
    draw = random.Random(order_key(0, *map(str, key))).random
    listed = list(items)
    keys = [draw() for _ in listed]
    return [listed[i] for i in sorted(range(len(listed)), key=keys.__getitem__)]


def find_last_word(text: str, name: str) -> int | None:
    """Where a name stands last as a whole word, None if nowhere."""
    place = len(text)
    while (place := text.rfind(name, 0, place)) >= 0:
        before = text[place - 1 : place]
        after = text[place + len(name) : place + len(name) + 1]
        if not (before.isalnum() or before == "_" or after.isalnum() or after == "_"):
            return place
        place += len(name) - 1
    return None


def _files(packages: Sequence[str], seed: int) -> Iterator[SourceFile]:
    source = PACKAGES_PREFIX + ",".join(packages)
    for document in shuffled_documents(source, seed):
        if "/tests/" not in document.name:
            file = parse(document.name, document.text)
            if file is not None:
                yield file


def _ask(one: _Collected, file: SourceFile, tokens: Tokens, seed: int) -> None:
    asked = 0
    sites = shuffled(enumerate(one.kind.sites(file, tokens, seed)), seed, one.kind.name, file.name)
    for number, drafts in sites:
        for draft in drafts:
            question = _finish(one.kind, draft, file, tokens, seed, number)
            if question is not None and one.add(question):
                asked += 1
                break
        if one.full or (one.limit is not None and asked >= QUESTIONS_PER_FILE):
            return


def _finish(
    kind: Kind, draft: Draft, file: SourceFile, tokens: Tokens, seed: int, number: int
) -> Question | None:
    """The question of a draft, None where its choices are too few or not single tokens."""
    wrong = [o for o in dict.fromkeys(draft.others) if o != draft.truth and tokens.single(o)]
    choices = [draft.truth, *wrong[: kind.choices - 1]]
    if len(choices) < kind.choices or not tokens.accept(draft, choices):
        return None
    choices = shuffled(choices, seed, kind.name, file.name, number)
    return Question(
        kind=kind.name,
        source=f"{file.name}:{number}",
        context=draft.context,
        choices=tuple(choices),
        answer=choices.index(draft.truth),
    )
