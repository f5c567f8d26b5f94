"""Windows: documents cut into parts that a model sees one by one, for models that carry nothing from call to call."""

from collections.abc import Iterator

from longspan.tasks import Documents
from longspan.train.lanes import Batch, Span, lay_out


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
        Span(index, first, min(first + width, length))
        for index, length in enumerate(documents.lengths.tolist())
        for first in range(0, length, width)
    ]
    parts.sort(key=lambda part: part.first - part.last)
    groups: list[list[Span]] = []
    for part in parts:
        longest = groups[-1][0].last - groups[-1][0].first if groups else 0
        if groups and (len(groups[-1]) + 1) * longest <= places:
            groups[-1].append(part)
        else:
            groups.append([part])
    for group in groups[rank::world_size]:
        yield lay_out(documents, [[part] for part in group], group[0].last - group[0].first)
