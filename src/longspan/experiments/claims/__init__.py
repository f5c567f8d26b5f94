"""Reproductions of the papers' claims: `longspan reproduce NAME` runs one, docs/claims.md shows the numbers.

A new claim is one file, or one folder, with a `Claim`, and one line in `_ALL`.
"""

from longspan.config import nearest
from longspan.errors import ConfigError
from longspan.experiments.claims.adaptive_span import ADAPTIVE_SPAN
from longspan.experiments.claims.babilong import BABILONG
from longspan.experiments.claims.base import SIZES, Claim, Figure, Outcome, Size
from longspan.experiments.claims.bp import BP_TRANSFORMER
from longspan.experiments.claims.compressive import COMPRESSIVE
from longspan.experiments.claims.entmax import ENTMAX
from longspan.experiments.claims.flops import RMT_FLOPS
from longspan.experiments.claims.grid import RMT_GRID
from longspan.experiments.claims.infini_memory import INFINI_MEMORY
from longspan.experiments.claims.infini_passkey import INFINI_PASSKEY
from longspan.experiments.claims.infini_pretrained import INFINI_PRETRAINED
from longspan.experiments.claims.language_modelling import LANGUAGE_MODELLING
from longspan.experiments.claims.maps import RMT_MAPS
from longspan.experiments.claims.page import markdown, read_results, restore, save_result, write_page
from longspan.experiments.claims.performer_approximation import PERFORMER_APPROXIMATION
from longspan.experiments.claims.performer_protein import PERFORMER_PROTEIN
from longspan.experiments.claims.performer_recovery import PERFORMER_RECOVERY
from longspan.experiments.claims.performer_speed import PERFORMER_SPEED
from longspan.experiments.claims.reformer_copy import REFORMER_COPY
from longspan.experiments.claims.reformer_depth import REFORMER_DEPTH
from longspan.experiments.claims.rmt import RMT
from longspan.experiments.claims.routing import ROUTING
from longspan.experiments.claims.scaling import SCALING
from longspan.experiments.claims.sparse import SPARSE
from longspan.experiments.claims.transfer import TRANSFER
from longspan.experiments.claims.xl import XL

__all__ = [
    "SIZES",
    "Claim",
    "Figure",
    "Outcome",
    "Size",
    "find",
    "markdown",
    "names",
    "read_results",
    "restore",
    "save_result",
    "write_page",
]

_ALL = (
    *(RMT, RMT_FLOPS, RMT_GRID, RMT_MAPS),
    *(PERFORMER_SPEED, PERFORMER_APPROXIMATION, PERFORMER_PROTEIN, PERFORMER_RECOVERY),
    *(INFINI_MEMORY, INFINI_PASSKEY, INFINI_PRETRAINED),
    *(TRANSFER, BABILONG),
    *(SPARSE, ADAPTIVE_SPAN, ENTMAX, BP_TRANSFORMER),
    *(REFORMER_COPY, REFORMER_DEPTH, ROUTING),
    *(XL, COMPRESSIVE, LANGUAGE_MODELLING, SCALING),
)
_CLAIMS = {claim.name: claim for claim in _ALL}


def names() -> list[str]:
    """Return the names of all claims, in the order of docs/claims.md."""
    return list(_CLAIMS)


def find(name: str) -> Claim:
    """Return the claim of a name.

    Raises:
        ConfigError: there is no such claim; the message suggests the nearest name.
    """
    if name not in _CLAIMS:
        raise ConfigError(f"unknown claim {name!r}{nearest(name, _CLAIMS)}")
    return _CLAIMS[name]
