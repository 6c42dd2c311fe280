"""Mutants: small, plausible mistakes in a source file, one at a time.

A mutant replaces one expression or statement by another that a tired programmer could have written: an operator or
a boundary exchanged, a condition turned round, an argument dropped or exchanged, a constant changed, a statement or
a guard left out. Annotations, documentation, the wording of errors, `zip(strict=True)` and encodings are left alone.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path


_OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
_BOUNDARIES = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
_OPPOSITES = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
}
# Of zip() and warn(): they tell of mistakes, and change nothing else. Encodings: `tests/hostile/test_source.py` asks
# for them in every call.
_GUARDS = ("strict", "stacklevel", "encoding")
_TWINS = {"min": "max", "max": "min", "any": "all", "all": "any"}


@dataclass(frozen=True)
class Mutant:
    """One mistake: the bytes from `start` to `end` of a file become `after`."""

    path: str
    line: int
    function: str  # qualified name of the function it is in; empty outside of functions
    kind: str
    start: int
    end: int
    before: str
    after: str

    def applied(self, source: bytes) -> bytes:
        """The file with the mistake in it."""
        return source[: self.start] + self.after.encode() + source[self.end :]

    def __str__(self) -> str:
        return f"{self.path}:{self.line} [{self.kind}] {_shortened(self.before)}  ->  {_shortened(self.after)}"


def mutants_of(path: Path, root: Path) -> list[Mutant]:
    """Every mutant of a file; `path` in them is relative to `root`."""
    source = path.read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    tree = ast.parse(source)
    functions = _functions_of(tree)
    found = {}
    for node, kind, after in _changes(tree):
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        name = path.relative_to(root).as_posix()
        inside = [name for name, first, last in functions if first <= node.lineno <= last]
        before = source[start:end].decode()
        found[start, end, after] = Mutant(
            name, node.lineno, inside[-1] if inside else "", kind, start, end, before, after
        )
    return list(found.values())


def _functions_of(node: ast.AST, outer: str = "") -> list[tuple[str, int, int]]:
    """Of every function: its qualified name as Python writes it, and the lines of its body; inner ones later."""
    found = []
    for child in ast.iter_child_nodes(node):
        name = outer
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found.append((outer + child.name, child.body[0].lineno, child.end_lineno))
            name = f"{outer}{child.name}.<locals>."
        elif isinstance(child, ast.ClassDef):
            name = f"{outer}{child.name}."
        found += _functions_of(child, name)
    return found


def _changes(tree: ast.AST) -> Iterator[tuple[ast.AST, str, str]]:
    """Every node with what it may become."""
    for node in _walked(tree):
        if isinstance(node, ast.stmt):
            for kind, statement in _of_statement(node):
                yield node, kind, statement if isinstance(statement, str) else ast.unparse(statement)
        elif isinstance(node, ast.expr):
            for kind, expression in _of_expression(node):
                yield node, kind, f"({ast.unparse(expression)})"


def _walked(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below that behaviour hangs on: no annotations, docstrings, texts of errors, f-strings, `__all__`."""
    yield node
    if isinstance(node, ast.Raise):
        return
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "bases"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not _is_left_alone(child):
                yield from _walked(child)


def _is_left_alone(node: ast.AST) -> bool:
    if isinstance(node, ast.keyword) and node.arg in _GUARDS:
        return True
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return True
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("__all__", "logger"):
        return True
    is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_text or isinstance(node, (ast.JoinedStr, ast.Import, ast.ImportFrom))


def _of_statement(node: ast.stmt) -> Iterator[tuple[str, ast.stmt | str]]:
    if isinstance(node, ast.Raise):
        yield "guard removed", "pass"
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "statement removed", "pass"
    elif isinstance(node, ast.Assign) and isinstance(node.targets[0], (ast.Attribute, ast.Subscript)):
        yield "assignment removed", "pass"
    elif isinstance(node, ast.AugAssign) and type(node.op) in _OPERATORS:
        yield "operator", _with(node, op=_OPERATORS[type(node.op)]())
    elif isinstance(node, ast.Return) and node.value and not isinstance(node.value, ast.Constant):
        yield "return", "return None"
    elif isinstance(node, ast.Continue):
        yield "loop", "break"
    elif isinstance(node, ast.Break):
        yield "loop", "continue"


