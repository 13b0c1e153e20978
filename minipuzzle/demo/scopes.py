"""What `ast` knows of a Python file: its functions, what is in scope in them, where names stand."""

import ast
import builtins
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeGuard

BUILTINS = frozenset(dir(builtins))
WORD = re.compile(r"[A-Za-z_]\w*")
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_CLOSED = (*_FUNCTIONS, ast.ClassDef, ast.Lambda, ast.JoinedStr, ast.Constant)
_MARKS = (ast.expr_context, ast.operator, ast.boolop, ast.unaryop)


@dataclass(frozen=True)
class Use:
    """A name that is read at a place (a character of the file)."""

    name: str
    place: int


@dataclass
class Function:
    """A function or method, without the functions inside it.

    Attributes:
        name: its name.
        start, body, end: characters where `def`, the first statement and what follows it stand.
        parameters: names of its arguments, in order.
        bound: names that belong to it: arguments, and whatever its body binds.
        visible: everything that may be read in it: `bound`, enclosing functions, module, builtins.
        uses: names read in its body, in order; formatted strings are left out, because Python
            before 3.12 does not say where they stand.
        returns: names that stand alone after `return`.
        owner: the class it is a method of, None for a plain function.
    """

    name: str
    start: int
    body: int
    end: int
    parameters: tuple[str, ...]
    bound: frozenset[str]
    visible: frozenset[str] = frozenset()
    uses: tuple[Use, ...] = ()
    returns: tuple[Use, ...] = ()
    owner: "Class | None" = None


@dataclass(eq=False)
class Class:
    """A class at the top of a module: its place, and the attributes its `__init__` sets."""

    name: str
    start: int
    header_end: int
    initial: dict[str, tuple[int, int]] = field(default_factory=dict)
    """attribute -> first and last character of the statement that sets it"""


@dataclass(frozen=True)
class SourceFile:
    """A parsed file.

    Attributes:
        name: the document's name.
        text: ASCII, line feeds only, so that characters are what `ast` counts.
        functions: all functions, in order of appearance.
        classes: classes at the top of the module.
        imports: name -> first and last character of the statement at the top that imports it.
        attributes: reads of `self.name`, with the function they stand in.
    """

    name: str
    text: str
    functions: tuple[Function, ...]
    classes: tuple[Class, ...]
    imports: dict[str, tuple[int, int]]
    attributes: tuple[tuple[Function, Use], ...]


def parse(name: str, text: str) -> SourceFile | None:
    """Parse a file; None where it is no plain ASCII Python with line feeds."""
    if not text.isascii() or any(mark in text for mark in "\r\f\t\0"):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # their escapes are not our business
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return _Reader(name, text, tree).file()


def words(text: str) -> set[str]:
    """Identifiers and keywords in a text, those inside strings and comments included."""
    return set(WORD.findall(text))


