"""Splits that cannot share a document: by source where sources differ, else by content."""

import hashlib
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from minipuzzle.data.packages import Document
from minipuzzle.data.sources import documents, source_items
from minipuzzle.errors import UserError


@dataclass(frozen=True)
class Share:
    """The part of a source's documents that belongs to one split.

    Attributes:
        index: which part, 0 <= index < of.
        of: in how many parts the documents are divided; 1 keeps them all.
    """

    index: int = 0
    of: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.of:
            raise ValueError(f"`0 <= index < of` must hold, but got {self.index}, {self.of}")

    def holds(self, document: Document) -> bool:
        """Whether the document belongs to this part: decided by its content, not by its name."""
        return self.of == 1 or content_hash(document.text) % self.of == self.index


def content_hash(text: str) -> int:
    """64-bit hash of a text, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def shares(sources: Mapping[str, str]) -> dict[str, Share]:
    """Divide sources that overlap among the splits that name them; leave the others whole.

    Splits that are linked, directly or through a third, by a file, package or data set they both
    read form a circle; every document of a circle belongs to exactly one of its splits, by hash
    of its content, so that also copies under two names land in the same split.

    Args:
        sources: name of the split -> source string.

    Returns:
        name of the split -> its share.

    Raises:
        UserError: a package is not installed or a file is missing.
    """
    items = {name: source_items(source) for name, source in sources.items()}
    circles: list[set[str]] = []
    for name in sources:
        linked = [c for c in circles if any(items[name] & items[other] for other in c)]
        circles = [c for c in circles if c not in linked] + [{name}.union(*linked)]
    divided: dict[str, Share] = {}
    for circle in circles:
        members = sorted(circle)
        divided |= {name: Share(index, len(members)) for index, name in enumerate(members)}
    return {name: divided[name] for name in sources}


def check_disjoint(sources: Mapping[str, str], limit: int | None = None) -> None:
    """Read the documents of every split and make sure that no text is in two of them.

    Args:
        sources: name of the split -> source string.
        limit: documents read per split; None reads all.

    Raises:
        UserError: two splits hold the same text, in sources that `shares` cannot know to be alike
            (two files with the same content).
    """
    owner: dict[int, str] = {}
    for name, share in shares(sources).items():
        for document in _first(documents(sources[name]), limit):
            if not share.holds(document) or len(document.text) < TRIVIAL_CHARACTERS:
                continue
            other = owner.setdefault(content_hash(document.text), name)
            if other != name:
                raise UserError(
                    f"splits {other!r} and {name!r} hold the same text ({document.name}); "
                    "take it out of one of the two sources"
                )


TRIVIAL_CHARACTERS = 200
"""Shorter texts (an `__init__.py` that holds one import) may be equal by chance."""


def _first(stream: Iterable[Document], limit: int | None) -> Iterable[Document]:
    return itertools.islice(stream, limit)
