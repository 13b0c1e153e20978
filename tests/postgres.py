"""A PostgreSQL server for tests: Debian's package, a folder of its own, any user but root."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

USER, PASSWORD = "minipuzzle", "geheim"
ACCOUNTS = ("postgres", "nobody")  # one of them runs the server when we are root


@contextmanager
def server() -> Iterator[str]:
    """Run a server on a free port of this machine; the URL of its database `postgres`."""
    programs = _programs()
    home = Path(tempfile.mkdtemp(prefix="minipuzzle-postgres-"))
    account = _account()
    try:
        (home / "password").write_text(PASSWORD)
        _own(home, account)
        data, port = home / "data", _free_port()
        secret = "-A", "scram-sha-256", "--pwfile", home / "password"
        fast = "--no-sync", "-E", "UTF8", "--locale", "C"
        _call(account, programs / "initdb", "-D", data, "-U", USER, *secret, *fast)
        options = f"-p {port} -c listen_addresses=127.0.0.1 -k {home} -c fsync=off"
        control = programs / "pg_ctl", "-D", data, "-w"
        _call(account, *control, "-l", home / "log", "-o", options, "start")
        try:
            yield f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{port}/postgres"
        finally:
            _call(account, *control, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(home)


def _programs() -> Path:
    """The folder of initdb and pg_ctl; skips the test where there is none, or no driver."""
    pytest.importorskip("psycopg", reason="no driver: pip install 'minipuzzle[postgres]'")
    found = shutil.which("initdb")
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for folder in [Path(found).resolve().parent] if found else folders:
        if (folder / "initdb").exists() and (folder / "pg_ctl").exists():
            return folder
    pytest.skip("no PostgreSQL on this machine: apt-get install postgresql")


def _account() -> str | None:
    """Whom the server runs as; None: as ourselves."""
    if os.geteuid() != 0:
        return None
    if shutil.which("runuser") is None:
        pytest.skip("PostgreSQL does not run as root, and there is no runuser to become another")
    there = {entry.pw_name for entry in pwd.getpwall()}
    for account in ACCOUNTS:
        if account in there:
            return account
    pytest.skip("PostgreSQL does not run as root, and there is no account to run it as")


def _own(home: Path, account: str | None) -> None:
    if account is not None:
        for path in (home, *home.iterdir()):
            shutil.chown(path, account)


def _call(account: str | None, *command: str | Path) -> None:
    words = [str(word) for word in command]
    if account is not None:
        words = ["runuser", "-u", account, "--", *words]
    with tempfile.TemporaryFile("w+") as output:  # the server inherits it: a pipe would not close
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd="/", timeout=60
        )
        output.seek(0)
        assert done.returncode == 0, (words, output.read())


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
