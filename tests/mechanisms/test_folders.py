"""The folder of a mechanism holds its definition, its operation and its layer."""

import importlib
import inspect
from pathlib import Path

import pytest

import longspan as ls
from longspan import mechanisms

FOLDERS = sorted(path.parent.name for path in Path(mechanisms.__path__[0]).glob("*/layer.py"))
MADE_OF_OTHERS = {"mixed_heads"}


def test_every_mechanism_has_a_folder() -> None:
    assert sorted(ls.mixers.names()) == FOLDERS


@pytest.mark.parametrize("name", sorted(set(FOLDERS) - MADE_OF_OTHERS))
def test_a_folder_has_a_definition_and_an_operation_of_the_same_names(name: str) -> None:
    definition = importlib.import_module(f"longspan.mechanisms.{name}.definition")
    operation = importlib.import_module(f"longspan.mechanisms.{name}.operation")
    shared = [
        public
        for public in ls.reference.__all__
        if inspect.unwrap(getattr(ls.reference, public)) is getattr(definition, public, None)
        and inspect.unwrap(getattr(ls.ops, public)) is getattr(operation, public, None)
    ]
    assert shared
