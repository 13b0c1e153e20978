import sys
from pathlib import Path

import pytest

from minipuzzle.data.packages import (
    Document,
    package_version,
    python_package_documents,
    source_files,
)
from minipuzzle.errors import UserError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the import path with a package, a module and a recorded distribution."""
    package = tmp_path / "toy"
    (package / "sub" / "__pycache__").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')\n")
    (package / "sub" / "b.py").write_text("b = 1\n")
    (package / "sub" / "a.py").write_bytes(b"a = 'x'\r\n")
    (package / "latin.py").write_bytes(b"x = '\xe9'\n")
    (package / "empty.py").write_text("\n")
    (package / "large.py").write_text("x = 1\n" * 100)
    (package / "data.txt").write_text("no source")
    (package / "sub" / "__pycache__" / "c.py").write_text("c = 1\n")
    (tmp_path / "single.py").write_text("s = 1\n")
    info = tmp_path / "toy_dist-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-dist\nVersion: 1.5\n")
    (info / "RECORD").write_text("toy/sub/b.py,,\nsingle.py,,\n../outside.py,,\ngone.py,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_module_is_read_sorted_and_not_imported(folder: Path) -> None:
    documents = list(python_package_documents(["toy"], max_bytes_per_file=200))
    assert [document.name for document in documents] == [
        "toy/__init__.py",
        "toy/sub/a.py",
        "toy/sub/b.py",
    ]
    assert documents[1] == Document(name="toy/sub/a.py", text="a = 'x'\r\n", group="toy")
    assert "toy" not in sys.modules


def test_distribution_is_read_by_its_record(folder: Path) -> None:
    documents = list(python_package_documents(["toy-dist"]))
    assert [(d.name, d.group) for d in documents] == [
        ("single.py", "toy-dist"),
        ("toy/sub/b.py", "toy-dist"),
    ]
    assert package_version("toy-dist") == "1.5"


def test_single_module(folder: Path) -> None:
    assert [d.name for d in python_package_documents(["single"])] == ["single.py"]


def test_missing_package_is_named_before_any_document(folder: Path) -> None:
    documents = python_package_documents(["toy", "no-such-package"])
    with pytest.raises(UserError, match="no-such-package"):
        next(documents)


@pytest.mark.parametrize("name", ["", "..", "a/b", "sys"])
def test_names_without_sources(name: str) -> None:
    with pytest.raises(UserError):
        source_files(name)


def test_installed_package_is_the_same_by_both_names() -> None:
    distribution = list(python_package_documents(["PyYAML"]))
    module = list(python_package_documents(["yaml"]))
    names = {d.name for d in distribution}
    assert {d.name for d in module} <= names
    assert package_version("yaml") == package_version("PyYAML")


def test_standard_library_has_neither_tests_nor_site_packages() -> None:
    names = [name for name, _ in source_files("stdlib")]
    assert "stdlib/ast.py" in names
    assert names == sorted(names)
    assert not [name for name in names if "site-packages" in name or "/test/" in name]
    assert package_version("stdlib") == ".".join(map(str, sys.version_info[:3]))
