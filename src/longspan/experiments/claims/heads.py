"""Measurements of every head of a model, by layer and seed."""

from collections.abc import Mapping, Sequence
from typing import Any


def by_layer(looks: Sequence[Mapping[str, Any]], key: str) -> list[list[float]]:
    """Return the values of `key` by layer, with the heads of all seeds in one list."""
    return [[value for look in looks for value in look[key][index]] for index in range(len(looks[0][key]))]


def numbers(values: Sequence[float], digits: int = 0) -> str:
    """Format values with a number of decimal digits, separated by commas."""
    return ", ".join(f"{value:.{digits}f}" for value in values)