class _Reader:
    """One pass over a tree."""

    def __init__(self, name: str, text: str, tree: ast.Module) -> None:
        self.name, self.text, self.tree = name, text, tree
        self.lines = [0, *(m.end() for m in re.finditer("\n", text))]
        self.functions: list[Function] = []
        self.classes: list[Class] = []
        self.attributes: list[tuple[Function, Use]] = []

    def file(self) -> SourceFile:
        nodes = list(_own_nodes(self.tree.body))
        self._scopes(nodes, frozenset(_names_bound(nodes) | BUILTINS), None, top=True)
        self.functions.sort(key=lambda function: function.start)
        return SourceFile(
            name=self.name,
            text=self.text,
            functions=tuple(self.functions),
            classes=tuple(self.classes),
            imports=self._imports(),
            attributes=tuple(sorted(self.attributes, key=lambda read: read[1].place)),
        )

    def place(self, line: int, column: int) -> int:
        return self.lines[line - 1] + column

    def start(self, node: ast.stmt | ast.expr) -> int:
        return self.place(node.lineno, node.col_offset)

    def end(self, node: ast.stmt | ast.expr) -> int:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self.place(node.end_lineno, node.end_col_offset)

    def _imports(self) -> dict[str, tuple[int, int]]:
        found: dict[str, tuple[int, int]] = {}
        for node in self.tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                for name in _names_bound([node]):
                    found.setdefault(name, (self.start(node), self.end(node)))
        return found

    def _scopes(
        self, nodes: list[ast.AST], visible: frozenset[str], owner: Class | None, *, top: bool
    ) -> None:
        """Read the functions and classes among the nodes of a scope."""
        for node in nodes:
            if isinstance(node, _FUNCTIONS):
                self._function(node, visible, owner)
            elif isinstance(node, ast.ClassDef):
                self._class(node, visible, top and node.col_offset == 0)

    def _class(self, node: ast.ClassDef, visible: frozenset[str], top: bool) -> None:
        start = self.start(node)
        header_end = self.text.rfind(":", start, self.start(node.body[0])) + 1
        found = Class(node.name, start, header_end)
        # Methods cannot read the names of the class body as they stand; to take them for visible
        # only leaves out wrong choices that somebody might call right.
        nodes = list(_own_nodes(node.body))
        self._scopes(nodes, visible | _names_bound(nodes), found if top else None, top=False)
        if top:
            self._initial(node, found)
            self.classes.append(found)

    def _initial(self, node: ast.ClassDef, found: Class) -> None:
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                for statement in _own_nodes(method.body):
                    if not isinstance(statement, ast.Assign | ast.AnnAssign):
                        continue
                    for target in _targets(statement):
                        place = (self.start(statement), self.end(statement))
                        first = min(found.initial.get(target.attr, place), place)
                        found.initial[target.attr] = first

    def _function(
        self,
        node: ast.FunctionDef | ast.AsyncFunctionDef,
        visible: frozenset[str],
        owner: Class | None,
    ) -> None:
        parameters = _parameters(node.args)
        nodes = list(_own_nodes(node.body))
        bound = frozenset(_names_bound(nodes) | set(parameters))
        inner = visible | bound
        function = Function(
            name=node.name,
            start=self.start(node),
            body=self.start(node.body[0]),
            end=self.end(node),
            parameters=parameters,
            bound=bound,
            visible=inner,
            owner=owner,
        )
        uses: list[Use] = []
        returns: list[Use] = []
        for child in nodes:
            if isinstance(child, ast.Name):
                if isinstance(child.ctx, ast.Load):
                    self._append(uses, child.id, self.start(child))
            elif isinstance(child, ast.Return) and isinstance(child.value, ast.Name):
                self._append(returns, child.value.id, self.start(child.value))
            elif _is_own_attribute(child) and isinstance(child.ctx, ast.Load):
                place = self.end(child) - len(child.attr)
                if self.text.startswith(child.attr, place):
                    self.attributes.append((function, Use(child.attr, place)))
        function.uses = tuple(sorted(uses, key=lambda use: use.place))
        function.returns = tuple(sorted(returns, key=lambda use: use.place))
        self.functions.append(function)
        self._scopes(nodes, inner, None, top=False)

    def _append(self, uses: list[Use], name: str, place: int) -> None:
        if self.text.startswith(name, place):
            uses.append(Use(name, place))


def _own_nodes(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """All nodes under the statements, in no order; other scopes are given but not entered."""
    waiting: list[ast.AST] = list(body)
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, _CLOSED):
            continue
        # ast.iter_child_nodes without its two generators: this loop is where reading files goes.
        for name in node._fields:
            value = getattr(node, name, None)
            if isinstance(value, ast.AST):
                if not isinstance(value, _MARKS):
                    waiting.append(value)
            elif isinstance(value, list):
                waiting += [item for item in value if isinstance(item, ast.AST)]


def _names_bound(nodes: list[ast.AST]) -> set[str]:
    """Names that a scope's nodes bind: assigned, imported, defined, caught, declared global."""
    bound: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Name):
            if not isinstance(node.ctx, ast.Load):
                bound.add(node.id)
        elif isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            bound.add(node.name)
        elif isinstance(node, ast.Global | ast.Nonlocal):
            bound |= set(node.names)
    return bound


def _parameters(arguments: ast.arguments) -> tuple[str, ...]:
    several = [arguments.vararg, arguments.kwarg]
    plain = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return tuple(a.arg for a in [*plain, *(s for s in several if s is not None)])


def _targets(statement: ast.Assign | ast.AnnAssign) -> list[ast.Attribute]:
    """Attributes of `self` that an assignment sets, those in tuples included."""
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    parts = [e for t in targets for e in (t.elts if isinstance(t, ast.Tuple) else [t])]
    return [part for part in parts if _is_own_attribute(part)]


def _is_own_attribute(node: ast.AST) -> TypeGuard[ast.Attribute]:
    return (
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    )
