"""Run folder: whole or not there, whatever kills the process and wherever it is killed."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from minipuzzle.errors import UserError
from minipuzzle.files import (
    atomic_write_json,
    atomic_write_text,
    fingerprint_folder,
    is_disk_full,
    require_disk,
)
from minipuzzle.runfolder import RunFolder

DiskUsage = namedtuple("DiskUsage", "total used free")

# Writes ten parts one after another and kills itself (as kill -9 does) before a given one.
WORKER = """
    import os, signal, sys
    from pathlib import Path
    from minipuzzle import files, runfolder
    from minipuzzle.runfolder import RunFolder

    run, setting, die_at = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

    def die(*_args, **_more):
        os.kill(os.getpid(), signal.SIGKILL)

    def body(work):
        for part in range(10):
            path = work / f"part{part}.txt"
            if path.exists():
                continue
            if die_at == f"part{part}":
                (work / "half.tmp-1").write_text("half")
                die()
            with (run / "log").open("a") as log:
                log.write(f"{setting}{part} ")
            files.atomic_write_text(path, f"{setting} {part}")

    if die_at == "record":
        real = runfolder.atomic_write_json
        runfolder.atomic_write_json = lambda path, value, **more: (
            die() if path.name == "stage.json" else real(path, value, **more)
        )
    if die_at.startswith("rename"):
        real_rename, left = Path.rename, [int(die_at[6:])]
        def rename(path, target):
            if left[0] == 0:
                die()
            left[0] -= 1
            return real_rename(path, target)
        Path.rename = rename
    RunFolder(run).run_stage("prune", "pruned", {"setting": setting}, body)
