"""The packaging says what the folders say: what it forgets works here and nowhere else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
ELSEWHERE = """
import importlib, pkgutil, sys
from pathlib import Path
import minipuzzle
from minipuzzle.cli import main
from minipuzzle.recipe import demo_recipe
assert Path(minipuzzle.__file__).is_relative_to(sys.argv[1]), minipuzzle.__file__
for module in pkgutil.walk_packages(minipuzzle.__path__, "minipuzzle."):
    found = importlib.import_module(module.name)
    assert Path(found.__file__).is_relative_to(sys.argv[1]), found.__file__
assert demo_recipe().is_file()
assert main(["plan", "demo"]) == 0
"""
NOT_SHIPPED = {"__pycache__", "build"}


def setuptools_table() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        table: dict[str, Any] = tomllib.load(file)["tool"]["setuptools"]
    return table


def stage_folders() -> dict[str, str]:
    """Package -> folder, for the packages that lie outside minipuzzle/."""
    mapping: dict[str, str] = setuptools_table()["package-dir"]
    return {package: folder for package, folder in mapping.items() if package != "minipuzzle"}


def packages_on_disk() -> set[str]:
    roots = {"minipuzzle": "minipuzzle", **stage_folders()}
    found = set()
    for package, folder in roots.items():
        for init in (ROOT / folder).rglob("__init__.py"):  # rglob does not follow links
            if not NOT_SHIPPED & set(init.parts):
                inner = init.parent.relative_to(ROOT / folder).parts
                found.add(".".join([package, *inner]))
    return found


def test_packages_are_the_folders_with_an_init() -> None:
    listed = setuptools_table()["packages"]
    assert len(listed) == len(set(listed))
    assert set(listed) == packages_on_disk()


def test_no_module_without_a_package() -> None:
    """A folder of .py files without __init__.py would be left out of the wheel."""
    folders = ["minipuzzle", *stage_folders().values()]
    bare = {
        path.parent
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if not NOT_SHIPPED & set(path.parts) and not (path.parent / "__init__.py").exists()
    }
    assert not bare


@pytest.mark.skipif(sys.platform == "win32", reason="links may be text files there")
@pytest.mark.parametrize("package", sorted(stage_folders()))
def test_links_lead_to_the_folders_of_the_mapping(package: str) -> None:
    link = ROOT.joinpath(*package.split("."))
    assert link.is_symlink(), f"{link} is missing: ln -s ../{stage_folders()[package]} {link}"
    assert not link.readlink().is_absolute()
    assert link.resolve() == ROOT / stage_folders()[package]


def test_dependencies_of_the_constraints_cover_the_project() -> None:
    """Every package that pyproject.toml asks for (but the gpu extra) has a tested version."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    wanted = {name_of(text) for text in project["dependencies"]}
    wanted |= {name_of(text) for text in project["optional-dependencies"]["dev"]}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {name_of(line) for line in lines if "==" in line and not line.startswith("#")}
    assert wanted <= pinned
    assert "torch==2.13.0" in lines


def name_of(requirement: str) -> str:
    end = next((i for i, c in enumerate(requirement) if c in "<>=!~[ ;"), len(requirement))
    return requirement[:end].lower().replace("_", "-")


@pytest.mark.slow
def test_wheel_is_whole(tmp_path: Path) -> None:
    """Every module and data file that git knows under the packages is in the wheel, once.

    Built from a copy of the tracked files: what lies about here can neither help nor harm.
    """
    copy, out = tmp_path / "copy", tmp_path / "out"
    for path in tracked("."):
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, copy / path, follow_symlinks=False)
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(copy)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = out.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    assert {name for name in names if name.startswith("minipuzzle/")} == expected_in_wheel()

    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path / "installed")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def tracked(folder: str) -> list[Path]:
    """Paths that git tracks under ``folder`` and that are there, relative to the root."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", folder]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    paths = [Path(name) for name in listing.split("\0") if name]
    return [path for path in paths if (ROOT / path).is_symlink() or (ROOT / path).exists()]


def expected_in_wheel() -> set[str]:
    folders = {"minipuzzle": "minipuzzle", **stage_folders()}
    return {
        "/".join([*package.split("."), *path.relative_to(folder).parts])
        for package, folder in folders.items()
        for path in tracked(folder)
        if not (ROOT / path).is_symlink()
    }
