"""`longspan recipes --fields` and the fields of `longspan mixers NAME`: every field of a table has its meaning."""

import dataclasses

import pytest
from tests.cli.command import Command

from longspan import mixers
from longspan.cli.fields import field_meanings, field_table, recipe_tables
from longspan.contract.registry import mechanism_class


@pytest.mark.parametrize("name", sorted(recipe_tables()))
def test_every_field_of_a_recipe_is_explained(name: str, longspan: Command) -> None:
    config = recipe_tables()[name]
    meanings = field_meanings(config)
    missing = [field.name for field in dataclasses.fields(config) if not meanings.get(field.name)]
    assert not missing
    outcome = longspan("recipes", "--fields", name)
    assert outcome.code == 0
    assert all(field.name in outcome.out for field in dataclasses.fields(config))


@pytest.mark.parametrize("name", mixers.names())
def test_every_field_of_a_mechanism_is_explained(name: str) -> None:
    table = field_table(mechanism_class(name).Config)
    assert all(meaning for _, _, meaning in table.rows)


def test_both_ways_to_describe_a_field_and_inherited_ones() -> None:
    meanings = field_meanings(_Derived)
    assert meanings == {"first": "a number.", "second": "two lines of text.", "third": "below."}
    rows = [row[:2] for row in field_table(_Derived).rows]
    assert rows == [("first", "required"), ("second", "'x'"), ("third", "[1]")]


def test_an_unknown_table_is_one_line(longspan: Command) -> None:
    outcome = longspan("recipes", "--fields", "trian")
    assert outcome.code == 2
    assert "--fields 'trian': must be one of model, " in outcome.error
    assert "did you mean 'train'?" in outcome.error


@dataclasses.dataclass(kw_only=True)
class _Base:
    """Two fields.

    Attributes:
        first: a number.
        second: two lines
            of text.
    """

    first: int
    second: str = "x"


@dataclasses.dataclass(kw_only=True)
class _Derived(_Base):
    """One more."""

    third: list[int] = dataclasses.field(default_factory=lambda: [1])
    """below."""