"""


def start(run: Path, setting: str = "a", die_at: str = "never") -> int:
    run.mkdir(exist_ok=True)
    code = textwrap.dedent(WORKER)
    done = subprocess.run([sys.executable, "-c", code, str(run), setting, die_at])
    return done.returncode


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("part*.txt")}


def whole(setting: str) -> dict[str, str]:
    return {f"part{part}.txt": f"{setting} {part}" for part in range(10)}


def write(text: str) -> Callable[[Path], None]:
    def body(work: Path) -> None:
        (work / "file.txt").write_text(text)

    return body


def never(work: Path) -> None:
    raise AssertionError("the stage is done and must not run again")


@pytest.mark.parametrize("die_at", ["part0", "part6", "record", "rename0"])
def test_killed_anywhere_it_goes_on_and_ends_the_same(tmp_path: Path, die_at: str) -> None:
    run = tmp_path / "run"
    assert start(run, die_at=die_at) == -signal.SIGKILL
    assert RunFolder(run).stage("pruned") is None
    with pytest.raises(UserError, match="not there"):
        RunFolder(run).fingerprint("pruned")

    assert start(run) == 0
    assert content(run / "pruned") == whole("a")
    assert (run / "log").read_text().split() == [f"a{part}" for part in range(10)]  # none twice
    assert sorted(path.name for path in run.iterdir()) == [".lock", "log", "pruned"]
    assert sorted(path.name for path in (run / "pruned").iterdir()) == sorted(
        [*whole("a"), "stage.json"]
    )

    other = tmp_path / "uninterrupted"
    assert start(other) == 0
    assert RunFolder(run).fingerprint("pruned") == RunFolder(other).fingerprint("pruned")


@pytest.mark.parametrize("die_at", ["part3", "record", "rename0", "rename1"])
@pytest.mark.parametrize("next_setting", ["new", "old", "third"])
def test_killed_while_replacing_an_older_result(
    tmp_path: Path, die_at: str, next_setting: str
) -> None:
    run = tmp_path / "run"
    assert start(run, "old") == 0
    assert start(run, "new", die_at) == -signal.SIGKILL
    there = RunFolder(run).stage("pruned")
    assert there is None or there["inputs"] == {"setting": "old"}

    assert start(run, next_setting) == 0
    assert content(run / "pruned") == whole(next_setting)
    left = {path.name for path in run.iterdir()} - {".lock", "log", "pruned"}
    assert left <= {"pruned.partial"}  # of "new", when "old" was asked for again


def test_same_inputs_run_once_and_others_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    first = folder.run_stage("score", "scores", {"blocks": 8, "pair": (1, 2)}, write("one"))
    record = folder.stage("scores")
    assert first == tmp_path / "run" / "scores"
    folder.run_stage("score", "scores", {"pair": [1, 2], "blocks": 8}, never)
    assert folder.stage("scores") == record

    folder.run_stage("score", "scores", {"blocks": 9}, write("two"))
    assert (first / "file.txt").read_text() == "two"
    assert folder.stage("scores") != record


def test_partial_of_other_inputs_is_wiped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)

    def fail(work: Path) -> None:
        (work / "old.txt").write_text("old")
        raise UserError("stopped")

    with pytest.raises(UserError, match="stopped"):
        folder.run_stage("score", "scores", {"blocks": 1}, fail)
    assert (tmp_path / "scores.partial" / "old.txt").exists()
    folder.run_stage("score", "scores", {"blocks": 2}, write("new"))
    assert not (tmp_path / "scores" / "old.txt").exists()


def test_record_says_what_when_and_with_what(tmp_path: Path) -> None:
    RunFolder(tmp_path).run_stage("score", "scores", {"blocks": 8}, write("one"))
    record = json.loads((tmp_path / "scores" / "stage.json").read_text())
    assert record["stage"] == "score"
    assert record["inputs"] == {"blocks": 8}
    assert record["schema_version"] == 1
    assert record["files"] == {"file.txt": 3}
    assert record["fingerprint"] == fingerprint_folder(tmp_path / "scores", without=["stage.json"])
    assert record["started"].endswith("+00:00")
    assert {"python", "torch", "minipuzzle"} <= set(record["versions"])


def test_seconds_count_every_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is ours: an attempt of 100 s that failed, then one of 7 s."""
    clock = [0.0]
    monkeypatch.setattr("minipuzzle.runfolder.time.monotonic", lambda: clock[0])
    folder = RunFolder(tmp_path)

    def attempt(seconds: float, succeeds: bool) -> Callable[[Path], None]:
        def body(work: Path) -> None:
            clock[0] += seconds
            if not succeeds:
                raise UserError("stopped")

        return body

    with pytest.raises(UserError, match="stopped"):
        folder.run_stage("score", "scores", {}, attempt(100, succeeds=False))
    folder.run_stage("score", "scores", {}, attempt(7, succeeds=True))
    record = folder.stage("scores")
    assert record is not None and record["seconds"] == 107


def test_seconds_survive_kill_9(tmp_path: Path) -> None:
    code = """
        import sys, time
        from pathlib import Path
        from minipuzzle import runfolder
        runfolder.HEARTBEAT_SECONDS = 0.01
        def body(work):
            print("in", flush=True)
            time.sleep(60)
        runfolder.RunFolder(Path(sys.argv[1])).run_stage("score", "scores", {}, body)
    """
    process = start_worker(code, tmp_path)
    journal = tmp_path / "scores.partial" / ".journal.json"
    while json.loads(journal.read_text())["seconds"] < 0.1:
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = json.loads(journal.read_text())
    RunFolder(tmp_path).run_stage("score", "scores", {}, write("x"))
    record = RunFolder(tmp_path).stage("scores")
    assert record is not None
    assert record["seconds"] > before["seconds"] and record["started"] == before["started"]


