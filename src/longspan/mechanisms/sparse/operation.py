"""Sparse Transformer attention (Child et al. 2019): near keys and a few far ones, in O(n sqrt n)."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from longspan import host
from longspan.engine import Round, Schedule, attention, flash
from longspan.engine.arguments import Call, check_positive, read_call
from longspan.engine.decode import decode, is_decode
from longspan.engine.first_order import scaled_dot_product_attention
from longspan.engine.flash import default_scale
from longspan.engine.full import attend_call, full_cost
from longspan.engine.tiles import Plan, make_plan
from longspan.engine.window import window_attention, window_cost
from longspan.errors import ConfigError
from longspan.mechanisms.sparse.schedules import (
    LOCAL_TILE,
    Fixed,
    fixed_plans,
    fixed_rounds,
    make_class_plan,
    strided_rounds,
)

PATTERNS = ("strided", "fixed")
PARTS = ("union", "local", "summary")


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: Literal["strided", "fixed"],
    stride: int,
    summary: int = 1,
    part: Literal["union", "local", "summary"] = "union",
    summary_offset: Sequence[int] | None = None,
    open_block: int | Tensor = 0,
    scale: float | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
    memory_lengths: Tensor | None = None,
) -> Tensor:
    """Return causal attention in Sparse Transformer's factorized patterns (Child et al. 2019, section 4.3).

    "strided": local keys are i - stride <= j <= i, summary keys are (i - j) % stride == 0. The earlier keys must be the
    last ones before the call, all of them.

    "fixed": positions form blocks of `stride`. Local keys are those of the query's block; summary keys are the query
    itself and the summary columns of every block: its last `summary` columns, shifted `summary_offset` columns towards
    its start. The earlier keys are then, newest last: the `open_block` tokens of the block that query 0 continues, and
    before them the summary columns of earlier blocks, `summary` (at most `stride`) of each.

    Args:
        q: (batch, heads, length, head_dim).
        k: (batch, kv_heads, memory + length, head_dim), kv_heads dividing heads; the first `memory` are earlier keys.
        v: (batch, kv_heads, memory + length, head_dim).
        pattern: "strided" or "fixed", see above.
        stride: block size in positions ("fixed"), or distance between the far keys ("strided"); about sqrt(length).
        summary: number of summary columns per block ("fixed"); capped at `stride`.
        part: "local", "summary", or their "union" in one softmax.
        summary_offset: (kv_heads,) how far before the block's end the summary columns of a kv head end ("fixed"); None
            = at the end. Distinct offsets let heads see distinct columns.
        open_block: number of tokens among the earlier keys that belong to the block that query 0 continues, or (batch,)
            of them ("fixed"). If it is not 0, all queries must belong to that block: open_block + length <= stride.
        scale: factor of the scores; None = head_dim ** -0.5.
        lengths: (batch,) number of real tokens of each row, which come first; None = all.
        start: (batch, length) first key column that each query may see; None = no limit.
        memory_lengths: (batch,) number of valid earlier keys, newest last; None = all.

    Returns:
        (batch, heads, length, head_dim) in q's dtype; zeros where a query sees no key.

    Raises:
        ConfigError: unknown pattern or part, or sizes that do not fit together.
    """
    offsets = check_pattern(pattern, stride, summary, part, summary_offset, k.shape[1])
    # among two strides of keys, each is in the window or exactly a multiple of the stride away
    if pattern == "strided" and (part == "local" or (part == "union" and k.shape[2] <= 2 * stride)):
        return window_attention(
            q, k, v, window=stride + 1, scale=scale, lengths=lengths, start=start, memory_lengths=memory_lengths
        )
    has_open_block = isinstance(open_block, Tensor) or open_block > 0
    if pattern == "fixed" and part == "local" and not has_open_block:
        # a call that begins at a block boundary sees no earlier key
        older = k.shape[2] - q.shape[2]
        k, v, memory_lengths = k[:, :, older:], v[:, :, older:], None
        start = None if start is None else host.derive(lambda first: (first - older).clip(min=0), start)
    call = read_call(q, k, v, causal=True, keep=None, lengths=lengths, start=start, memory_lengths=memory_lengths)
    scale = default_scale(q, scale)
    if call.empty:
        return q.new_zeros(*q.shape[:3], v.shape[-1])
    if pattern == "strided":
        return _attend_strided(call, stride, part, scale)
    fixed = Fixed(stride, min(summary, stride), offsets, local=part == "union")
    return (
        _attend_open_block(call, open_block, fixed, part, scale)
        if has_open_block
        else _attend_fixed(call, fixed, part, scale)
    )


def sparse_cost(
    length: int,
    *,
    pattern: Literal["strided", "fixed"],
    stride: int,
    summary: int = 1,
    part: Literal["union", "local", "summary"] = "union",
) -> int:
    """Count the score entries per query head that `sparse_attention` computes for `length` tokens without earlier keys.

    Forward FLOPs are 4 * head_dim * heads * batch times this.
    """
    summary = min(summary, stride)
    if pattern == "strided":
        local = 0 if part == "summary" else window_cost(length, window=stride + 1)
        if part == "local" or (part == "union" and length <= 2 * stride):
            return local
        return local + make_class_plan(length, 0, stride, 0 if part == "summary" else 2).pairs()
    if part == "local":
        return full_cost(length) if length <= stride else _local_plan(length, stride).pairs()
    if part == "union" and (length <= stride or summary == stride):
        return full_cost(length)
    return sum(plan.pairs() for plan in fixed_plans(length, 0, stride, summary))


def check_pattern(
    pattern: str, stride: int, summary: int, part: str, summary_offset: Sequence[int] | None, kv_heads: int
) -> tuple[int, ...]:
    """Check the arguments of a sparse pattern and return the summary offset of every kv head.

    Raises:
        ConfigError: unknown pattern or part, a size below 1, or summary offsets out of range or of the wrong number.
    """
    for name, value, known in (("pattern", pattern, PATTERNS), ("part", part, PARTS)):
        if value not in known:
            raise ConfigError(f"sparse_attention: {name} = {value!r}: expected one of {', '.join(known)}")
    check_positive("stride", stride)
    check_positive("summary", summary)
    offsets = (0,) * kv_heads if summary_offset is None else tuple(int(offset) for offset in summary_offset)
    if len(offsets) != kv_heads:
        raise ConfigError(
            f"sparse_attention: summary_offset has {len(offsets)} entries; expected one per kv head, {kv_heads}"
        )
    room = stride - min(summary, stride)
    if any(not 0 <= offset <= room for offset in offsets):
        raise ConfigError(
            f"sparse_attention: summary_offset = {offsets}: entries must be from 0 to stride - summary = {room}"
        )
    return offsets


def _local_plan(length: int, stride: int) -> Plan:
    """Return the tiles of the fixed pattern's local part: causal attention inside blocks of `stride`."""
    return make_plan(length, 0, tile=LOCAL_TILE, window=0, segment=stride)


