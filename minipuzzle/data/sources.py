"""Source strings: where text comes from, as documents in an order that a seed decides.

    python-packages:torch,sympy       the sources of installed packages
    notes.txt                         plain text, cut at line ends into documents of 8 KiB
    corpus.jsonl                      one JSON object a line, its field "text"
    corpus.parquet                    its column "text"
    name[/config][:split[:column]]    a data set of the Hugging Face hub, streamed

A hub name is `owner/name` or, with its configuration, `owner/name/config`; the split defaults to
"train", the column to "text". Packages are shuffled as a list of files and only then read, so a few
blocks cost a few files. The others are streams: they are shuffled inside pools of consecutive
documents, which never takes more memory than a pool.
"""

import hashlib
import importlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minipuzzle.data.packages import Document, read_source, source_files
from minipuzzle.errors import UserError

PACKAGES_PREFIX = "python-packages:"
FILE_SUFFIXES = (".txt", ".jsonl", ".parquet")
POOL_DOCUMENTS = 10_000
"""Documents of a stream that are shuffled together."""
TEXT_PIECE = 8192
"""Characters of a plain text file that make one document."""


def documents(source: str) -> Iterator[Document]:
    """Yield all documents of a source in its own order.

    Raises:
        UserError: the source names nothing that exists here, or a document has no text.
    """
    packages = package_names(source)
    if packages is not None:
        for group, name, path in _package_files(packages):
            yield from _package_document(group, name, path)
        return
    yield from _stream(source)


def shuffled_documents(source: str, seed: int) -> Iterator[Document]:
    """Yield all documents of a source in an order that depends on the seed and their names alone.

    Streams are shuffled pool by pool (`POOL_DOCUMENTS`).

    Raises:
        UserError: as `documents`.
    """
    packages = package_names(source)
    if packages is not None:
        files = list(_package_files(packages))
        for group, name, path in sorted(files, key=lambda file: order_key(seed, *file[:2])):
            yield from _package_document(group, name, path)
        return
    stream = _stream(source)
    while pool := list(itertools.islice(stream, POOL_DOCUMENTS)):
        yield from sorted(pool, key=lambda document: order_key(seed, document.group, document.name))


def order_key(seed: int, *parts: str) -> bytes:
    """Sort key that shuffles: the same on every machine, in every process, in every listing."""
    return hashlib.blake2b("\0".join((str(seed), *parts)).encode(), digest_size=16).digest()


def source_items(source: str) -> frozenset[str]:
    """What a source reads, for telling whether two sources overlap: files, or a data set's name.

    Raises:
        UserError: a package is not installed or a file is missing.
    """
    packages = package_names(source)
    if packages is not None:
        return frozenset(str(path.absolute()) for _, _, path in _package_files(packages))
    if is_file_source(source):
        return frozenset({str(_existing(source).resolve())})
    return frozenset({f"hub:{source.split(':')[0]}"})


def package_names(source: str) -> list[str] | None:
    """Names in a `python-packages:` source, or None for another kind of source.

    Raises:
        UserError: the list is empty.
    """
    if not source.startswith(PACKAGES_PREFIX):
        return None
    names = [name.strip() for name in source.removeprefix(PACKAGES_PREFIX).split(",")]
    names = list(dict.fromkeys(name for name in names if name))
    if not names:
        raise UserError(f"source {source!r} names no package; write {PACKAGES_PREFIX}NAME,NAME")
    return names


def is_file_source(source: str) -> bool:
    """Whether a source is a file: by its ending, or because a file of that name is there."""
    return source.endswith(FILE_SUFFIXES) or Path(source).is_file()


def _package_files(packages: list[str]) -> Iterator[tuple[str, str, Path]]:
    # Two names may stand for the same files (a distribution and its module): read them once.
    seen: set[Path] = set()
    for package in packages:
        for name, path in source_files(package):
            if path not in seen:
                seen.add(path)
                yield package, name, path


def _package_document(group: str, name: str, path: Path) -> Iterator[Document]:
    text = read_source(path)
    if text is not None:
        yield Document(name=name, text=text, group=group)


def _stream(source: str) -> Iterator[Document]:
    texts = _file_texts(_existing(source)) if is_file_source(source) else _hub_texts(source)
    for index, text in enumerate(texts):
        if text.strip():
            yield Document(name=f"{source}:{index}", text=text, group=source)


def _existing(source: str) -> Path:
    path = Path(source).expanduser()
    if not path.is_file():
        raise UserError(f"text source {source} does not exist; give the path of a file")
    return path


def _file_texts(path: Path) -> Iterator[str]:
    readers = {".txt": _text_pieces, ".jsonl": _jsonl_texts, ".parquet": _parquet_texts}
    reader = readers.get(path.suffix)
    if reader is None:
        raise UserError(
            f"text source {path} has an unknown ending; use one of {', '.join(FILE_SUFFIXES)}"
        )
    return reader(path)


def _text_pieces(path: Path) -> Iterator[str]:
    pieces: list[str] = []
    size = 0
    for line in _lines(path):
        pieces.append(line)
        size += len(line)
        if size >= TEXT_PIECE:
            yield "".join(pieces)
            pieces, size = [], 0
    yield "".join(pieces)


def _jsonl_texts(path: Path) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error.msg})") from error
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise UserError(f'{path}, line {number}: no field "text" with a string in it')
        yield text


def _lines(path: Path) -> Iterator[str]:
    try:
        # newline="\n": line ends stay as they are in the file, which bits per byte relies on.
        with path.open(encoding="utf-8", newline="\n") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; convert it first") from error


def _parquet_texts(path: Path) -> Iterator[str]:
    parquet: Any = _library("pyarrow.parquet", path.name)
    arrow: Any = _library("pyarrow", path.name)
    try:
        file = parquet.ParquetFile(path)
    except (arrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is not a parquet file that can be read ({error})") from error
    names = file.schema_arrow.names
    if "text" not in names:
        raise UserError(f'{path} has no column "text" (it has {", ".join(names)}); rename one')
    for batch in file.iter_batches(batch_size=1024, columns=["text"]):
        yield from (str(text) for text in batch.column(0).to_pylist() if text is not None)


def _hub_texts(source: str) -> Iterator[str]:
    name, config, split, column = parse_hub_source(source)
    datasets: Any = _library("datasets", source)
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
    except Exception as error:  # The library raises a dozen unrelated types for a wrong name.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"data set {source!r} cannot be read: {reason}") from error
    for row in rows:
        if not isinstance(row.get(column), str):
            raise UserError(
                f"data set {source!r} has no text column {column!r} (it has {', '.join(row)}); "
                "write name:split:column"
            )
        yield row[column]


def parse_hub_source(source: str) -> tuple[str, str | None, str, str]:
    """Name, configuration, split and column of `name[/config][:split[:column]]`.

    Raises:
        UserError: the string has too many parts or an empty one.
    """
    address, *rest = source.split(":")
    parts = address.split("/")
    if len(rest) > 2 or len(parts) > 3 or not all(rest) or not all(parts):
        raise UserError(
            f"unknown text source {source!r}; use python-packages:NAME,..., a .txt, .jsonl or "
            ".parquet file, or a data set as owner/name[/config][:split[:column]]"
        )
    split, column = [*rest, *("train", "text")[len(rest) :]]
    return "/".join(parts[:2]), parts[2] if len(parts) == 3 else None, split, column


def _library(name: str, source: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise UserError(f"reading {source} needs {package}; pip install {package}") from error
