"""Sparse Transformer's attention (Child et al. 2019): near keys, and few of the far ones, in O(n sqrt n)."""

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
    """Sparse Transformer's factorized patterns (Child et al. 2019, section 4.3), causal; both factors in one softmax.

    "strided": local is i - stride <= j <= i, summary is (i - j) % stride == 0; older keys are the last ones, all of
    them. "fixed": with the places i % stride and j % stride in blocks of `stride`, local is j // stride == i // stride,
    summary is every j whose place is a summary place, and i itself. The summary places of a kv head are the `summary`
    last but its `summary_offset`. Older keys are then, newest last: the `open_block` tokens of the block that query 0
    continues, and before them the summary columns of earlier blocks, `summary` (at most `stride`) of each.

    Args:
        q: (batch, heads, length, head_dim).
        k: (batch, kv_heads, memory + length, head_dim), kv_heads dividing heads; the first `memory` are older keys.
        v: like k.
        pattern: see above.
        stride: positions of a block, or between the keys that are seen from afar; about sqrt(length).
        summary: summary places of a block ("fixed"); more than `stride` count as `stride`.
        part: one factor, or their union.
        summary_offset: (kv_heads,) how far before the block's end the summary places of a kv head end ("fixed"); None
            = at the end. Distinct ones let heads look at distinct columns.
        open_block: tokens among the older keys of the block that query 0 continues, or (batch,) of them ("fixed").
            Where it is not 0 all queries belong to that block: open_block + length <= stride.
        scale, lengths, start, memory_lengths: as of `full_attention`.

    Returns:
        (batch, heads, length, head_dim) in q's dtype; zeros where a query sees no key.
    """
    offsets = check_pattern(pattern, stride, summary, part, summary_offset, k.shape[1])
    # of two strides of keys every one is near, or a whole stride away from its query
    if pattern == "strided" and (part == "local" or (part == "union" and k.shape[2] <= 2 * stride)):
        return window_attention(
            q, k, v, window=stride + 1, scale=scale, lengths=lengths, start=start, memory_lengths=memory_lengths
        )
    opened = isinstance(open_block, Tensor) or open_block > 0
    if pattern == "fixed" and part == "local" and not opened:  # a call that begins with a block sees no older key
        older = k.shape[2] - q.shape[2]
        k, v, memory_lengths = k[:, :, older:], v[:, :, older:], None
        start = None if start is None else host.derive(lambda first: (first - older).clip(min=0), start)
    call = read_call(q, k, v, causal=True, keep=None, lengths=lengths, start=start, memory_lengths=memory_lengths)
    scale = default_scale(q, scale)
    if call.empty:
        return q.new_zeros(*q.shape[:3], v.shape[-1])
    if pattern == "strided":
        return _strided(call, stride, part, scale)
    fixed = Fixed(stride, min(summary, stride), offsets, local=part == "union")
    return _open(call, open_block, fixed, part, scale) if opened else _fixed(call, fixed, part, scale)


def sparse_cost(
    length: int,
    *,
    pattern: Literal["strided", "fixed"],
    stride: int,
    summary: int = 1,
    part: Literal["union", "local", "summary"] = "union",
) -> int:
    """Score entries computed per head by `sparse_attention` of `length` tokens without older keys: those of its tiles.

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
    """Raise `ConfigError` where the fields do not fit; the offset of every kv head."""
    for name, value, known in (("pattern", pattern, PATTERNS), ("part", part, PARTS)):
        if value not in known:
            raise ConfigError(f"{name} = {value!r}: expected one of {', '.join(known)}")
    check_positive("stride", stride)
    check_positive("summary", summary)
    offsets = (0,) * kv_heads if summary_offset is None else tuple(int(offset) for offset in summary_offset)
    if len(offsets) != kv_heads:
        raise ConfigError(f"summary_offset has {len(offsets)} entries, expected one a kv head, {kv_heads}")
    room = stride - min(summary, stride)
    if any(not 0 <= offset <= room for offset in offsets):
        raise ConfigError(f"summary_offset = {offsets}: must be from 0 to stride - summary = {room}")
    return offsets


def _local_plan(length: int, stride: int) -> Plan:
    return make_plan(length, 0, tile=LOCAL_TILE, window=0, segment=stride)


def _strided(call: Call, stride: int, part: str, scale: float) -> Tensor:
    length, memory, union = call.q.shape[2], call.memory, part == "union"
    if is_decode(call):
        return decode(_class_of_last(call, stride, union), scale=scale)
    return _scheduled(call, scale, *strided_rounds(length, memory, stride, call.visibility, local=union))


def _scheduled(call: Call, scale: float, *rounds: Round) -> Tensor:
    return call.finish(attention(call.q, call.k, call.v, Schedule(rounds, scale))[0])


def _class_of_last(call: Call, stride: int, union: bool) -> Call:
    """A call of one query with only the keys that it sees by the strided pattern."""
    memory = call.memory
    near = max(0, memory - stride) if union else memory
    far = slice(memory % stride, max(0, memory - 2 * stride + 1) if union else memory, stride)

    def pick(x: Tensor) -> Tensor:
        return torch.cat([x[:, :, far], x[:, :, near:]], 2)

    visibility = call.visibility
    if visibility is not None:
        visibility = visibility._replace(key=pick(visibility.key))
    k, v = pick(call.k), pick(call.v)
    return call._replace(k=k, v=v, memory=k.shape[2] - 1, visibility=visibility)


def _fixed(call: Call, pattern: Fixed, part: str, scale: float) -> Tensor:
    length, stride = call.q.shape[2], pattern.stride
    if part == "local" and length > stride:
        plan = _local_plan(length, stride)
        return _scheduled(call, scale, Round(plan, plan, call.visibility))
    if part == "local" or (part == "union" and (length <= stride or pattern.summary == stride)):
        return attend_call(call, causal=True, scale=scale)
    group = call.q.shape[1] // call.k.shape[1]
    return _scheduled(call, scale, *fixed_rounds(length, call.memory, pattern, call.visibility, group))


def _open(call: Call, open_block: int | Tensor, pattern: Fixed, part: str, scale: float) -> Tensor:
    """All queries in the block that the older keys left open: few queries, and every key that is left is of use."""
    length, memory, stride = call.q.shape[2], call.memory, pattern.stride
    opened = np.asarray(open_block) if isinstance(open_block, int) else host.values(open_block)
    most = 0 if opened is None else int(opened.max())
    if most + length > stride or most > memory:
        raise ConfigError(
            f"open_block = {most} with {length} queries and {memory} older keys: queries must stay inside the block of "
            f"{stride}, and the older keys must hold its tokens"
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
        include_self = in_block == in_block[..., memory:].mT
        seen = (in_block < 0) | ((in_block >= last - pattern.summary) & (in_block < last)) | include_self
    return call.finish(_masked(call, seen, scale))


def _masked(call: Call, seen: Tensor, scale: float) -> Tensor:
    """Causal attention of few queries under a mask (batch or 1, heads or 1, queries or 1, columns)."""
    q, k, v = call.q, call.k, call.v
    column = torch.arange(k.shape[2], device=q.device)
    seen = seen & (column <= column[call.memory :, None])
    if call.visibility is not None:
        seen = seen & (call.visibility.key.mT >= call.visibility.query)
    if call.dead is not None:
        seen = seen | call.dead[:, None, :, None]
    dtype = flash.working_dtype(q, k, v)
    with flash.full_precision(q.device):
        out = scaled_dot_product_attention(
            q.to(dtype), k.to(dtype), v.to(dtype), attn_mask=seen, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return out.to(q.dtype)