def _attend_strided(call: Call, stride: int, part: str, scale: float) -> Tensor:
    """Return outputs (batch, heads, length, head_dim) of a checked call with the strided pattern.

    `part` is "union" or "summary"; "local" is computed as a window.
    """
    length, memory, union = call.q.shape[2], call.memory, part == "union"
    if is_decode(call):
        return decode(_select_strided_keys(call, stride, union), scale=scale)
    return _run_schedule(call, scale, *strided_rounds(length, memory, stride, call.visibility, local=union))


def _run_schedule(call: Call, scale: float, *rounds: Round) -> Tensor:
    """Run block-sparse attention over one or two rounds of tiles, and zero the queries that see no key."""
    return call.zero_masked(attention(call.q, call.k, call.v, Schedule(rounds, scale))[0])


def _select_strided_keys(call: Call, stride: int, union: bool) -> Call:
    """Return a single-query call reduced to the keys that its query sees by the strided pattern."""
    memory = call.memory
    near = max(0, memory - stride) if union else memory
    far = slice(memory % stride, max(0, memory - 2 * stride + 1) if union else memory, stride)

    def pick(x: Tensor) -> Tensor:
        """Select the far and the near columns of x (batch, heads, columns, dim)."""
        return torch.cat([x[:, :, far], x[:, :, near:]], 2)

    visibility = call.visibility
    if visibility is not None:
        visibility = visibility._replace(key=pick(visibility.key))
    k, v = pick(call.k), pick(call.v)
    return call._replace(k=k, v=v, memory=k.shape[2] - 1, visibility=visibility)