def _of_expression(node: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    rules = {
        ast.BinOp: _of_operation,
        ast.Compare: _of_comparison,
        ast.BoolOp: _of_logic,
        ast.UnaryOp: _of_sign,
        ast.Call: _of_call,
        ast.Constant: _of_constant,
    }
    if isinstance(node, ast.IfExp):
        yield "branches", _with(node, body=node.orelse, orelse=node.body)
    elif isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
        yield from _of_comprehension(node)
    elif type(node) in rules:
        yield from rules[type(node)](node)


def _of_operation(node: ast.BinOp) -> Iterator[tuple[str, ast.expr]]:
    if type(node.op) in _OPERATORS:
        yield "operator", _with(node, op=_OPERATORS[type(node.op)]())
    elif isinstance(node.op, ast.MatMult):
        yield "operands", _with(node, left=node.right, right=node.left)


def _of_comparison(node: ast.Compare) -> Iterator[tuple[str, ast.expr]]:
    for kind, table in (("boundary", _BOUNDARIES), ("condition", _OPPOSITES)):
        if len(node.ops) == 1 and type(node.ops[0]) in table:
            yield kind, _with(node, ops=[table[type(node.ops[0])]()])


def _of_logic(node: ast.BoolOp) -> Iterator[tuple[str, ast.expr]]:
    yield "and, or", _with(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
    for number in range(len(node.values)):
        rest = [value for other, value in enumerate(node.values) if other != number]
        yield "condition dropped", rest[0] if len(rest) == 1 else _with(node, values=rest)


def _of_sign(node: ast.UnaryOp) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(node.op, (ast.Not, ast.USub)):
        yield "not" if isinstance(node.op, ast.Not) else "sign", node.operand


def _of_constant(node: ast.Constant) -> Iterator[tuple[str, ast.expr]]:
    value = node.value
    if isinstance(value, bool):
        yield "constant", ast.Constant(not value)
    elif isinstance(value, int):
        yield "constant", ast.Constant(value + 1)
    elif isinstance(value, float):
        yield "constant", ast.Constant(value * 2 if value else 1.0)
    elif isinstance(value, str) and value and not any(sign.isspace() for sign in value):
        yield "constant", ast.Constant(value + "x")


def _of_call(node: ast.Call) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(node.func, ast.Name) and node.func.id in _TWINS:
        yield "function", _with(node, func=ast.Name(_TWINS[node.func.id]))
    for number, keyword in enumerate(node.keywords):
        if keyword.arg is not None and keyword.arg not in _GUARDS:
            rest = [*node.keywords[:number], *node.keywords[number + 1 :]]
            yield "argument dropped", _with(node, keywords=rest)
    if len(node.args) >= 2 and not any(isinstance(argument, ast.Starred) for argument in node.args):
        for number, (first, second) in enumerate(pairwise(node.args)):
            if ast.dump(first) != ast.dump(second) and ast.unparse(node.func) not in _TWINS:
                exchanged = [*node.args[:number], second, first, *node.args[number + 2 :]]
                yield "arguments exchanged", _with(node, args=exchanged)
        yield "argument dropped", _with(node, args=node.args[:-1])


def _of_comprehension(node: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    for number, loop in enumerate(node.generators):
        if loop.ifs:
            changed = copy.deepcopy(node)
            changed.generators[number].ifs = loop.ifs[1:]
            yield "condition dropped", changed


def _with(node: ast.AST, **fields: object) -> ast.AST:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _shortened(text: str, length: int = 110) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 3] + "..."
