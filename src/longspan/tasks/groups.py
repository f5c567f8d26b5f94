"""Documents of one group, such as the tiles of an image or a family of proteins, which a split keeps together."""

import hashlib
from collections.abc import Iterable

import numpy as np

from longspan.tasks.base import Array, Split

Named = list[tuple[str, Array]]
"""Documents: a name, and (length,) uint8"""


def linked(pairs: Array, count: int) -> Array:
    """(count,) int64: the group of each document, by the least index in it.

    Args:
        pairs: (pairs, 2) int64 indices of documents that belong together; links of links do too.
        count: of documents.
    """
    group = np.arange(count)
    while len(pairs):
        least = group[pairs].min(1)
        after = group.copy()
        np.minimum.at(after, pairs[:, 0], least)
        np.minimum.at(after, pairs[:, 1], least)
        after = after[after]
        if np.array_equal(after, group):
            break
        group = after
    return group


def held_back(group: Array, fraction: float, seed: int, *, at_least_one: bool = True) -> Array:
    """(documents,) bool, which are held back: whole groups in a random order, each that fits into what is left.

    Args:
        group: (documents,) int64, the number of each one's group.
        fraction: of the documents, at most.
        seed: of the order.
        at_least_one: where no group fits, the smallest is held back all the same.
    """
    members = np.bincount(group)
    present = np.flatnonzero(members)
    is_held_back, room = np.zeros(len(members), dtype=np.bool_), int(fraction * len(group))
    for candidate in np.random.default_rng(seed).permutation(present).tolist():
        if members[candidate] <= room:
            is_held_back[candidate] = True
            room -= int(members[candidate])
    if at_least_one and not is_held_back.any() and len(present):
        is_held_back[present[np.argmin(members[present])]] = True
    chosen: Array = is_held_back[group]
    return chosen


def split_groups(
    documents: Named, group: Array, fraction: float, seed: int, *, at_least_one: bool = True
) -> dict[Split, Named]:
    """Documents to train on and those held back, either perhaps empty; arguments as of `held_back`."""
    parts: dict[Split, Named] = {"train": [], "validation": []}
    for document, is_held_back in zip(
        documents, held_back(group, fraction, seed, at_least_one=at_least_one), strict=True
    ):
        parts["validation" if is_held_back else "train"].append(document)
    return parts


def arrays_digest(arrays: Iterable[Array], start: str = "") -> str:
    """Digest of lengths and contents, behind `start`."""
    digest = hashlib.blake2b(start.encode(), digest_size=16)
    for array in arrays:
        digest.update(len(array).to_bytes(8, "little") + array.tobytes())
    return digest.hexdigest()