def _attend_fixed(call: Call, pattern: Fixed, part: str, scale: float) -> Tensor:
    """Return outputs (batch, heads, length, head_dim) of the fixed pattern, begun at a block boundary."""
    length, stride = call.q.shape[2], pattern.stride
    if part == "local" and length > stride:
        plan = _local_plan(length, stride)
        return _run_schedule(call, scale, Round(plan, plan, call.visibility))
    if part == "local" or (part == "union" and (length <= stride or pattern.summary == stride)):
        return attend_call(call, causal=True, scale=scale)
    group = call.q.shape[1] // call.k.shape[1]
    return _run_schedule(call, scale, *fixed_rounds(length, call.memory, pattern, call.visibility, group))


def _attend_open_block(call: Call, open_block: int | Tensor, pattern: Fixed, part: str, scale: float) -> Tensor:
    """Return outputs of the fixed pattern inside an incomplete block; dense, as queries are few.

    Raises:
        ConfigError: the call leaves the block, or the earlier keys do not hold its tokens.
    """
    length, memory, stride = call.q.shape[2], call.memory, pattern.stride
    open_tokens = np.asarray(open_block) if isinstance(open_block, int) else host.values(open_block)
    max_open = 0 if open_tokens is None else int(open_tokens.max())
    if max_open + length > stride or max_open > memory:
        raise ConfigError(
            f"sparse_attention: open_block = {max_open} with {length} queries and {memory} earlier keys: must satisfy "
            f"open_block + queries <= stride = {stride} and open_block <= earlier keys; split the call there"
        )
    if part == "union":
        return attend_call(call, causal=True, scale=scale)
    before = torch.as_tensor(open_block, device=call.q.device).reshape(-1, 1, 1, 1)
    in_block = torch.arange(-memory, length, device=call.q.device) + before  # (batch or 1, 1, 1, columns)
    if part == "local":
        seen = in_block >= 0
    else:
        last = stride - torch.tensor(pattern.offsets, device=call.q.device)
        last = last.repeat_interleave(call.q.shape[1] // len(last))[:, None, None]
        is_self = in_block == in_block[..., memory:].mT
        seen = (in_block < 0) | ((in_block >= last - pattern.summary) & (in_block < last)) | is_self
    return call.zero_masked(_attend_masked(call, seen, scale))


def _attend_masked(call: Call, seen: Tensor, scale: float) -> Tensor:
    """Return causal attention under a bool mask (batch or 1, heads or 1, queries or 1, columns) for few queries."""
    q, k, v = call.q, call.k, call.v
    column = torch.arange(k.shape[2], device=q.device)
    seen = seen & (column <= column[call.memory :, None])
    if call.visibility is not None:
        seen = seen & (call.visibility.key.mT >= call.visibility.query)
    if call.fully_masked is not None:
        seen = seen | call.fully_masked[:, None, :, None]
    dtype = flash.working_dtype(q, k, v)
    with flash.full_precision(q.device):
        out = scaled_dot_product_attention(
            q.to(dtype), k.to(dtype), v.to(dtype), attn_mask=seen, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return out.to(q.dtype)
