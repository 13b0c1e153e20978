"""Documentation that a test reads cannot rot: commands, settings, links, file trees."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from minipuzzle.cli import COMMANDS, cli

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])


def test_generated_pages_are_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "write_docs.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_command_has_a_page() -> None:
    pages = {path.stem for path in (ROOT / "docs" / "commands").glob("*.md")} - {"README"}
    assert pages == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_explains_itself(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None and command.help
    assert len(command.get_short_help_str(limit=66)) > 10
    assert not command.get_short_help_str(limit=66).endswith("...")
    assert "Example" in command.help and f"minipuzzle {name}" in command.help
    for option in command.params:
        assert isinstance(option, click.Argument) or getattr(option, "help", None), option.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def trees(text: str) -> list[list[str]]:
    """The lines of each code block that draws a tree of files (its lines begin with a path)."""
    blocks = re.findall(r"```(?:text)?\n(.*?)```", text, flags=re.DOTALL)
    return [block.splitlines() for block in blocks if re.search(r"^[├└]── ", block, re.MULTILINE)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_trees_name_what_exists(page: Path) -> None:
    """Every path of a drawn tree exists. Depth is four columns, a comment follows two spaces."""
    for lines in trees(page.read_text(encoding="utf-8")):
        above: list[str] = []
        for line in lines:
            drawn = re.match(r"^((?:│   |    )*)[├└]── (\S+)", line)
            if drawn is None:
                continue
            depth, name = len(drawn[1]) // 4, drawn[2]
            above = [*above[:depth], name.rstrip("/")]
            assert ROOT.joinpath(*above).exists(), f"{page.name}: {'/'.join(above)} does not exist"


def test_the_tree_check_can_fail() -> None:
    assert trees("```text\n├── minipuzzle/  core\n│   └── nothing.py  gone\n```") == [
        ["├── minipuzzle/  core", "│   └── nothing.py  gone"]
    ]
