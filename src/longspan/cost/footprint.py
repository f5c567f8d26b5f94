"""What a model costs at a length: FLOPs, bytes of the state, and what softmax over everything would keep.

All figures come from the model's own layers, one by one, so models that mix mechanisms, and converted ones, are summed
rather than estimated by one formula. A model on the meta device is enough, which has no weights.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from longspan.contract.base import Mechanism
from longspan.models import RecurrentMemory, build_model

FURTHER = 256
"""tokens over which the FLOPs of a further token are averaged at least"""
BACKWARD = 2
"""a backward pass multiplies twice for each multiplication of the forward pass, by inputs and by weights"""
LONGEST = 1 << 40
"""tokens beyond which a length counts as unlimited"""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Cost of a text of one length.

    Attributes:
        length: tokens per row.
        batch_size: rows.
        forward_flops: FLOPs (2 per multiply-add) to read the whole text from an empty past, all rows, with logits.
        training_flops: FLOPs of a forward and a backward pass; without those of recomputing scores, which the engine
            does instead of storing them.
        further_flops: FLOPs per row for one further token, a mean over the next segment.
        state_bytes: bytes of the state after the text, counts included; None = the model does not stream.
        kv_bytes: bytes of all keys and values of the text in every layer, as softmax over everything caches them.
        score_bytes: bytes of the scores that the definition computes, if all of them were stored.
    """

    length: int
    batch_size: int
    forward_flops: int
    training_flops: int
    further_flops: float
    state_bytes: int | None
    kv_bytes: int
    score_bytes: int


def countable_model(table: Mapping[str, Any]) -> Any:
    """Return the model of a table `[model]`, without weights unless it has a recurrent memory.

    A recurrent memory reads values of its cell when it is built; such models are small.
    """
    with torch.device("cpu" if "memory" in table else "meta"):
        return build_model(table)


def footprint(model: Any, length: int, *, batch_size: int = 1, dtype: torch.dtype = torch.float32) -> Footprint:
    """Return the cost of reading `batch_size` texts of `length` tokens with a model.

    Args:
        model: a Decoder, an Encoder, a RecurrentMemory over one, or a ConvertedDecoder, on any device.
        length: tokens per text, at least 1.
        batch_size: number of texts.
        dtype: of activations and states.

    Raises:
        UnsupportedError: the backbone of a recurrent memory is not a model of this library.
    """
    forward = model.flops(length, batch_size=batch_size)
    cores = list(mechanisms_of(model))
    keys = sum(2 * core.shape.num_kv_heads * core.shape.head_dim for core in cores)
    return Footprint(
        length=length,
        batch_size=batch_size,
        forward_flops=forward,
        training_flops=(1 + BACKWARD) * forward,
        further_flops=_further_flops(model, cores, length),
        state_bytes=model.state_nbytes(batch_size, length, dtype) if model.traits.streams else None,
        kv_bytes=keys * length * batch_size * dtype.itemsize,
        score_bytes=model.pairs(length) * batch_size * dtype.itemsize,
    )


def _further_flops(model: Any, cores: list[Mechanism], length: int) -> float:
    """Return the FLOPs of one row for a further token after `length` tokens.

    Where an operation computes more scores than its definition has, as full attention does above the diagonal, a call
    with a single query computes those of the definition.
    """
    segment = model.traits.segment or FURTHER
    more = segment * -(-FURTHER // segment)

    def further(count: Callable[[int], int]) -> float:
        """Return the mean growth of a count over the next segment."""
        return (count(length + more) - count(length)) / more

    whole = further(model.flops)
    if isinstance(model, RecurrentMemory):
        # its layers read segments, never the whole text
        return whole
    saved = sum(
        max(further(core.flops) - 4 * core.shape.head_dim * further(core.pairs), 0.0)
        for core in cores
        if core.traits.linear_in_values
    )
    return whole - saved


def kv_cache_bytes(
    *, num_layers: int, num_kv_heads: int, head_dim: int, length: int, batch_size: int = 1, itemsize: int = 2
) -> int:
    """Return the bytes of all keys and values that softmax over everything caches, `itemsize` bytes per number."""
    return 2 * num_layers * num_kv_heads * head_dim * length * batch_size * itemsize


def mechanisms_of(model: nn.Module) -> Iterator[Mechanism]:
    """Yield the mechanisms of a model, one per layer; those inside another one belong to it."""
    for child in model.children():
        if isinstance(child, Mechanism):
            yield child
        else:
            yield from mechanisms_of(child)


def longest_state(model: Any, budget: int, dtype: torch.dtype = torch.float32) -> int | None:
    """Return the largest number of tokens after which the state of one text has at most `budget` bytes.

    Args:
        model: see `footprint`.
        budget: bytes.
        dtype: of the state.

    Returns:
        Tokens; 0 if even an empty state is larger; None = no limit, or the model does not stream.
    """
    if not model.traits.streams or model.state_nbytes(1, LONGEST, dtype) <= budget:
        return None
    # states of segmented mechanisms may shrink at the end of a segment, so this is exact to one segment
    low, high = 0, LONGEST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if model.state_nbytes(1, middle, dtype) <= budget else (low, middle)
    return low
