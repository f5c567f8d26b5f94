"""Loss by how far back the answer is: by position in the document, and by the distance to the last occurrence of the
same context.

A byte whose preceding 16 bytes occurred before is easy for a model that still sees what came after them. So the loss
on bytes by the distance to that occurrence shows how far back a model can look things up.
"""

from collections.abc import Sequence

import numpy as np

from longspan.errors import DataError
from longspan.tasks.base import Array

CONTEXT = 16
"""bytes that must be the same"""
DISTANCES = (1, 256, 1024, 4096, 16384)
"""lower ends of the ranges of distances, in bytes; the last has no upper end"""
FIRST_POSITIONS = 64
"""the first range of positions ends here; every further one is twice as long as all before it together"""


def distances(text: Array) -> Array:
    """Return for every byte how many bytes ago the same 16 bytes before it last occurred, (bytes,) int64.

    0: they did not occur before, or there are fewer than 16.

    Args:
        text: (bytes,) uint8 or byte values of any integer type.
    """
    text = np.ascontiguousarray(text, dtype=np.uint8)
    ago = np.zeros(len(text), dtype=np.int64)
    if len(text) <= CONTEXT:
        return ago
    # window i holds bytes i to i + 15, which precede byte i + 16; the last window precedes no byte
    windows = np.lib.stride_tricks.sliding_window_view(text, CONTEXT)[:-1]
    low, high = np.ascontiguousarray(windows).view(np.uint64).T
    # equal windows become neighbors, in the order of the text, because the sort is stable
    order = np.lexsort((low, high))
    same = (low[order[1:]] == low[order[:-1]]) & (high[order[1:]] == high[order[:-1]])
    ago[order[1:][same] + CONTEXT] = (order[1:] - order[:-1])[same]
    return ago


def by_distance(nats: Array, ago: Array) -> tuple[Array, Array]:
    """Sum losses by ranges of distances: nats and numbers of bytes, (ranges,) fp64 and int64.

    Args:
        nats: (bytes,) loss of every byte of a document.
        ago: (bytes,) its `distances`; bytes at 0 are left out.
    """
    ranges = np.searchsorted(DISTANCES, ago, side="right") - 1
    recurs = ranges >= 0
    weights = np.asarray(nats, dtype=np.float64)[recurs]
    sums = np.bincount(ranges[recurs], weights=weights, minlength=len(DISTANCES))
    return sums, np.bincount(ranges[recurs], minlength=len(DISTANCES))


def distance_labels() -> list[str]:
    """Return the ranges of `DISTANCES` in words: "1 to 255", ..., "16,384 and more"."""
    last = [*DISTANCES[1:], None]
    return [
        f"{low:,} and more" if high is None else f"{low:,} to {high - 1:,}"
        for low, high in zip(DISTANCES, last, strict=True)
    ]


def position_edges(reach: int) -> list[int]:
    """Return the ends of ranges of positions from 0 to `reach`: 64, 128, 256, ..., the last cut at `reach`."""
    edges = [0, min(FIRST_POSITIONS, reach)]
    while edges[-1] < reach:
        edges.append(min(2 * edges[-1], reach))
    return edges


def by_position(nats: Array, edges: Sequence[int]) -> Array:
    """Sum the losses of a document by ranges of positions, (ranges,) fp64.

    Args:
        nats: (bytes,) loss of every byte.
        edges: ends of the ranges, from `position_edges`.

    Raises:
        DataError: the document is shorter than the last edge.
    """
    if len(nats) < edges[-1]:
        raise DataError(f"a document of {len(nats):,} bytes has no position {edges[-1]:,}; give longer documents")
    total = np.asarray(nats[: edges[-1]], dtype=np.float64)
    return np.add.reduceat(total, edges[:-1])
