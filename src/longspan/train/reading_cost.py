"""Time and memory that a model takes to read a text of one document and to continue it."""

import time
from dataclasses import dataclass
from typing import Any

from longspan.contract.maps import device_and_dtype
from longspan.errors import DataError
from longspan.stream import StreamSession
from longspan.tasks.base import Array

GENERATED = 16


@dataclass(frozen=True, kw_only=True)
class ReadingCost:
    """What a text of one document costs a model at batch size 1.

    Attributes:
        tokens: number of tokens read.
        first_token: seconds from an empty state until the prediction of the first new token.
        next_token: mean seconds per generated token.
        state_bytes: bytes of the state by number of tokens read.
    """

    tokens: int
    first_token: float
    next_token: float
    state_bytes: dict[int, int]

    @property
    def tokens_per_second(self) -> float:
        """Rate of reading."""
        return self.tokens / max(self.first_token, 1e-9)


def reading_cost(model: Any, tokens: Array, lengths: tuple[int, ...]) -> ReadingCost:
    """Read tokens with a model, generate a few more, and measure both.

    Args:
        model: a causal language model that streams.
        tokens: (n,) token ids.
        lengths: numbers of tokens at which to state the bytes of the state; computed, not read.

    Raises:
        DataError: `tokens` is empty.
        UnsupportedError: the model does not stream.
    """
    if not len(tokens):
        raise DataError("reading_cost: the text has no tokens; give a longer one")
    session, dtype = StreamSession(model), device_and_dtype(model).dtype
    started = time.perf_counter()
    session.feed(tokens.tolist())
    first = time.perf_counter() - started
    session.generate(GENERATED, temperature=0)
    rest = time.perf_counter() - started - first
    return ReadingCost(
        tokens=len(tokens),
        first_token=first,
        next_token=rest / GENERATED,
        state_bytes={length: session.model.state_nbytes(1, length, dtype) for length in lengths},
    )
