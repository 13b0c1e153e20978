"""The study's database: opened by URL, with errors in one line."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from sqlalchemy import event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    IntegrityError,
    NoSuchModuleError,
    OperationalError,
    ProgrammingError,
    SQLAlchemyError,
)

from minipuzzle.errors import UserError
from minipuzzle.files import is_disk_full

GRACE = 3  # heartbeats that a trial may miss before its worker counts as dead
OPEN_ATTEMPTS = 10  # to make tables that other workers are making
SQLITE_SECONDS = 60  # to wait for another process that writes


T = TypeVar("T")


def sqlite_url(path: Path) -> str:
    """The storage URL of a database file."""
    return f"sqlite:///{path.absolute()}"


def open_storage(url: str, heartbeat: int | None = None, *, sync: bool = True) -> RDBStorage:
    """Open an Optuna storage; its tables are made when they are not there.

    Args:
        url: of SQLAlchemy; `postgresql://` means the driver of the extra `postgres`.
        heartbeat: seconds between signs of life of trials; None: none are expected.
        sync: have SQLite wait for the disk at every commit. Without it a killed process loses
            nothing either, but a power cut may cost the file; commits take a hundredth of the time.

    Raises:
        UserError: when the URL is none, its driver is not installed, or the database cannot be
            reached or written. No message holds a password.
    """
    parsed = _parsed(url)
    options: dict[str, Any] = {"engine_kwargs": _engine_options(parsed)}
    if heartbeat is not None:
        with quiet():
            retry = RetryHeartbeatStaleTrialCallback()
        options["heartbeat_interval"] = heartbeat
        options["grace_period"] = grace_seconds(heartbeat)
        options["heartbeat_stale_trial_callback"] = retry
    with storage_errors(url), _opening_errors(url):
        storage = make_tables(lambda: _open(parsed, options))
    if parsed.get_backend_name() == "sqlite" and not sync:
        event.listen(storage.engine, "connect", _do_not_wait)
        storage.engine.dispose()  # connections that were made before
    return storage


def _do_not_wait(connection: Any, _: Any) -> None:
    connection.execute("PRAGMA synchronous = OFF")


def make_tables(make: Callable[[], T]) -> T:
    """Call `make` until it works: of workers that start together all but one may be refused."""
    for attempt in range(OPEN_ATTEMPTS):
        try:
            return make()
        except (IntegrityError, ProgrammingError, OperationalError) as error:
            if "already exists" not in str(error) and "unique" not in str(error).lower():
                raise
            time.sleep(0.1 * (attempt + 1))
    return make()


def grace_seconds(heartbeat: int) -> int:
    """Seconds without a sign of life after which a worker counts as dead."""
    return GRACE * heartbeat


def _open(url: URL, options: dict[str, Any]) -> RDBStorage:
    with quiet():
        storage = RDBStorage(url.render_as_string(hide_password=False), **options)
    if url.get_backend_name() == "sqlite":
        _require_writable(url)
    return storage


def _require_writable(url: URL) -> None:
    """UserError when the database is a file that cannot be written.

    SQLite itself notices that only when the first trial is written.
    """
    path = url.database or ""
    if os.path.exists(path) and not os.access(path, os.W_OK):
        raise UserError(f"the storage {path} may not be written; name another with search.storage")


def _parsed(url: str) -> URL:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise UserError(
            "search.storage is no storage URL; write sqlite:///study.db or "
            "postgresql://user:password@host/database"
        ) from None
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    return parsed


def _engine_options(url: URL) -> dict[str, Any]:
    if url.get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": SQLITE_SECONDS}}
    # a connection that idled through a long evaluation may be gone
    return {"pool_pre_ping": True}


@contextmanager
def _opening_errors(url: str) -> Iterator[None]:
    """Turn a missing driver into a UserError."""
    try:
        yield
    except NoSuchModuleError:
        raise UserError(
            f"the storage {_shown(url)} is of a kind that is not known here; "
            "use sqlite:/// or postgresql://"
        ) from None
    except ImportError:
        raise UserError(
            f"the storage {_shown(url)} needs a driver that is not installed; "
            "for PostgreSQL: pip install 'minipuzzle[postgres]'"
        ) from None


@contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Turn what a database raises that cannot be used, or no longer, into a UserError."""
    try:
        yield
    except (SQLAlchemyError, StorageInternalError) as error:
        if is_disk_full(error):
            raise
        raise UserError(
            f"the storage {_shown(url)} cannot be used: {_reason(error, url)}; "
            "see that it runs, and that search.storage names its user, password and database"
        ) from None


def _shown(url: str) -> str:
    """The URL without its password, wherever that stands."""
    return _parsed(url).set(query={}).render_as_string(hide_password=True)


def _reason(error: BaseException, url: str) -> str:
    """The last line of what the driver says, without the password."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, DBAPIError):
        cause = cause.__cause__ or cause.__context__
    text = str(cause.orig if isinstance(cause, DBAPIError) else error).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reason = next((line for line in lines if "failed" in line or "FATAL" in line), lines[0])
    for secret in _secrets(url):
        reason = reason.replace(secret, "***")
    return reason.rstrip(".")


def _secrets(url: str) -> Iterator[str]:
    parsed = _parsed(url)
    if parsed.password:
        yield parsed.password
    for name, value in parsed.query.items():
        if "pass" in name:
            yield from [value] if isinstance(value, str) else value


@contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's warnings that heartbeats and metric names are experimental."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield
