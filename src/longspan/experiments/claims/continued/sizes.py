"""Sizes that comparisons share; a claim changes single fields."""

from collections.abc import Mapping
from typing import Any, TypeVar

from longspan.experiments.claims.continued.plan import Plan

P = TypeVar("P", bound=Plan)

_SHARED: dict[str, dict[str, Any]] = {
    # seconds, to see that a claim runs
    "tiny": {
        "corpus": "speeches",
        "start": "tiny",
        "length": 256,
        "rows": 2,
        "steps": 10,
        "floor_window": 64,
        "seeds": 1,
        "documents": 4,
        "reach": 512,
        "curve_documents": 2,
        "curve_reach": 256,
        "train": {"lr": 2e-3, "warmup": 2},
    },
    "small": {
        "corpus": "code",
        "start": "code",
        "length": 2048,
        "rows": 2,
        "lanes": 4,
        "steps": 60,
        "seeds": 1,
        "documents": 8,
        "reach": 16_384,
        "curve_documents": 6,
        "curve_reach": 4096,
        "train": {"lr": 1e-3, "warmup": 10},
    },
    "full": {
        "corpus": "code",
        "start": "code",
        "relative_start": "relative",
        "length": 4096,
        "rows": 1,
        "lanes": 8,
        "steps": 600,
        "remedies": True,
        # at 1e-3 the start loses 0.1 bits, which the decay does not bring back; at 3e-4 it loses 0.01
        "train": {"lr": 3e-4, "warmup": 50},
    },
}


def plans(kind: type[P], **changes: Mapping[str, Any]) -> dict[str, P]:
    """Return the plans of a claim by size.

    Args:
        kind: class of the plans.
        changes: fields of the plan of each size, `tiny`, `small` and `full`, that differ from the shared ones or that
            only this claim has.
    """
    return {size: kind(**{**shared, **changes.get(size, {})}) for size, shared in _SHARED.items()}
