"""Write docs/commands/*.md and docs/recipe.md from the program itself.

python scripts/write_docs.py            write them
python scripts/write_docs.py --check    exit 1 and name those that are out of date
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from minipuzzle.cli import COMMANDS, cli
from minipuzzle.recipe import Recipe

DOCS = Path(__file__).parent.parent / "docs"
GENERATED = "<!-- Made by scripts/write_docs.py; change the code and run it again. -->"
WIDTH = 80


def main() -> int:
    """Write all pages, or with --check only compare them."""
    pages = all_pages()
    stale = [path for path, text in pages.items() if _read(path) != text]
    stale += sorted(set(DOCS.joinpath("commands").glob("*.md")) - set(pages))
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.relative_to(DOCS.parent)} is out of date: run scripts/write_docs.py")
        return 1 if stale else 0
    for path in stale:
        if path in pages:
            path.parent.mkdir(exist_ok=True)
            path.write_text(pages[path], encoding="utf-8")
        else:
            path.unlink()
    return 0


def all_pages() -> dict[Path, str]:
    """Path -> text of every generated page."""
    pages = {DOCS / "commands" / f"{name}.md": command_page(name) for name in COMMANDS}
    pages[DOCS / "commands" / "README.md"] = index_page()
    pages[DOCS / "recipe.md"] = recipe_page()
    return pages


def command_page(name: str) -> str:
    """Help of one command, and the settings of the recipe that are its own."""
    lines = [f"# minipuzzle {name}", "", GENERATED, "", "```text", help_text(name), "```"]
    section = Recipe.model_fields.get(name)
    if section is not None and isinstance(section.annotation, type):
        assert issubclass(section.annotation, BaseModel)
        rows = list(setting_rows(section.annotation, f"{name}."))
        if rows:
            lines += ["", "Its settings in a [recipe](../recipe.md):", "", *table(rows)]
    return "\n".join(lines) + "\n"


def index_page() -> str:
    """All commands with their one line."""
    lines = ["# Commands", "", GENERATED, ""]
    lines += [f"- [minipuzzle {name}]({name}.md): {short_help(name)}" for name in COMMANDS]
    return "\n".join(lines) + "\n"


def recipe_page() -> str:
    """Every key of a recipe."""
    lines = [
        "# Recipes",
        "",
        GENERATED,
        "",
        "A recipe is a YAML file. Only `model` must be given; `--set KEY=VALUE` changes a key on",
        "the command line. A key that does not exist is refused, with the nearest one that does.",
        "",
        *table(list(setting_rows(Recipe))),
    ]
    return "\n".join(lines) + "\n"


def help_text(name: str) -> str:
    """What `minipuzzle NAME --help` prints on 80 columns."""
    command = find(name)
    above = click.Context(cli, info_name="minipuzzle", **cli.context_settings)
    context = click.Context(command, parent=above, info_name=name, terminal_width=WIDTH)
    return command.get_help(context)


def short_help(name: str) -> str:
    """The first sentence of a command's help."""
    return find(name).get_short_help_str(limit=200)


def find(name: str) -> click.Command:
    """The command of that name."""
    command = cli.get_command(click.Context(cli), name)
    assert command is not None, name
    return command


def setting_rows(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(key, default, description) of all keys that hold a value."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from section_rows(kind, field.default, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", show(field.default), field.description or ""


def section_rows(
    kind: type[BaseModel], default: object, prefix: str
) -> Iterator[tuple[str, str, str]]:
    """Rows of a nested section, with the values that the section has where it stands."""
    for key, value, description in setting_rows(kind, prefix):
        name = key.removeprefix(prefix)
        own = getattr(default, name, PydanticUndefined) if "." not in name else PydanticUndefined
        yield key, value if own is PydanticUndefined else show(own), description


def show(value: object) -> str:
    """A default as YAML writes it."""
    if value is PydanticUndefined:
        return "(required)"
    if value is None:
        return "`null`"
    if isinstance(value, tuple):
        return f"`{[x.model_dump() if isinstance(x, BaseModel) else x for x in value]}`"
    return f"`{value}`"


def table(rows: list[tuple[str, str, str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = ["| key | default | |", "|---|---|---|"]
    return lines + [f"| `{key}` | {value} | {text} |" for key, value, text in rows]


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


if __name__ == "__main__":
    sys.exit(main())
