"""The papers' claims, re-enacted: `longspan reproduce NAME` runs one, docs/claims.md shows what came out.

A new claim is one file with a `Claim`, and one line in `_CLAIMS`.
"""

from longspan.claims.adaptive_span import ADAPTIVE_SPAN
from longspan.claims.base import Claim, Figure, Outcome, Size
from longspan.claims.bp import BP_TRANSFORMER
from longspan.claims.compressive import COMPRESSIVE
from longspan.claims.entmax import ENTMAX
from longspan.claims.flops import RMT_FLOPS
from longspan.claims.grid import RMT_GRID
from longspan.claims.infini_memory import INFINI_MEMORY
from longspan.claims.infini_passkey import INFINI_PASSKEY
from longspan.claims.infini_pretrained import INFINI_PRETRAINED
from longspan.claims.language_modelling import LANGUAGE_MODELLING
from longspan.claims.maps import RMT_MAPS
from longspan.claims.page import markdown, read_results, save_result
from longspan.claims.performer_approximation import PERFORMER_APPROXIMATION
from longspan.claims.performer_protein import PERFORMER_PROTEIN
from longspan.claims.performer_recovery import PERFORMER_RECOVERY
from longspan.claims.performer_speed import PERFORMER_SPEED
from longspan.claims.reformer_copy import REFORMER_COPY
from longspan.claims.reformer_depth import REFORMER_DEPTH
from longspan.claims.rmt import RMT
from longspan.claims.routing import ROUTING
from longspan.claims.sparse import SPARSE
from longspan.claims.xl import XL
from longspan.config import nearest
from longspan.errors import ConfigError

__all__ = ["Claim", "Figure", "Outcome", "Size", "find", "markdown", "names", "read_results", "save_result"]

_ALL = (
    *(RMT, RMT_FLOPS, RMT_GRID, RMT_MAPS),
    *(PERFORMER_SPEED, PERFORMER_APPROXIMATION, PERFORMER_PROTEIN, PERFORMER_RECOVERY),
    *(INFINI_MEMORY, INFINI_PASSKEY, INFINI_PRETRAINED),
    *(SPARSE, ADAPTIVE_SPAN, ENTMAX, BP_TRANSFORMER),
    *(REFORMER_COPY, REFORMER_DEPTH, ROUTING),
    *(XL, COMPRESSIVE, LANGUAGE_MODELLING),
)
_CLAIMS = {claim.name: claim for claim in _ALL}


def names() -> list[str]:
    """All claims, in the order of docs/claims.md."""
    return list(_CLAIMS)


def find(name: str) -> Claim:
    """A claim by its name.

    Raises:
        ConfigError: there is none, with the nearest name.
    """
    if name not in _CLAIMS:
        raise ConfigError(f"{name!r} is no claim{nearest(name, _CLAIMS)}")
    return _CLAIMS[name]
