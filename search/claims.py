"""One row per architecture in the study's database: nobody evaluates it a second time.

Optuna makes trials unique, not what they propose. Whoever is about to evaluate an architecture
inserts its claim first; the database's unique keys decide who was first, and how many there are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from hashlib import sha256
from typing import Any

from sqlalchemy import (
    Column,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    delete,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError

from .space import Point
from .storage import make_tables

TABLE = Table(
    "minipuzzle_claims",
    MetaData(),
    Column("study", String(64), primary_key=True),
    Column("architecture", String(64), primary_key=True),  # hash of the key, which may be long
    Column("slot", Integer),  # 0, 1, 2, ...: how many there are; NULL: given back
    Column("owner", Integer),  # number of the trial that evaluates it, or did
    Column("point", Text, nullable=False),
    Column("value", Text),  # JSON; NULL: not evaluated yet
    UniqueConstraint("study", "slot"),
)


class Standing(Enum):
    """What became of an attempt to claim an architecture."""

    WON = auto()  # it is the trial's; only one that was given back has a value already
    KNOWN = auto()  # its value is there
    PENDING = auto()  # another trial is at it
    FULL = auto()  # it is new, but as many were claimed as are wanted


@dataclass(frozen=True)
class Claim:
    """An architecture that a trial owns, with its value when it has one."""

    point: Point
    owner: int
    value: dict[str, Any] | None


class Claims:
    """The claims of one study."""

    def __init__(self, engine: Engine, study: str) -> None:
        self._engine, self._study = engine, study
        make_tables(lambda: TABLE.metadata.create_all(engine))

    def take(self, point: Point, owner: int, most: int) -> Standing:
        """Claim `point` for the trial `owner`; at most `most` architectures are claimed in all."""
        while True:
            row = self._row(point)
            if row is not None and row.owner is not None:
                return Standing.PENDING if row.value is None else Standing.KNOWN
            slot = self._next_slot()
            if slot >= most:
                return Standing.FULL
            try:
                if self._write(point, owner, slot, known=row is not None):
                    return Standing.WON
            except IntegrityError:
                pass  # another process took this architecture or this slot just now: look again

    def take_over(self, point: Point, dead: int, owner: int) -> bool:
        """Make `owner` the owner of what the trial `dead` left; False when another was sooner."""
        mine = TABLE.c.owner == dead, TABLE.c.value.is_(None)
        with self._engine.begin() as connection:
            change = update(TABLE).where(*self._is(point), *mine).values(owner=owner)
            return connection.execute(change).rowcount == 1

    def settle(self, found: Sequence[tuple[Point, Mapping[str, Any]]]) -> None:
        """Write values, all or none; what has one keeps it."""
        with self._engine.begin() as connection:
            for point, value in found:
                change = update(TABLE).where(*self._is(point), TABLE.c.value.is_(None))
                connection.execute(change.values(value=json.dumps(value)))

    def all(self) -> list[Claim]:
        """Everything that is claimed, in the order of the claims."""
        query = select(TABLE.c.point, TABLE.c.owner, TABLE.c.value)
        query = query.where(self._ours(), TABLE.c.slot.is_not(None)).order_by(TABLE.c.slot)
        with self._engine.connect() as connection:
            return [_claim(row) for row in connection.execute(query)]

    def count(self) -> int:
        """Number of architectures that are claimed."""
        return self._next_slot()

    def value(self, point: Point) -> dict[str, Any] | None:
        """What `point` was found to be worth, by whatever trial."""
        row = self._row(point)
        return None if row is None or row.value is None else json.loads(row.value)

    def owner(self, point: Point) -> int | None:
        """The trial that has claimed `point`."""
        row = self._row(point)
        return None if row is None else row.owner

    def give_back(self, first: int) -> None:
        """Take their claims from the trials `first` and later, which never were.

        Values stay: who claims such an architecture again knows it at once.
        """
        late = self._ours(), TABLE.c.owner >= first
        with self._engine.begin() as connection:
            connection.execute(delete(TABLE).where(*late, TABLE.c.value.is_(None)))
            connection.execute(update(TABLE).where(*late).values(owner=None, slot=None))

    def _write(self, point: Point, owner: int, slot: int, *, known: bool) -> bool:
        with self._engine.begin() as connection:
            if known:
                free = update(TABLE).where(*self._is(point), TABLE.c.owner.is_(None))
                return connection.execute(free.values(owner=owner, slot=slot)).rowcount == 1
            row = {"study": self._study, "architecture": _digest(point), "slot": slot}
            row |= {"owner": owner, "point": json.dumps(point.to_json())}
            connection.execute(insert(TABLE).values(row))
            return True

    def _next_slot(self) -> int:
        with self._engine.connect() as connection:
            last = connection.execute(select(func.max(TABLE.c.slot)).where(self._ours())).scalar()
        return 0 if last is None else int(last) + 1

    def _row(self, point: Point) -> Any:
        query = select(TABLE.c.owner, TABLE.c.value).where(*self._is(point))
        with self._engine.connect() as connection:
            return connection.execute(query).one_or_none()

    def _ours(self) -> Any:
        return TABLE.c.study == self._study

    def _is(self, point: Point) -> tuple[Any, Any]:
        return self._ours(), TABLE.c.architecture == _digest(point)


def _claim(row: Any) -> Claim:
    value = None if row.value is None else json.loads(row.value)
    return Claim(Point.from_json(json.loads(row.point)), int(row.owner), value)


def _digest(point: Point) -> str:
    return sha256(point.key.encode()).hexdigest()
