"""The demo teacher's text: which files of which packages, and its tokens on disk.

The packages are named in a requirements file, or are all that is installed; `networkx`,
`sqlalchemy`, `optuna` and `mpmath` are kept out of the training text (by path and by the lines they
consist of) because the demo's search and report splits are made of them.
"""

import functools
import hashlib
import importlib.metadata
import multiprocessing
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from teacher_tokenizer import (
    copy_tokenizer,
    encode,
    save_tokenizer,
    token_bytes,
    train_tokenizer,
    write_json,
)
from tokenizers import Tokenizer

from minipuzzle.data.packages import (
    STANDARD_LIBRARY,
    package_version,
    read_source,
    source_files,
)
from minipuzzle.errors import UserError

SEARCH_PACKAGES = ("optuna", "mpmath")
REPORT_PACKAGES = ("networkx", "sqlalchemy")
UNSEEN_PACKAGES = SEARCH_PACKAGES + REPORT_PACKAGES

_LONG_LINE = 30
"""Shorter lines (`return None`) say nothing about where they come from."""
_FILES_PER_TASK = 64

Map = Callable[..., Iterable[Any]]


@dataclass(frozen=True)
class Limits:
    """What is left out of the training text.

    Attributes:
        package_bytes: text taken of one package at most, so that none dominates.
        test_share: share of `package_bytes` that test files may fill.
        line_characters: a file with a longer line is generated or minified.
        overlap: a file with this share of its long lines in an unseen package is a copy.
        repeated: a file with this share of its long lines in files taken before is a near-copy.
    """

    package_bytes: int = 8_000_000
    test_share: float = 0.2
    line_characters: int = 1_000
    overlap: float = 0.3
    repeated: float = 0.7


@dataclass(frozen=True)
class Digest:
    """What decides whether a file is taken.

    Attributes:
        name: "package/relative/path.py".
        size: bytes.
        longest: characters of its longest line.
        content: hash of the text without white space.
        lines: hashes of its long lines.
    """

    name: str
    size: int
    longest: int
    content: bytes
    lines: NDArray[np.uint64]


@dataclass
class PackageCount:
    """What was read of one package, and why the rest was not."""

    name: str
    version: str | None
    files: int = 0
    bytes: int = 0
    tokens: int = 0
    left_out: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Taken:
    """A file of the training text."""

    package: str
    name: str
    path: Path


def read_requirements(path: Path) -> list[str]:
    """Package names of a requirements file, in its order, without versions and comments."""
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return [line.split("==")[0].strip() for line in lines if line]


def installed_packages() -> list[str]:
    """The standard library and every installed distribution with sources, but the unseen ones."""
    names = {
        re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
        for distribution in importlib.metadata.distributions()
    }
    names -= {"", "minipuzzle", *UNSEEN_PACKAGES}
    return [STANDARD_LIBRARY, *(name for name in sorted(names) if _sources(name))]


@functools.cache
def _sources(package: str) -> list[tuple[str, Path]]:
    """Files of a package, none where it is not installed."""
    try:
        return source_files(package)
    except UserError:
        return []


def digest_text(name: str, text: str) -> Digest:
    """Digest of one file's text."""
    hashes = [hashlib.blake2b(line.encode(), digest_size=8).digest() for line in _long_lines(text)]
    return Digest(
        name,
        size=len(text.encode()),
        longest=max(map(len, text.splitlines()), default=0),
        content=hashlib.sha256("".join(text.split()).encode()).digest(),
        lines=np.frombuffer(b"".join(hashes), dtype=np.uint64),
    )


def _digest(file: tuple[str, Path]) -> Digest | None:
    text = read_source(file[1])
    return None if text is None else digest_text(file[0], text)


class Filter:
    """Decides file by file what enters the training text; remembers what it has taken."""

    def __init__(self, unseen: Iterable[Digest], limits: Limits) -> None:
        self.limits = limits
        self._unseen_lines = {line for digest in unseen for line in digest.lines.tolist()}
        self._contents: set[bytes] = set()
        self._lines: set[int] = set()

    def reason_against(self, digest: Digest) -> str | None:
        """Why a file is left out, or None when it is taken."""
        parts = [part.removesuffix(".py") for part in PurePosixPath(digest.name).parts]
        if not set(UNSEEN_PACKAGES).isdisjoint(parts):
            return "path of an unseen package"
        if digest.longest > self.limits.line_characters:
            return "very long lines"
        if digest.content in self._contents:
            return "same content as another file"
        self._contents.add(digest.content)
        lines = digest.lines.tolist()
        if _share(lines, self._unseen_lines) > self.limits.overlap:
            return "lines of an unseen package"
        if _share(lines, self._lines) > self.limits.repeated:
            return "nearly the same as other files"
        self._lines.update(lines)
        return None


def training_files(
    packages: Sequence[str], limits: Limits, each: Map
) -> tuple[list[Taken], list[PackageCount]]:
    """Files of all packages after filtering, package after package, and what was left out."""
    unseen = [file for package in UNSEEN_PACKAGES for file in _sources(package)]
    accept = Filter((digest for digest in each(_digest, unseen) if digest), limits)
    counts = [PackageCount(package, package_version(package)) for package in packages]
    # Files of one package in an order drawn from their names, until its share is full.
    groups = [_sources(package) or source_files(package) for package in packages]
    files = [sorted(group, key=lambda file: _order(file[0])) for group in groups]
    digests = iter(each(_digest, [file for group in files for file in group]))
    taken: list[Taken] = []
    for group, count in zip(files, counts, strict=True):
        own = ((path, next(digests)) for _, path in group)
        taken.extend(_package_share(own, accept, count))
    return taken, counts


