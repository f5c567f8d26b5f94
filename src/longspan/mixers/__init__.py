"""Mechanisms: each one a function of a sequence and a state, built by name."""

from longspan.mixers.base import Core, Hidden, Mixer, ParameterGroup, Shape, Traits, with_penalties
from longspan.mixers.projections import Projections
from longspan.mixers.registry import build, examples, names
from longspan.mixers.rows import Rows, Segments

__all__ = [
    "Core",
    "Hidden",
    "Mixer",
    "ParameterGroup",
    "Projections",
    "Rows",
    "Segments",
    "Shape",
    "Traits",
    "build",
    "examples",
    "names",
    "with_penalties",
]
