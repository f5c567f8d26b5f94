"""Arguments that attention operations share: shape checks, and which keys of each batch row are real."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longspan import host
from longspan.engine.tiles import Visibility
from longspan.errors import ConfigError

NO_DOCUMENT = -(2**62)  # document number of padding keys, which no query has


class Call(NamedTuple):
    """Checked arguments of one call, without the older keys that no query can see.

    Attributes:
        q: (batch, heads, length, head_dim).
        k, v: (batch, kv_heads, memory + length, head_dim); the first `memory` are older keys.
        memory: number of older key columns left.
        dropped: number of key columns removed at the front; column numbers of the caller are larger by this.
        visibility: which keys are hidden beyond the pattern; None = none.
        fully_masked: (batch, length) bool, queries that see no key; None = there are none.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    memory: int
    dropped: int
    visibility: Visibility | None
    fully_masked: Tensor | None

    @property
    def empty(self) -> bool:
        """Whether there is nothing to compute."""
        return self.q.numel() == 0 or self.v.shape[-1] == 0

    def zero_masked(self, out: Tensor) -> Tensor:
        """Set outputs (batch, heads, length, dim) to zero where a query sees no key;
        their gradients become zero too.
        """
        if self.fully_masked is None:
            return out
        hidden = self.fully_masked[:, None, :, None]
        return out.masked_fill(hidden, 0.0) if out.requires_grad else out.masked_fill_(hidden, 0.0)


def check_floating(**tensors: Tensor | None) -> None:
    """Raise a ConfigError if a tensor, passed by its name, is not of a real floating-point dtype."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ConfigError(f"{name} is {kind}: must be floating-point; pass {name}.float()")


def check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise a ConfigError unless q, k, v have matching shapes and floating-point dtypes."""
    check_floating(q=q, k=k, v=v)
    fits = (
        q.ndim == k.ndim == v.ndim == 4
        and q.shape[0] == k.shape[0] == v.shape[0]
        and k.shape[1:3] == v.shape[1:3]
        and q.shape[3] == k.shape[3]
        and k.shape[2] >= q.shape[2]
        and k.shape[1] > 0
        and q.shape[1] % k.shape[1] == 0
    )
    if not fits:
        raise ConfigError(
            "q must be (batch, heads, length, head_dim) and k, v (batch, kv_heads, memory + length, head_dim) with "
            f"kv_heads dividing heads; got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )


def check_positive(name: str, value: int) -> None:
    """Raise a ConfigError unless value is at least 1."""
    if value < 1:
        raise ConfigError(f"{name} = {value}: must be at least 1")


def read_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    keep: int | None,
    lengths: Tensor | None,
    start: Tensor | None,
    memory_lengths: Tensor | None,
) -> Call:
    """Check the arguments of an attention call, drop unreachable older keys and determine which keys each row hides.

    Args:
        q: (batch, heads, length, head_dim).
        k: (batch, kv_heads, memory + length, head_dim).
        v: like k.
        causal: queries see no later key.
        keep: how many older keys any query can reach; None = all.
        lengths: (batch,) real tokens of each row, or None.
        start: (batch, length) first visible key column, or None.
        memory_lengths: (batch,) real older keys, newest last, or None.
    """
    check_shapes(q, k, v)
    length, memory = q.shape[2], k.shape[2] - q.shape[2]
    dropped = 0 if keep is None else max(0, memory - keep)
    if dropped:
        k, v, memory = k[:, :, dropped:], v[:, :, dropped:], memory - dropped
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    if q.numel() == 0 or (lengths is None and start is None and memory_lengths is None):
        return Call(q, k, v, memory, dropped, None, None)
    of_lengths, of_start, of_memory = host.read([lengths, start, memory_lengths])
    if memory == 0 or (of_memory is not None and (of_memory >= memory).all()):
        memory_lengths = of_memory = None
    if of_lengths is not None and (of_lengths >= length).all():
        lengths = of_lengths = None
    if causal:
        limits, read = _Limits(lengths, start, memory_lengths), _Limits(of_lengths, of_start, of_memory)
        whole = all((tensor is None) == (array is None) for tensor, array in zip(limits, read, strict=True))
        visibility, fully_masked = _causal_visibility(q, memory, dropped, limits, read if whole else None)
    else:
        visibility, fully_masked = _bidirectional_visibility(q, memory, dropped, lengths, start, memory_lengths)
    return Call(q, k, v, memory, dropped, visibility, fully_masked)


