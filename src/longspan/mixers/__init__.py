"""Mechanisms: each one a function of a sequence and a state, built by name."""

from typing import TYPE_CHECKING

from longspan.contract.base import Core, Hidden, Mixer, ParameterGroup, Shape, Traits, with_penalties
from longspan.contract.projections import Projections
from longspan.contract.registry import build, examples, names, register
from longspan.contract.rows import Rows, Segments
from longspan.lazy import submodules_of

if TYPE_CHECKING:
    from longspan.mixers import probe
else:
    __getattr__ = submodules_of(__name__)

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
    "probe",
    "register",
    "with_penalties",
]
