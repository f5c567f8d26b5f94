"""What a conversion costs before any training: the loss on a text before and after it."""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.errors import DataError
from longspan.hf.cache import CACHE
from longspan.hf.convert import mechanisms
from longspan.host import Array

CHUNK = 512
EDGES = (0, 512, 1024, 2048, 4096, 8192, 16384, 32768)


class Range(NamedTuple):
    """Mean loss of the tokens at positions first .. last - 1, in nats, before and after a conversion."""

    first: int
    last: int
    before: float
    after: float


class CheckReport(NamedTuple):
    """Loss of a model on one text before and after its conversion.

    Attributes:
        ranges: by position in the text.
        before, after: bits per byte of the whole text.
        more: by how many nats per token the loss is larger after the conversion.
        tokens: number of tokens read.
    """

    ranges: tuple[Range, ...]
    before: float
    after: float
    more: float
    tokens: int


@torch.no_grad()
def token_nats(model: Any, ids: Tensor) -> Array:
    """Return the loss of tokens 1, 2, ... of one text in nats, (length - 1,).

    The model reads pieces with a cache, so that the logits of a whole text never exist, unless it does not stream.

    Args:
        model: a causal language model of transformers, converted or not, in evaluation mode.
        ids: (1, length) token ids.
    """
    ids = ids.to(model.get_input_embeddings().weight.device)
    streams = all(core.traits.streams for core in mechanisms(model).values())
    chunk = CHUNK if streams else ids.shape[1]
    parts, cache = [], None
    targets = F.pad(ids[0, 1:], (0, 1), value=-100)
    for first in range(0, ids.shape[1], chunk):
        carried: dict[str, Any] = {} if cache is None else {CACHE: cache}
        output = model(ids[:, first : first + chunk], use_cache=streams, **carried)
        cache = getattr(output, CACHE, None)
        logits = output.logits[0].float()
        parts.append(F.cross_entropy(logits, targets[first : first + chunk], reduction="none", ignore_index=-100))
    losses: Array = torch.cat(parts)[:-1].double().cpu().numpy()
    return losses


def first_tokens(tokenizer: Any, text: str, tokens: int) -> Tensor:
    """Return the first `tokens` token ids (1, length) of a text.

    Raises:
        DataError: it has fewer than 2.
    """
    # a token is rarely longer than ten characters
    ids: Tensor = tokenizer(text[: 20 * tokens], return_tensors="pt")["input_ids"][:, :tokens]
    if ids.shape[1] < 2:
        raise DataError("--check: the text has fewer than 2 tokens; choose a longer file")
    return ids


def compare(tokenizer: Any, ids: Tensor, before: Array, after: Array) -> CheckReport:
    """Return the report of two readings of a text.

    Args:
        tokenizer: of the model.
        ids: (1, length) token ids.
        before, after: (length - 1,) losses in nats, of `token_nats`.
    """
    length, ranges = len(before), []
    for first, last in zip(EDGES, [*EDGES[1:], length], strict=True):
        part = slice(first, min(last, length))
        if part.stop > part.start:
            ranges.append(Range(first, part.stop, float(before[part].mean()), float(after[part].mean())))
    size = len(tokenizer.decode(ids[0, 1:], skip_special_tokens=True).encode())
    bits = [float(losses.sum()) / np.log(2) / max(size, 1) for losses in (before, after)]
    more = float((after - before).mean())
    return CheckReport(ranges=tuple(ranges), before=bits[0], after=bits[1], more=more, tokens=length + 1)