def _package_share(
    files: Iterable[tuple[Path, Digest | None]], accept: Filter, count: PackageCount
) -> Iterator[Taken]:
    room = accept.limits.package_bytes
    test_room = int(room * accept.limits.test_share)
    for path, digest in files:
        if digest is None:
            continue
        is_test = _is_test(digest.name)
        if digest.size > room or (is_test and digest.size > test_room):
            reason: str | None = "share of the package is full"
        else:
            reason = accept.reason_against(digest)
        if reason is not None:
            count.left_out[reason] = count.left_out.get(reason, 0) + 1
            continue
        room, test_room = room - digest.size, test_room - digest.size * is_test
        count.files, count.bytes = count.files + 1, count.bytes + digest.size
        yield Taken(count.name, digest.name, path)


def _is_test(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return any(part in {"test", "tests", "testing"} for part in parts[:-1]) or (
        parts[-1].startswith(("test_", "conftest")) or parts[-1].endswith("_test.py")
    )


def _order(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _long_lines(text: str) -> list[str]:
    stripped = (line.strip() for line in text.splitlines())
    return [line for line in stripped if len(line) >= _LONG_LINE]


def _share(lines: Sequence[int], known: set[int]) -> float:
    return sum(map(known.__contains__, lines)) / len(lines) if len(lines) >= 5 else 0.0


def sample_texts(files: Sequence[Taken], size: int) -> Iterator[str]:
    """Texts of about `size` characters together, drawn by the files' names."""
    total = 0
    for file in sorted(files, key=lambda file: _order("tokenizer/" + file.name)):
        if total >= size:
            return
        text = _read(file.path)
        total += len(text)
        yield text


def _read(path: Path) -> str:
    text = read_source(path)
    assert text is not None, f"{path} changed while it was read"
    return text


@functools.cache
def _tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def _encode(task: tuple[Path, list[Path]]) -> list[NDArray[np.uint16]]:
    folder, paths = task
    return encode(_tokenizer(folder), [_read(path) for path in paths])


def _encode_all(each: Map, folder: Path, paths: Sequence[Path]) -> list[NDArray[np.uint16]]:
    starts = range(0, len(paths), _FILES_PER_TASK)
    tasks = [(folder, list(paths[start : start + _FILES_PER_TASK])) for start in starts]
    return [tokens for group in each(_encode, tasks) for tokens in group]


@contextmanager
def workers(processes: int) -> Iterator[Map]:
    """Yield a map over many processes that keeps the order; over this one where it is one."""
    if processes == 1:
        yield map
        return
    # Forked children need not import torch again, of which they use nothing.
    kind = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(kind)
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_alone) as pool:

        def each(function: Any, items: Sequence[Any]) -> Iterable[Any]:
            chunk = _FILES_PER_TASK if function is _digest else 1
            return pool.map(function, items, chunksize=chunk)

        yield each


def _alone() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def prepare(
    folder: Path,
    packages: Sequence[str],
    *,
    vocabulary: int,
    context: int,
    limits: Limits,
    tokenizer: Path | None = None,
    processes: int = 1,
) -> dict[str, Any]:
    """Write the tokenizer, `train.bin`, one `.bin` per unseen package, and `manifest.json`.

    The `.bin` files are plain little-endian uint16 tokens, documents in a drawn order. The
    tokenizer is trained on the text unless the folder of one is given.

    Raises:
        UserError: a package is missing, or both search packages are.
    """
    if not any(map(_sources, SEARCH_PACKAGES)):
        raise UserError(f"install {' or '.join(SEARCH_PACKAGES)}: the run is measured on them")
    home = folder / "tokenizer"
    with workers(processes) as each:
        files, counts = training_files(packages, limits, each)
        if tokenizer is None:
            texts = sample_texts(files, 60_000_000)
            save_tokenizer(train_tokenizer(texts, vocabulary=vocabulary), home, context)
        else:
            copy_tokenizer(tokenizer, home, vocabulary=vocabulary)
        encoded = _encode_all(each, home, [file.path for file in files])
        unseen = [_write_unseen(folder, each, package) for package in UNSEEN_PACKAGES]
    by_name = {count.name: count for count in counts}
    for file, tokens in zip(files, encoded, strict=True):
        by_name[file.package].tokens += len(tokens)
    random.Random(0).shuffle(encoded)
    np.concatenate(encoded).tofile(folder / "train.bin")
    np.save(folder / "token_bytes.npy", token_bytes(_tokenizer(home)))
    manifest = _manifest(counts, [count for count in unseen if count], limits)
    write_json(folder / "manifest.json", manifest)
    return manifest


def _write_unseen(folder: Path, each: Map, package: str) -> PackageCount | None:
    files = [(name, path) for name, path in _sources(package) if read_source(path) is not None]
    if not files:
        return None
    tokens = np.concatenate(_encode_all(each, folder / "tokenizer", [path for _, path in files]))
    tokens.tofile(folder / f"{package}.bin")
    size = sum(path.stat().st_size for _, path in files)
    return PackageCount(package, package_version(package), len(files), size, len(tokens))


def _manifest(
    counts: Sequence[PackageCount], unseen: Sequence[PackageCount], limits: Limits
) -> dict[str, Any]:
    return {
        "limits": asdict(limits),
        "files": sum(count.files for count in counts),
        "bytes": sum(count.bytes for count in counts),
        "tokens": sum(count.tokens for count in counts),
        "packages": [asdict(count) for count in counts],
        "unseen": [asdict(count) for count in unseen],
    }


__all__ = ["Digest", "Filter", "Limits", "installed_packages", "prepare", "read_requirements"]
