"""Fail where names that say nothing are more than a small share of all names that the code assigns.

Counts every assigned name (assignments, loops, `with`, comprehensions) and every argument of the files of the given
folders. `python tools/check_names.py --list` prints where they are.
"""

import argparse
import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

MOST = 0.005
"""The share that is allowed."""

VAGUE = frozenset(
    {
        *("found", "each", "held", "kept", "asked", "given", "made", "following", "wanted", "turned", "nothing"),
        *("place", "result", "thing", "stuff", "temp", "other"),
    }
)


def assigned_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every assigned name and argument of a module, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno


def is_vague(name: str) -> bool:
    """Whether a name is one of the list, perhaps private, in the plural or numbered."""
    word = name.strip("_").rstrip("0123456789_")
    return word in VAGUE or (word.endswith("s") and word[:-1] in VAGUE)


def main() -> int:
    """Exit status 1 where the share is too large."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("src"), Path("tests")])
    parser.add_argument("--list", action="store_true", help="print every vague name")
    options = parser.parse_args()
    total, vague = 0, Counter[str]()
    for path in (path for folder in options.folders for path in sorted(folder.rglob("*.py"))):
        for name, line in assigned_names(ast.parse(path.read_text())):
            total += 1
            if is_vague(name):
                vague[name] += 1
                if options.list:
                    print(f"{path}:{line}: {name}")
    share = vague.total() / max(total, 1)
    print(f"vague names: {vague.total()} of {total} assigned ({share:.2%}, at most {MOST:.1%})")
    if share > MOST:
        print("the most frequent: " + ", ".join(f"{name} {count}" for name, count in vague.most_common(10)))
    return int(share > MOST)


if __name__ == "__main__":
    sys.exit(main())
