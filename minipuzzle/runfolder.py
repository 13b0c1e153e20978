"""A run folder: one sub-folder per stage, each whole or not there.

A stage fills ``<artefact>.partial`` and the folder is renamed to ``<artefact>`` when everything in
it is on the disk, `stage.json` last. Whatever kills the process, the next start finds either a
whole artefact, or a `.partial` that the same stage with the same inputs goes on with; later stages
see whole artefacts only. One process at a time works on a run folder.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from minipuzzle import progress
from minipuzzle.errors import UserError
from minipuzzle.files import (
    atomic_write_json,
    atomic_write_text,
    disk_full_is_a_user_error,
    fingerprint_folder,
    list_files,
    lock_file,
    read_json,
    remove_temporaries,
    require_disk,
    sync_folder,
)
from minipuzzle.units import format_seconds

__all__ = ["RunFolder", "atomic_write_json", "atomic_write_text", "require_disk"]

SCHEMA_VERSION = 1
STAGE_FILE = "stage.json"
JOURNAL = ".journal.json"  # in a .partial: the inputs it is for, and the seconds spent on it so far
LOCK = ".lock"
PACKAGES = ("minipuzzle", "torch", "transformers", "numpy", "optuna", "lm-eval")
HEARTBEAT_SECONDS = 1.0
_NOTES = (STAGE_FILE, JOURNAL)  # files about an artefact, not of it


class RunFolder:
    """The folder of one run at ``path``; it is created when the first stage writes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock_depth = 0

    def run_stage(
        self,
        name: str,
        artefact: str,
        inputs: Mapping[str, Any],
        body: Callable[[Path], None],
    ) -> Path:
        """Make ``<run>/<artefact>`` with ``body`` unless it is there, made from the same inputs.

        ``inputs``: JSON-able, everything the result depends on (settings, fingerprints of other
        artefacts). ``body(work)`` fills the folder ``work``; it finds there what an interrupted
        attempt with the same inputs left, and an empty folder otherwise. An older artefact made
        from other inputs stands until the new one is whole.
        UserError when the disk is full or another process works on the run folder.
        """
        with self.locked():
            final = self.path / artefact
            wanted = _plain(inputs)
            self._tidy(artefact, wanted)
            stage = self.stage(artefact)
            if stage is not None and stage["inputs"] == wanted:
                progress.stage_line(name, f"done before, see {final}")
                return final
            with disk_full_is_a_user_error(final):
                seconds = self._make(name, artefact, wanted, body)
            progress.stage_line(name, f"done in {format_seconds(seconds)}, see {final}")
            return final

    def artefact(self, artefact: str) -> Path:
        """The folder of a whole artefact. UserError when it is not there or was damaged."""
        if self.stage(artefact) is None:
            state = "not whole" if (self.path / artefact).exists() else "not there"
            raise UserError(
                f"{self.path / artefact} is {state}; run the stage that makes it, "
                f"or all with `minipuzzle run`"
            )
        return self.path / artefact

    def fingerprint(self, artefact: str) -> str:
        """Hash of the names and contents of an artefact's files, as noted when it was made.

        UserError when the artefact is not there.
        """
        self.artefact(artefact)
        stage = self.stage(artefact)
        assert stage is not None
        return str(stage["fingerprint"])

    def stage(self, artefact: str) -> dict[str, Any] | None:
        """The `stage.json` of a whole artefact, or None.

        A folder whose files are not those `stage.json` lists, with the sizes noted there, is not
        whole: somebody removed or cut a file.
        """
        folder = self.path / artefact
        stage = read_json(folder / STAGE_FILE)
        if stage is None or stage.get("schema_version") != SCHEMA_VERSION:
            return None
        return stage if stage["files"] == _sizes(folder) else None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out; may be nested. UserError when one is in already."""
        if self._lock_depth == 0:
            self._make_folder()
            handle = lock_file(self.path / LOCK)
        self._lock_depth += 1
        try:
            yield
        finally:
            self._lock_depth -= 1
            if self._lock_depth == 0:
                handle.close()

    def _make_folder(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{self.path} is not a folder; name another with --run") from None

    def _tidy(self, artefact: str, wanted: Mapping[str, Any]) -> None:
        """Finish or clear what a killed process left: see the three renames of `_publish`."""
        partial, old = self._beside(artefact)
        journal = read_json(partial / JOURNAL)
        finished = read_json(partial / STAGE_FILE)
        if finished is not None and finished["inputs"] == wanted:
            self._publish(artefact)
        elif partial.exists() and (journal is None or journal.get("inputs") != wanted):
            shutil.rmtree(partial)
        if old.exists():
            if not (self.path / artefact).exists():
                old.rename(self.path / artefact)
            else:
                shutil.rmtree(old)

    def _make(
        self, name: str, artefact: str, inputs: dict[str, Any], body: Callable[[Path], None]
    ) -> float:
        """Run ``body``, publish its folder, return the seconds spent on it in all attempts."""
        partial, _ = self._beside(artefact)
        partial.mkdir(exist_ok=True)
        remove_temporaries(partial)
        journal = _Journal(partial / JOURNAL, inputs)
        with journal.beating():
            body(partial)
        remove_temporaries(partial)
        record = {
            "schema_version": SCHEMA_VERSION,
            "stage": name,
            "inputs": inputs,
            "fingerprint": fingerprint_folder(partial, without=_NOTES, sync=True),
            "files": _sizes(partial),
            "started": journal.started,
            "seconds": round(journal.seconds(), 3),
            "versions": package_versions(PACKAGES),
        }
        atomic_write_json(partial / STAGE_FILE, record)
        self._publish(artefact)
        return journal.seconds()

    def _publish(self, artefact: str) -> None:
        """Put the finished `.partial` in its place. Killed between two lines, `_tidy` goes on."""
        partial, old = self._beside(artefact)
        final = self.path / artefact
        (partial / JOURNAL).unlink(missing_ok=True)
        if final.exists():
            if old.exists():
                shutil.rmtree(old)
            final.rename(old)
        partial.rename(final)
        sync_folder(self.path)
        if old.exists():
            shutil.rmtree(old)

    def _beside(self, artefact: str) -> tuple[Path, Path]:
        return self.path / f"{artefact}.partial", self.path / f"{artefact}.old"


class _Journal:
    """When work on a `.partial` began and how long it took, kept through kill -9."""

    def __init__(self, path: Path, inputs: dict[str, Any]) -> None:
        earlier = read_json(path) or {}
        self._path, self._inputs = path, inputs
        self._before = float(earlier.get("seconds", 0.0))
        self.started = str(earlier.get("started", datetime.now(UTC).isoformat(timespec="seconds")))
        self._clock = time.monotonic()
        self._write()

    def seconds(self) -> float:
        return self._before + time.monotonic() - self._clock

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Note the seconds every now and then from a thread while the block runs."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(HEARTBEAT_SECONDS):
                with suppress(OSError):  # the work itself will meet the full disk
                    self._write()

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            with suppress(OSError):
                self._write()

    def _write(self) -> None:
        record = {"inputs": self._inputs, "started": self.started, "seconds": self.seconds()}
        atomic_write_json(self._path, record, sync=False)


def _sizes(folder: Path) -> dict[str, int]:
    files = list_files(folder, without=_NOTES)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _plain(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs as they come back from a JSON file, so that the two compare equal."""
    plain: dict[str, Any] = json.loads(json.dumps(inputs, allow_nan=False))
    return plain


def package_versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of Python and of those of the packages that are installed."""
    found = {"python": sys.version.split()[0]}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
