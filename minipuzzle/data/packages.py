"""Python sources of installed packages as documents: text that is always there.

Nothing is imported or downloaded, and nothing has to be redistributed: a package is found through
its installation record (`importlib.metadata`) or its module spec, and its `.py` files are read in
sorted order, so one version of a package always gives the same documents.
"""

import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from minipuzzle.errors import UserError

STANDARD_LIBRARY = "stdlib"
"""Name that stands for the standard library, without its own tests and site-packages."""

MAX_BYTES_PER_FILE = 1 << 20
"""Larger files are tables or generated code, hardly ever written by a person."""

_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__phello__"}


@dataclass(frozen=True)
class Document:
    """One source file.

    Attributes:
        name: "package/relative/path.py", unique within the package.
        text: the decoded file.
        group: the package's name as it was asked for; splits are made by it.
    """

    name: str
    text: str
    group: str


def python_package_documents(
    packages: Sequence[str], *, max_bytes_per_file: int = MAX_BYTES_PER_FILE
) -> Iterator[Document]:
    """Yield the `.py` files of installed packages, package after package, sorted by name.

    Args:
        packages: names of distributions ("scikit-learn") or of top-level modules ("sklearn"), or
            "stdlib". A distribution of that name goes first.
        max_bytes_per_file: larger files are left out.

    Empty files, files that are not UTF-8 and everything under `__pycache__` are left out.

    Raises:
        UserError: a package is not installed; raised before the first document of any package.
    """
    found = [(package, source_files(package)) for package in packages]
    for package, files in found:
        for name, path in files:
            text = read_source(path, max_bytes_per_file)
            if text is not None:
                yield Document(name=name, text=text, group=package)


def package_version(package: str) -> str | None:
    """Version of an installed package, or None where none is recorded (a module of one's own)."""
    if package == STANDARD_LIBRARY:
        return ".".join(str(part) for part in sys.version_info[:3])
    distribution = _distribution(package)
    if distribution is None:
        owners = importlib.metadata.packages_distributions().get(package, [])
        distribution = _distribution(owners[0]) if owners else None
    return None if distribution is None else distribution.version


def source_files(package: str) -> list[tuple[str, Path]]:
    """Name and place of every `.py` file of an installed package, sorted by name.

    Raises:
        UserError: the package is not installed, or holds no Python source.
    """
    if package == STANDARD_LIBRARY:
        return _standard_library_files()
    files = _distribution_files(package) or _module_files(package)
    if not files:
        raise UserError(
            f"no Python sources of a package {package!r} are installed here; "
            f"install it (pip install {package}) or take the name out of the list"
        )
    return sorted(files.items())


def _distribution(package: str) -> importlib.metadata.Distribution | None:
    try:
        return importlib.metadata.distribution(package)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None


def _distribution_files(package: str) -> dict[str, Path]:
    distribution = _distribution(package)
    if distribution is None:
        return {}
    # A record may name files outside the installation folder (scripts); those are not library code.
    recorded = (entry for entry in distribution.files or () if _is_source(entry.parts))
    return {entry.as_posix(): Path(str(distribution.locate_file(entry))) for entry in recorded}


def _module_files(package: str) -> dict[str, Path]:
    if not package.isidentifier():
        return {}
    # A loaded module may lack a spec (`__main__`); the path finder asks the folders and only them.
    spec = importlib.machinery.PathFinder.find_spec(package) or _hooked_spec(package)
    if spec is None:
        return {}
    if spec.submodule_search_locations is None:
        origin = spec.origin or ""
        return {f"{package}.py": Path(origin)} if origin.endswith(".py") else {}
    files: dict[str, Path] = {}
    for location in spec.submodule_search_locations:
        for relative, path in _walk(Path(location)):
            files.setdefault(f"{package}/{relative}", path)
    return files


def _hooked_spec(package: str) -> importlib.machinery.ModuleSpec | None:
    """Spec of a package that only an import hook knows: an editable installation."""
    try:
        return importlib.util.find_spec(package)
    except (ValueError, ImportError):
        return None


def _standard_library_files() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    return sorted(
        (f"{STANDARD_LIBRARY}/{relative}", path)
        for relative, path in _walk(root)
        if _NOT_LIBRARY.isdisjoint(Path(relative).parts)
    )


def _walk(root: Path) -> Iterator[tuple[str, Path]]:
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if _is_source(relative.parts):
            yield relative.as_posix(), path


def _is_source(parts: tuple[str, ...]) -> bool:
    return parts[-1].endswith(".py") and "__pycache__" not in parts and ".." not in parts


def read_source(path: Path, max_bytes: int = MAX_BYTES_PER_FILE) -> str | None:
    """Text of one file, or None where it is empty, too large, unreadable or not UTF-8."""
    try:
        if not path.is_file() or path.stat().st_size > max_bytes:
            return None
        # No newline translation: bits per byte counts the bytes that are in the file.
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return text if text.strip() else None
