"""Parameters of tests have an order: workers of pytest-xdist refuse tests that each of them collects in another order.

The order of a set of strings changes from process to process.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ORDERED = {"sorted", "len", "any", "all", "sum", "min", "max"}
"""functions whose result does not depend on the order of their argument"""


def unordered(tree: ast.AST) -> Iterator[int]:
    """Yield the lines on which parameters of tests are made of a set."""
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "parametrize":
            yield from (line for argument in call.args for line in sets(argument))


def sets(node: ast.AST) -> Iterator[int]:
    """Yield the lines of sets in an expression, but those that are an element of a list and those of which a comparison
    or a call of `ORDERED` is made."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ORDERED:
        return
    if isinstance(node, ast.Compare):
        return
    is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("set", "frozenset")
    if is_call or isinstance(node, ast.Set | ast.SetComp):
        yield node.lineno  # type: ignore[attr-defined]
    for child in ast.iter_child_nodes(node):
        if not (isinstance(node, ast.List | ast.Tuple) and isinstance(child, ast.Set)):
            yield from sets(child)


def test_no_parameters_are_made_of_sets() -> None:
    folder = Path(__file__).parent
    lines = [
        f"{path.relative_to(folder)}:{line}"
        for path in sorted(folder.rglob("test_*.py"))
        for line in unordered(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not lines


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("'a', ['b', *{'c', 'd'} & names]", True),
        ("'a', list(set(names))", True),
        ("'a', [name for name in names if name in {'b'}]", False),
        ("'a', sorted(set(names))", False),
        ("'a', [{'b', 'c'}]", False),
    ],
)
def test_sets_are_told_from_what_has_an_order(arguments: str, expected: bool) -> None:
    assert bool([*unordered(ast.parse(f"pytest.mark.parametrize({arguments})"))]) is expected
