"""Splits documents by group (such as the tiles of an image or a family of proteins): each group is in one split."""

import hashlib
from collections.abc import Iterable

import numpy as np

from longspan.tasks.base import Array, Split

Named = list[tuple[str, Array]]
"""Documents as (name, (length,) uint8)."""


def linked(pairs: Array, count: int) -> Array:
    """Group documents that are linked by pairs, also indirectly.

    Args:
        pairs: (pairs, 2) int64, indices of two documents that belong together.
        count: number of documents.

    Returns:
        (count,) int64, the least index of a document in the same group.
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


def held_out_documents(group: Array, fraction: float, seed: int, *, at_least_one: bool = True) -> Array:
    """Select held-out documents, (documents,) bool: whole groups in random order, as long as they fit into `fraction`.

    Args:
        group: (documents,) int64, the index of the group of each document.
        fraction: largest share of held-out documents.
        seed: of the random order.
        at_least_one: if no group fits, hold out the smallest one anyway.
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
    """Split documents into training and validation, every group within one of them; either may be empty.

    Args:
        documents: named documents.
        group: (documents,) int64, the index of the group of each document.
        fraction: largest share of held-out documents.
        seed: of the random order in which groups are held out.
        at_least_one: if no group fits into `fraction`, hold out the smallest one anyway.
    """
    parts: dict[Split, Named] = {"train": [], "validation": []}
    for document, is_held_back in zip(
        documents, held_out_documents(group, fraction, seed, at_least_one=at_least_one), strict=True
    ):
        parts["validation" if is_held_back else "train"].append(document)
    return parts


def arrays_digest(arrays: Iterable[Array], start: str = "") -> str:
    """Return a digest of `start` and the lengths and contents of arrays, as hexadecimal text."""
    digest = hashlib.blake2b(start.encode(), digest_size=16)
    for array in arrays:
        digest.update(len(array).to_bytes(8, "little") + array.tobytes())
    return digest.hexdigest()