class _Limits(NamedTuple):
    """Limits on the visible keys of each row, as in `read_call`: tensors, or host arrays of their values."""

    lengths: Any
    start: Any
    memory_lengths: Any

    def causal(self, own: Any, memory: int, dropped: int, maximum: Callable[[Any, Any], Any]) -> tuple[Any, Any]:
        """Return the first visible key column of each query, and which queries see no key, in the causal form.

        Both are (batch, length or 1), int64 and bool, or None if unlimited.

        Args:
            own: (length,) the key column of each query.
            memory: older key columns that are left.
            dropped: older key columns that were removed.
            maximum: elementwise maximum, of tensors or of arrays.
        """
        first = fully_masked = None
        if self.memory_lengths is not None:
            first = (memory - self.memory_lengths).clip(min=0)[:, None]
        if self.start is not None:
            begin = self.start - dropped
            first = begin if first is None else maximum(first, begin)
            fully_masked = first > own
        if self.lengths is not None:
            late = own >= (memory + self.lengths)[:, None]
            fully_masked = late if fully_masked is None else fully_masked | late
        return first, fully_masked


def _causal_visibility(
    q: Tensor, memory: int, dropped: int, limits: _Limits, read: _Limits | None
) -> tuple[Visibility | None, Tensor | None]:
    """Return which keys are hidden, and which queries see none, in the causal form.

    A real query sees no later key, so only the first visible column matters. `read` has the host values of the limits;
    None if they are not known.
    """
    batch, length = q.shape[0], q.shape[2]
    top, least = memory + length, None
    if read is not None:
        first, fully_masked = read.causal(np.arange(memory, memory + length), memory, dropped, np.maximum)
        top = 0 if first is None else int(first.max())
        blind = fully_masked is not None and bool(fully_masked.any())
        if top <= 0 and not blind:
            return None, None
        least = None if first is None else np.broadcast_to(first.min(0), length)
    own = torch.arange(memory, memory + length, device=q.device)
    first, fully_masked = limits.causal(own, memory, dropped, torch.maximum)
    if read is not None and not blind:
        fully_masked = None
    if first is None or top <= 0:
        return None, fully_masked
    key = torch.arange(memory + length, device=q.device)[None, None, :, None].expand(batch, 1, -1, 1)
    return Visibility(first.expand(batch, length)[:, None, :, None], key, False, top, least), fully_masked


def _bidirectional_visibility(
    q: Tensor,
    memory: int,
    dropped: int,
    lengths: Tensor | None,
    start: Tensor | None,
    memory_lengths: Tensor | None,
) -> tuple[Visibility | None, Tensor | None]:
    """Return which keys are hidden, and which queries see none, in the bidirectional form.

    A query sees the keys of its own document; padding keys belong to no document.
    """
    batch, length = q.shape[0], q.shape[2]
    if start is None and lengths is None and memory_lengths is None:
        return None, None
    if start is not None and memory + dropped > 0:
        raise ConfigError("start: with causal = False there must be no older keys, as they have no document")
    query = torch.zeros(batch, length, dtype=torch.long, device=q.device) if start is None else start.long()
    key = torch.cat([query.new_zeros(batch, memory), query], 1)
    column = torch.arange(memory + length, device=q.device)
    fully_masked = None
    if lengths is not None:
        key = key.masked_fill(column >= (memory + lengths)[:, None], NO_DOCUMENT)
        fully_masked = column[memory:] >= (memory + lengths)[:, None]
    if memory_lengths is not None:
        key = key.masked_fill(column < (memory - memory_lengths)[:, None], NO_DOCUMENT)
    return Visibility(query[:, None, :, None], key[:, None, :, None], True, memory + length), fully_masked


def join_tail(start: Tensor, lengths: Tensor, real: Tensor) -> Tensor:
    """Return `start` (batch, length) where padding after a row's real tokens belongs to the document of the last one.

    Args:
        start: (batch, length) the column where each token's document starts; host values are kept.
        lengths: (batch,) real tokens of each row.
        real: (batch, length) bool, columns with real tokens.
    """
    if not start.shape[1]:
        return start
    last = start.gather(1, (lengths - 1).clamp(min=0)[:, None]).masked_fill((lengths == 0)[:, None], -1)
    joined = torch.where(real, start, last)
    read, count = host.read([start, lengths])
    if read is None or count is None:
        return joined
    count = count[:, None]
    last_read = np.where(count == 0, -1, np.take_along_axis(read, (count - 1).clip(min=0), 1))
    return host.remember(joined, np.where(np.arange(read.shape[1]) < count, read, last_read))
