"""Mutants of a Python module: each is its source with one small change that a test ought to notice.

The operators: an edge or the sense of a comparison, ``and`` for ``or``, a negated condition, another arithmetic operator, a
constant one larger or smaller (a default argument's too), ``min`` for ``max``, a keyword left out, a statement left out.
Annotations, decorators, docstrings, imports and the words of messages are left alone.
"""

from __future__ import annotations

import ast
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
BOOLEAN = {ast.And: ast.Or, ast.Or: ast.And}
OPPOSITES = dict(
    pair
    for a, b in (("min", "max"), ("any", "all"), ("amin", "amax"), ("argmin", "argmax"), ("minimum", "maximum"))
    for pair in ((a, b), (b, a))
)
LEFT_ALONE = (ast.JoinedStr, ast.Import, ast.ImportFrom, ast.Assert)
GUARDS = {"strict", "stacklevel"}
"""Keywords that only check, which are left alone."""


@dataclass(frozen=True)
class Mutant:
    """``source`` is the whole module with the change in it; ``line`` (from 1) is where the change begins. ``key`` names the
    mutant by function, statement and change, so that edits elsewhere leave it."""

    path: str
    line: int
    key: str
    source: bytes

    def order(self, seed: int) -> str:
        """Where a sample of ``seed`` takes it: what is drawn does not change with edits elsewhere."""
        return hashlib.sha256(f"{seed} {self.path} {self.key}".encode()).hexdigest()


def mutants(path: str, source: bytes) -> list[Mutant]:
    """All mutants of one module, in the order of its lines."""
    lines = [0]
    for line in source.splitlines(keepends=True):
        lines.append(lines[-1] + len(line))
    found, seen = [], Counter()
    for node, change, statement, scope in _changes(ast.parse(source)):
        start, stop = lines[node.lineno - 1] + node.col_offset, lines[node.end_lineno - 1] + node.end_col_offset
        key = f"{scope}: {_short(node)} -> {_short(change)}" + f" | {_short(statement)}" * (statement is not node)
        seen[key] += 1
        text = f"({ast.unparse(change)})" if isinstance(node, ast.expr) else ast.unparse(change)
        mutated = source[:start] + text.encode() + source[stop:]
        found.append(Mutant(path, node.lineno, key + f" #{seen[key]}" * (seen[key] > 1), mutated))
    return found


def _short(node: ast.AST) -> str:
    """The first line of a node, without what it holds; of a long call its function and the names of its keywords."""
    text = ast.unparse(node).partition("\n")[0]
    if isinstance(node, ast.Call) and len(text) > 60:
        text = f"{ast.unparse(node.func)}({', '.join(['...', *(f'{k.arg}=' for k in node.keywords)])})"
    return text if len(text) <= 90 else text[:87] + "..."


def _changes(tree: ast.Module) -> Iterator[tuple[ast.AST, ast.AST, ast.AST, str]]:
    """(what is replaced, by what, its statement, its function) in order."""

    def visit(node: ast.AST, statement: ast.AST, scope: str, guarded: bool) -> Iterator:
        if isinstance(node, ast.stmt):
            statement = node
            if _can_go(node, guarded):
                yield node, ast.Pass(), statement, scope
        for change in _replacements(node):
            yield node, change, statement, scope
        inner = scope
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            inner = f"{scope}.{node.name}".removeprefix("<module>.")
        for name, child in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "exc", "msg", "format_spec"):
                continue
            for part in child if isinstance(child, list) else [child]:
                if isinstance(part, ast.AST) and not isinstance(part, LEFT_ALONE) and getattr(part, "arg", None) not in GUARDS:
                    condition = name == "test" and isinstance(node, (ast.If, ast.While, ast.IfExp))
                    if (condition or name == "ifs") and not isinstance(part, ast.Compare):  # a comparison has its own sense
                        yield part, ast.UnaryOp(ast.Not(), part), statement, inner
                    yield from visit(part, statement, inner, name == "body" and isinstance(node, ast.If))

    yield from visit(tree, tree, "<module>", False)


def _can_go(node: ast.stmt, guarded: bool) -> bool:
    """Whether a module without the statement is worth a test: what only binds a local name would be a NameError."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, (ast.Call, ast.Yield, ast.YieldFrom))
    if isinstance(node, ast.Assign):
        return any(isinstance(target, (ast.Attribute, ast.Subscript)) for target in node.targets)
    return isinstance(node, (ast.AugAssign, ast.Raise, ast.Break, ast.Continue)) or (guarded and isinstance(node, ast.Return))


def _replacements(node: ast.AST) -> Iterator[ast.AST]:
    """The node with one change of its own (not of what it holds)."""
    if isinstance(node, ast.Compare):
        for at, operator in enumerate(node.ops):
            yield _with(node, ops=[*node.ops[:at], COMPARISONS[type(operator)](), *node.ops[at + 1 :]])
    elif isinstance(node, ast.BoolOp):
        yield _with(node, op=BOOLEAN[type(node.op)]())
    elif isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in ARITHMETIC:
        yield _with(node, op=ARITHMETIC[type(node.op)]())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub, ast.Invert)):
        yield node.operand
    elif isinstance(node, ast.Constant):
        yield from (ast.Constant(value) for value in _other_values(node.value))
    elif isinstance(node, ast.Call):
        if isinstance(node.func, ast.Name) and node.func.id in OPPOSITES:
            yield _with(node, func=ast.Name(OPPOSITES[node.func.id]))
        elif isinstance(node.func, ast.Attribute) and node.func.attr in OPPOSITES:
            yield _with(node, func=_with(node.func, attr=OPPOSITES[node.func.attr]))
        for keyword in node.keywords:
            if keyword.arg is not None and keyword.arg not in GUARDS:
                yield _with(node, keywords=[other for other in node.keywords if other is not keyword])


def _other_values(value: object) -> list[object]:
    if isinstance(value, bool):
        return [not value]
    return [value + 1, value - 1] if isinstance(value, int) else [value + 1] if isinstance(value, float) else []


def _with(node: ast.AST, **changes: object) -> ast.AST:
    return type(node)(**{name: changes.get(name, value) for name, value in ast.iter_fields(node)})
