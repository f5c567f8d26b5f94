"""What a mechanism can tell about one of its calls besides outputs: gates, buckets, spans, what it retrieved.

A core that has something to tell has a method `explain`, see `Explains`; callers use `explanations`, which knows no
mechanism by name.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from longspan.contract.base import Hidden, Mechanism
from longspan.contract.rows import BatchLayout


class CoreCall(NamedTuple):
    """The arguments of one call of a core, as in `Mechanism.forward`."""

    q: Tensor
    k: Tensor
    v: Tensor
    state: Any
    rows: BatchLayout
    hidden: Hidden | None = None


@dataclass(frozen=True, kw_only=True)
class Diagnostic:
    """Numbers about one call of a core.

    Attributes:
        name: a few words, such as "write strength".
        caption: what the numbers are, in one or two sentences.
        values: (batch, heads, length) for each head and token of the call, or (heads,) for each head.
        per: what the second or only dimension of `values` counts.
        discrete: the numbers are names, such as those of buckets, and not amounts.
    """

    name: str
    caption: str
    values: Tensor
    per: str = "head"
    discrete: bool = False


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Earlier tokens that the queries of one call retrieved from a memory.

    Attributes:
        name: a few words, such as "retrieved pairs".
        caption: what was retrieved and what the weights are, in one or two sentences.
        positions: (batch, heads, length, count) int64, positions of the retrieved tokens, -1 for none.
        weights: like `positions`, the weights of their values, which are 0 for none.
    """

    name: str
    caption: str
    positions: Tensor
    weights: Tensor


Explanation: TypeAlias = Diagnostic | Retrieval


@runtime_checkable
class Explains(Protocol):
    """A core that tells what it does in a call."""

    def explain(self, call: CoreCall) -> list[Explanation]:
        """Return what this core does in a call, computed as `forward` computes it; nothing is changed."""


def has_token_weights(core: Mechanism) -> bool:
    """Return whether the outputs of a core are weighted values plus what does not depend on the values of the call.

    A core that is not `linear_in_values` says so by an attribute `affine_in_values`.
    """
    return core.traits.linear_in_values or bool(getattr(core, "affine_in_values", False))


def explanations(core: Mechanism, call: CoreCall) -> list[Explanation]:
    """Return what a core tells about a call; nothing if it has no `explain`."""
    return core.explain(call) if isinstance(core, Explains) else []
