"""Files that are whole or not there, disk space asked for before it is needed, fingerprints."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from minipuzzle.errors import UserError
from minipuzzle.units import format_bytes

TEMPORARY = ".tmp-"  # in the names of files and folders that are not finished
DISK_MARGIN_BYTES = 64 * 2**20
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_TEXTS = ("No space left on device", "database or disk is full", "Disk quota exceeded")


def atomic_write_text(path: Path, text: str, *, sync: bool = True) -> None:
    """Write ``text`` to ``path``: the old content or the new one, never a part of it."""
    temporary = path.with_name(f"{path.name}{TEMPORARY}{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def atomic_write_json(path: Path, value: Any, *, sync: bool = True) -> None:
    """Write ``value`` as JSON like :func:`atomic_write_text`; NaN and infinity are refused."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    atomic_write_text(path, text + "\n", sync=sync)


def require_disk(path: Path, needed_bytes: int) -> None:
    """UserError unless the disk of ``path`` (there or not yet) has ``needed_bytes`` to spare."""
    there = path.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < needed_bytes + DISK_MARGIN_BYTES:
        raise UserError(
            f"{path} needs {format_bytes(needed_bytes)} of disk and {format_bytes(free)} are free; "
            f"free some space or choose another folder with --run"
        )


@contextmanager
def disk_full_is_a_user_error(path: Path) -> Iterator[None]:
    """Turn whatever a full disk makes libraries raise (their own classes too) into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise UserError(
            f"the disk is full while writing {path}; "
            f"free some space and run the same command again to go on"
        ) from error


def is_disk_full(error: BaseException | None) -> bool:
    """Whether ``error`` or one it came from says that the disk is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if any(text in str(error) for text in _FULL_TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False


def fingerprint_folder(folder: Path, *, without: Sequence[str] = (), sync: bool = False) -> str:
    """Sha256 over the sorted relative names and contents of all files but those in ``without``.

    ``sync``: also have each file written through to the disk.
    """
    digest = hashlib.sha256()
    for path in list_files(folder, without):
        name = path.relative_to(folder).as_posix().encode()
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
            if sync:
                os.fsync(file.fileno())
        digest.update(b"%d:%s=%s;" % (len(name), name, content.encode()))
    return digest.hexdigest()


def list_files(folder: Path, without: Sequence[str] = ()) -> list[Path]:
    """All files under ``folder``, sorted, but those at the top named in ``without``."""
    left_out = {folder / name for name in without}
    return sorted(path for path in folder.rglob("*") if path.is_file() and path not in left_out)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None where there is no such file or no object in it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def remove_temporaries(folder: Path) -> None:
    """Remove what killed processes left unfinished under ``folder``."""
    for path in list(folder.rglob(f"*{TEMPORARY}*")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Have renames inside ``folder`` written through (only POSIX systems can)."""
    if sys.platform != "win32":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def lock_file(path: Path) -> IO[str]:
    """An open file whose lock ends with the process, killed or not. UserError when it is taken.

    A POSIX record lock: children made by fork do not inherit it, so a worker that outlives a
    killed parent does not keep the folder locked.
    """
    handle = path.open("a+", encoding="utf-8")
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            handle.close()
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise UserError(
                f"another minipuzzle works on {path.parent}; wait for it or name another "
                f"folder with --run"
            ) from None
    return handle