def start_worker(code: str, run: Path) -> subprocess.Popen[str]:
    """A process that says "in" once it is inside its stage."""
    command = [sys.executable, "-c", textwrap.dedent(code), str(run)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "in\n"
    return process


def test_second_process_is_refused_until_the_first_dies(tmp_path: Path) -> None:
    """The first one leaves a forked child behind, which must not keep the lock."""
    code = """
        import os, sys, time
        from minipuzzle.runfolder import RunFolder
        with RunFolder(sys.argv[1]).locked():
            if os.fork() == 0:
                time.sleep(3)
                os._exit(0)
            print("in", flush=True)
            time.sleep(60)
    """
    process = start_worker(code, tmp_path)
    folder = RunFolder(tmp_path)
    with pytest.raises(UserError, match="another minipuzzle works on"):
        folder.run_stage("score", "scores", {}, never)
    process.kill()
    process.wait()
    folder.run_stage("score", "scores", {}, write("mine"))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("IoError(Os { code: 28, message: 'No space left on device' })"),
        RuntimeError("database or disk is full"),
    ],
)
def test_disk_full_is_one_clear_message(tmp_path: Path, error: Exception) -> None:
    def body(work: Path) -> None:
        (work / "half.txt").write_text("half")
        raise error

    folder = RunFolder(tmp_path)
    with pytest.raises(UserError, match="disk is full while writing"):
        folder.run_stage("prune", "pruned", {}, body)
    assert folder.stage("pruned") is None


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    def body(work: Path) -> None:
        raise OSError(errno.EIO, "broken")

    with pytest.raises(OSError, match="broken"):
        RunFolder(tmp_path).run_stage("prune", "pruned", {}, body)


def test_disk_full_is_found_behind_other_errors() -> None:
    try:
        try:
            raise OSError(errno.EDQUOT, "quota")
        except OSError as inner:
            raise RuntimeError("cannot save") from inner
    except RuntimeError as outer:
        assert is_disk_full(outer)
    assert not is_disk_full(RuntimeError("cannot save"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_really_full_device(tmp_path: Path) -> None:
    def body(work: Path) -> None:
        with open("/dev/full", "wb") as file:
            file.write(b"x" * 2**16)

    with pytest.raises(UserError, match="disk is full"):
        RunFolder(tmp_path).run_stage("prune", "pruned", {}, body)


@pytest.mark.parametrize("damage", ["cut", "removed", "added"])
def test_damaged_artefact_counts_as_missing_and_is_made_again(tmp_path: Path, damage: str) -> None:
    folder = RunFolder(tmp_path)
    folder.run_stage("prune", "pruned", {}, write("weights"))
    file = tmp_path / "pruned" / "file.txt"
    if damage == "cut":
        file.write_text("wei")
    elif damage == "removed":
        file.unlink()
    else:
        (tmp_path / "pruned" / "other.txt").write_text("what is this")
    with pytest.raises(UserError, match="not whole; run the stage"):
        folder.artefact("pruned")
    folder.run_stage("prune", "pruned", {}, write("weights"))
    assert folder.artefact("pruned") == tmp_path / "pruned"
    assert sorted(path.name for path in (tmp_path / "pruned").iterdir()) == [
        "file.txt",
        "stage.json",
    ]


def test_run_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match="is not a folder"):
        RunFolder(tmp_path / "run").run_stage("score", "scores", {}, never)


def test_fingerprint_sees_names_contents_and_borders(tmp_path: Path) -> None:
    def fingerprint(**contents: str) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, text in contents.items():
            path = folder / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return fingerprint_folder(folder)

    base = fingerprint(a="1", b="2")
    assert fingerprint(b="2", a="1") == base
    different = [
        fingerprint(a="2", b="1"),
        fingerprint(a="12", b=""),
        fingerprint(a="1", c="2"),
        fingerprint(a="1"),
        fingerprint(a="1", b__b="2"),
        fingerprint(ab="12"),
    ]
    assert len({base, *different}) == 7


def test_atomic_write_keeps_the_old_text_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    atomic_write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="nan"):
        atomic_write_json(path, {"a": float("nan")})
    with pytest.raises(UnicodeEncodeError):
        atomic_write_text(path, "half \ud800")
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_require_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def usage(path: Path) -> DiskUsage:
        assert path == tmp_path  # the nearest folder that exists
        return DiskUsage(10 * 2**30, 9 * 2**30, 2**30)

    monkeypatch.setattr("minipuzzle.files.shutil.disk_usage", usage)
    require_disk(tmp_path / "new" / "deeper", 2**29)
    with pytest.raises(UserError, match=r"needs 1\.00 GiB of disk and 1\.00 GiB are free"):
        require_disk(tmp_path / "new", 2**30)
