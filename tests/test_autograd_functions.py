"""The autograd functions of the operations, and why each exists: softmax attention should have one.

Every such function repeats a forward and a backward pass by hand. One may be added only with a reason in this table;
`MOST` counts down as the others move to the engine.
"""

import ast
from pathlib import Path

import longspan

PACKAGE = Path(longspan.__file__).parent
ROOMS = ("engine", "contract", "mechanisms")
BASES = ("FirstOrder", "Function")
MOST = 9

SOFTMAX = {
    "engine/softmax.py:Attention": "schedules of tiles, which read ranges of keys or lists of blocks",
}
OTHERS = {
    "engine/first_order.py:FirstOrder": "the base of the others",
    "mechanisms/memorizing/operation.py:_Retrieve": "the best keys of a search: their columns and weights are saved",
    "mechanisms/entmax/tiles.py:EntmaxTiles": "entmax has no log-sum-exp to merge or recompute from",
    "mechanisms/entmax/operation.py:_Entmax": "entmax of scores",
    "engine/linear.py:_Blocked": "linear attention has no softmax",
    "mechanisms/gated_delta/operation.py:_GatedDelta": "the gated delta rule has no softmax",
    "mechanisms/gated_delta/operation.py:_ShortConvolution": "shifted products, twice as fast as autograd's",
    "mechanisms/compressive/compressors.py:Frozen": "a projection whose parameters get no gradient",
}


def functions() -> set[str]:
    """Every autograd function of the operations, as file:class."""
    names = set()
    for room in ROOMS:
        for path in sorted((PACKAGE / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef) and any(
                    ast.unparse(base).split(".")[-1] in BASES for base in node.bases
                ):
                    names.add(f"{path.relative_to(PACKAGE)}:{node.name}")
    return names


def test_every_autograd_function_has_a_reason() -> None:
    assert functions() == set(SOFTMAX) | set(OTHERS)
    assert len(functions()) <= MOST
