"""Reading of recipes: YAML, overrides, paths, and errors as one line that helps."""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from minipuzzle.errors import UserError
from minipuzzle.source import DEMO, demo_teacher

FILE_SOURCES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Place:
    """Where the values of a recipe came from: a file (or other name), and --set on top."""

    source: str
    overrides: Mapping[str, Any]

    def of(self, location: Sequence[str]) -> str:
        """The source of the value at ``location``."""
        value: Any = self.overrides
        for key in location:
            if not isinstance(value, Mapping) or key not in value:
                return self.source
            value = value[key]
        return "--set"


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number (YAML 1.1 wants 1.0e-3) and a key may stand only once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(?:\.\d*)?[eE][-+]?\d+\Z"), list("-+0123456789")
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. UserError when there is none or it is no YAML."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"there is no recipe {path}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not a recipe") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file; a recipe is YAML in UTF-8") from None
    value = _parse(text, str(path))
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a recipe: it must hold keys and values, `model: ...` first")
    return value


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # a subclass of SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{source}, line {mark.line + 1}" if mark else source
        raise UserError(f"{where}: {error.problem or 'not YAML'}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{source}: {' '.join(str(error).split())}") from None


def override_mapping(overrides: Sequence[str]) -> dict[str, Any]:
    """["a.b=1", "a.c=x"] -> {"a": {"b": 1, "c": "x"}}, values read as YAML. UserError if not so."""
    result: dict[str, Any] = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        keys = name.strip().split(".")
        if not equals or not all(keys):
            raise UserError(f'--set "{override}" is not of the form key=value, like seed=1')
        value = _parse(text, f'--set "{override}"')
        for key in reversed(keys):
            value = {key: value}
        result = merged(result, value)
    return result


def merged(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the values of ``top`` laid over it, mapping by mapping."""
    result = dict(base)
    for key, value in top.items():
        below = result.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            value = merged(below, value)
        result[key] = value
    return result


def anchored(mapping: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """``mapping`` with `model` and file sources of `data` made absolute, relative to ``base``."""
    result = dict(mapping)
    if isinstance(result.get("model"), str):
        result["model"] = _model_path(result["model"], base)
    if isinstance(result.get("data"), Mapping):
        result["data"] = {key: _split(split, base) for key, split in result["data"].items()}
    return result


def _split(split: Any, base: Path) -> Any:
    if not isinstance(split, Mapping) or not isinstance(split.get("source"), str):
        return split
    source = split["source"]
    if source.lower().endswith(FILE_SOURCES):
        source = str((base / Path(source).expanduser()).absolute())
    return {**split, "source": source}


def _model_path(model: str, base: Path) -> str:
    """A path where ``model`` is one (it exists, or begins like one), else the hub id it must be."""
    if model == DEMO:
        return str(demo_teacher())
    path = base / Path(model).expanduser()
    written_as_path = model.startswith((".", "/", "~"))
    return str(path.resolve()) if written_as_path or path.is_dir() else model


def portable_model(model: str) -> str:
    """The inverse of what a recipe does with `demo`: the bundled teacher's path has that name."""
    return DEMO if model == str(demo_teacher()) else model


def explain(error: ValidationError, root: type[BaseModel], place: Place) -> str:
    """The first of the errors as one line, and how many there are besides."""
    details = error.errors(include_url=False)
    first = min(details, key=lambda detail: detail["type"] != "extra_forbidden")
    location = [str(part) for part in first["loc"]]
    where = f"{place.of(location)}: {'.'.join(location)}"
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"{where}: there is no such key; {_nearest(location, root)}{more}"
    if first["type"] == "missing":
        return f"{where}: is missing{more}"
    if first["type"] == "model_type":
        return f"{where}: holds keys of its own, so it cannot be {first['input']!r}{more}"
    message = first["msg"].removeprefix("Value error, ").replace("valid tuple", "list")
    message = message[0].lower() + message[1:]
    given = "" if first["type"] == "value_error" else f", not {first['input']!r}"
    return f"{where}: {message}{given}{more}"


def _nearest(location: Sequence[str], root: type[BaseModel]) -> str:
    """A hint for a key that does not exist: one like it here, else one of the same name."""
    known = list(keys(root))
    parent = ".".join(location[:-1])
    siblings = [key for key in known if key.rpartition(".")[0] == parent]
    near = difflib.get_close_matches(".".join(location), siblings, n=1, cutoff=0.6)
    namesakes = [key for key in known if key.rpartition(".")[2] == location[-1]]
    elsewhere = difflib.get_close_matches(".".join(location), known, n=1, cutoff=0.0)
    return f"did you mean {(near or namesakes or elsewhere)[0]}?"


def keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted names of all keys of ``section``, sections before what is in them."""
    for name, field in section.model_fields.items():
        yield prefix + name
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from keys(kind, f"{prefix}{name}.")
