"""Mechanisms as layers, built by name; each is a function of a sequence and a state."""

from typing import TYPE_CHECKING

from longspan.contract.base import Hidden, Mechanism, Mixer, ParameterGroup, Shape, Traits, with_aux_losses
from longspan.contract.branches import only_branch
from longspan.contract.projections import Projections
from longspan.contract.registry import build, examples, names, register
from longspan.contract.rows import BatchLayout, SegmentLayout
from longspan.lazy import submodules_of
from longspan.renames import accept_old_names, old_names

if TYPE_CHECKING:
    from longspan.mixers import probe
else:
    accept_old_names(globals())
    __getattr__ = old_names(__name__, globals(), submodules_of(__name__))

__all__ = [
    "BatchLayout",
    "Hidden",
    "Mechanism",
    "Mixer",
    "ParameterGroup",
    "Projections",
    "SegmentLayout",
    "Shape",
    "Traits",
    "build",
    "examples",
    "names",
    "only_branch",
    "probe",
    "register",
    "with_aux_losses",
]
