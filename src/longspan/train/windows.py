"""Windows: documents cut into parts that a model sees one by one, for models that carry nothing from call to call."""

from collections.abc import Iterator

import numpy as np
import torch

from longspan.tasks import Documents
from longspan.train.lanes import Batch


def windows(documents: Documents, width: int, places: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
    """Every place of every document once, a part of a document in each row, padded to the longest of its batch.

    Parts of about equal length stand together, so little is padded.

    Args:
        documents: what is read.
        width: places of a part, at most; the last of a document is what is left.
        places: of a batch, padding included, unless one row has more.
        rank: which process this is.
        world_size: how many there are; each reads its share of the batches.
    """
    parts = [
        (index, first, min(first + width, length))
        for index, length in enumerate(documents.lengths.tolist())
        for first in range(0, length, width)
    ]
    parts.sort(key=lambda part: part[1] - part[2])
    groups: list[list[tuple[int, int, int]]] = []
    for part in parts:
        longest = groups[-1][0][2] - groups[-1][0][1] if groups else 0
        if groups and (len(groups[-1]) + 1) * longest <= places:
            groups[-1].append(part)
        else:
            groups.append([part])
    for group in groups[rank::world_size]:
        yield _batch(documents, group)


def _batch(documents: Documents, parts: list[tuple[int, int, int]]) -> Batch:
    shape = len(parts), max(last - first for _, first, last in parts)
    tokens, targets, sizes = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    document, graded = np.full(shape, -1, dtype=np.int64), np.zeros(shape, dtype=np.bool_)
    for row, (index, first, last) in enumerate(parts):
        part, span = documents[index].cut(first, last), slice(0, last - first)
        tokens[row, span], targets[row, span], graded[row, span] = part.tokens, part.targets, part.graded
        sizes[row, span] = part.sizes * part.graded
        document[row, span] = index
    mask = document >= 0
    return Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(targets),
        torch.from_numpy(graded),
        torch.from_numpy(sizes),
        torch.from_numpy(document),
        None,
        None if mask.all() else torch.from_numpy(mask),
    )
