"""Dense definitions of the softmax family: full, window, block-window and Transformer-XL's relative attention.

Every function builds the whole (query, key) matrix, so it is slow and short. It is the reference in tests; the fast
operation in `longspan.ops` has the same name and signature.

Shapes: q (batch, heads, length, head_dim); k, v (batch, kv_heads, memory + length, head_dim) with kv_heads dividing
heads. The first `memory` key columns are older keys; query i is at key column memory + i.
"""

import torch
from torch import Tensor

from longspan.engine.sinks import Sinks


def visible_keys(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = True,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
    memory_lengths: Tensor | None = None,
) -> Tensor:
    """Return which keys a query may see before a mechanism narrows it: (batch, length, memory + length), True =
    visible.

    Args:
        q: queries, only their shape is used.
        k: keys, only their shape is used.
        causal: a query sees no key column after its own.
        lengths: (batch,) real tokens of each row, at the front; None = all. Later queries see nothing, and later keys
            are hidden from all queries.
        start: (batch, length) first visible key column of each query; if not causal, the column at which a token's
            document starts, and two tokens see each other only within one document.
        memory_lengths: (batch,) how many of the older keys are real, newest last; None = all.
    """
    batch, length, columns = q.shape[0], q.shape[2], k.shape[2]
    memory = columns - length
    query = torch.arange(memory, columns, device=q.device)[None, :, None]
    key = torch.arange(columns, device=q.device)[None, None, :]
    visible = torch.ones(batch, length, columns, dtype=torch.bool, device=q.device)
    if causal:
        visible &= key <= query
    if lengths is not None:
        end = (memory + lengths)[:, None, None]
        visible &= (query < end) & (key < end)
    if start is not None and causal:
        visible &= key >= start[:, :, None]
    elif start is not None:
        visible &= start[:, :, None] == start[:, None, :]
    if memory_lengths is not None:
        visible &= key >= (memory - memory_lengths)[:, None, None]
    return visible


def masked_softmax(scores: Tensor, visible: Tensor) -> Tensor:
    """Return the softmax over the visible keys; a query that sees none has weight zero everywhere."""
    sees_none = ~visible.any(-1, keepdim=True)
    weights = scores.masked_fill(~(visible | sees_none), float("-inf")).softmax(-1)
    return weights.masked_fill(~visible, 0.0)


def attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float | None = None, bias: Tensor | None = None
) -> Tensor:
    """Compute softmax(scale * q k^T + bias) v over the visible keys, repeating kv heads for grouped queries.

    visible is (batch, length, columns), or (batch, heads, length, columns) if heads differ.
    """
    visible = visible if visible.ndim == 4 else visible[:, None]
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    return masked_softmax(scores, visible) @ v


def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
    memory_lengths: Tensor | None = None,
    sinks: Sinks | None = None,
) -> Tensor:
    """Scaled dot-product attention over every visible key (Vaswani et al. 2017, equation 1);
    arguments as in `visible_keys`, sinks as in `window_attention`.
    """
    visible = visible_keys(q, k, causal=causal, lengths=lengths, start=start, memory_lengths=memory_lengths)
    return attend(q, k, v, visible, scale) if sinks is None else _attend_both(q, k, v, visible, sinks, scale)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    causal: bool = True,
    blocks: bool = False,
    scale: float | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
    memory_lengths: Tensor | None = None,
    sinks: Sinks | None = None,
) -> Tensor:
    """Return softmax attention to the nearest keys, (batch, heads, length, head_dim).

    Args:
        q: (batch, heads, length, head_dim).
        k: (batch, kv_heads, memory + length, head_dim).
        v: like k.
        window: query i sees key j if 0 <= i - j < window; if not causal, if |i - j| < window.
        causal: a query sees no later key.
        blocks: a query sees its own block of `window` keys and the previous one (if not causal, also the next one):
            j <= i and i // window - j // window <= 1, or |i // window - j // window| <= 1. i and j count from query
            column 0, which starts a block; older keys have negative j.
        scale: default head_dim ** -0.5.
        lengths: see `visible_keys`.
        start: see `visible_keys`.
        memory_lengths: see `visible_keys`.
        sinks: more keys and values, of which query i sees the columns first_i .. last_i - 1.
    """
    visible = visible_keys(q, k, causal=causal, lengths=lengths, start=start, memory_lengths=memory_lengths)
    memory = k.shape[2] - q.shape[2]
    i = torch.arange(q.shape[2], device=q.device)[:, None]
    j = torch.arange(-memory, q.shape[2], device=q.device)[None, :]
    if blocks:
        distance = i.div(window, rounding_mode="floor") - j.div(window, rounding_mode="floor")
        near = distance.abs() <= 1
    else:
        near = (i - j).abs() < window
    if sinks is None:
        return attend(q, k, v, visible & near, scale)
    return _attend_both(q, k, v, visible & near, sinks, scale)


def visible_sinks(sinks: Sinks) -> Tensor:
    """Return which columns of the sinks a query sees, (batch or 1, length, columns)."""
    column = torch.arange(sinks.k.shape[2], device=sinks.k.device)
    return (column >= sinks.first[..., None]) & (column < sinks.last[..., None])


def _attend_both(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, sinks: Sinks, scale: float | None) -> Tensor:
    """Attend to the visible keys (batch, length, columns) and to sinks with one softmax."""
    group = q.shape[1] // k.shape[1]
    # a query that sees no key is padding
    seen = visible_sinks(sinks) & visible.any(-1, keepdim=True)
    k, v, sink_k, sink_v = (t.repeat_interleave(group, 1) for t in (k, v, sinks.k, sinks.v))
    scores = torch.cat([q @ k.mT, (q if sinks.q is None else sinks.q) @ sink_k.mT], -1)
    weights = masked_softmax(
        scores * (q.shape[-1] ** -0.5 if scale is None else scale), torch.cat([visible, seen], -1)[:, None]
    )
    return weights @ torch.cat([v, sink_v], 2)


def relative_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor,
    content_bias: Tensor,
    position_bias: Tensor,
    *,
    window: int | None = None,
    segment: int | None = None,
    scale: float | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
    memory_lengths: Tensor | None = None,
    segment_start: int | Tensor | None = None,
    detached_kv: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Transformer-XL's attention (Dai et al. 2019, section 3.3), causal, its four terms written out.

    score(i, j) = scale * (q_i . k_j + q_i . r_{i-j} + content_bias . k_j + position_bias . r_{i-j})

    Args:
        q: (batch, heads, length, head_dim).
        k: (batch, kv_heads, memory + length, head_dim).
        v: like k.
        r: (heads, distances, head_dim), r[:, t] for distance t; distances not below the farthest visible key + 1.
        content_bias: (heads, head_dim), the paper's u.
        position_bias: (heads, head_dim), the paper's v.
        window: without `segment`: 0 <= i - j < window. With it: j >= (i // segment) * segment - window. None: no limit.
        segment: see `window`; i and j count from query column 0, which starts a segment; older keys have negative j.
        scale: default head_dim ** -0.5.
        lengths: see `visible_keys`.
        start: see `visible_keys`.
        memory_lengths: see `visible_keys`.
        segment_start: where the segment of a query begins: an int S (query column i // S * S), or (batch, length) key
            columns.
        detached_kv: (k, v) with the same values as k and v. Pairs whose key is before the segment of their query send
            their gradients here and not to k and v, so that the memory is read but not trained through.
    """
    visible = visible_keys(q, k, lengths=lengths, start=start, memory_lengths=memory_lengths)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    memory, scale = k.shape[2] - q.shape[2], q.shape[-1] ** -0.5 if scale is None else scale
    i = torch.arange(q.shape[2], device=q.device)[:, None]
    j = torch.arange(-memory, q.shape[2], device=q.device)[None, :]
    if window is not None:
        visible = visible & ((i - j < window) if segment is None else (j >= i // segment * segment - window))
    distance = (i - j).clamp(0, r.shape[1] - 1)
    relative = r[:, distance]  # (heads, length, memory + length, head_dim)
    term_b = torch.einsum("bhid,hijd->bhij", q, relative)
    term_d = torch.einsum("hd,hijd->hij", position_bias, relative)

    def content(keys: Tensor) -> Tensor:
        """Return the scores of content: q_i . k_j + content_bias . k_j."""
        return torch.einsum("bhid,bhjd->bhij", q, keys) + torch.einsum("hd,bhjd->bhj", content_bias, keys)[:, :, None]

    if detached_kv is None or segment_start is None:
        scores = scale * (content(k) + term_b + term_d)
        return masked_softmax(scores, visible[:, None]) @ v
    first = i // segment_start * segment_start + memory if isinstance(segment_start, int) else segment_start[:, :, None]
    own = (j + memory >= first).expand(visible.shape)[:, None]
    detached_k, detached_v = (t.repeat_interleave(group, 1) for t in detached_kv)
    scores = scale * (torch.where(own, content(k), content(detached_k)) + term_b + term_d)
    weights = masked_softmax(scores, visible[:, None])
    return weights.masked_fill(~own, 0.0) @ v + weights.masked_fill(own, 0.0) @ detached_v


def relative_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    content_bias: Tensor,
    *,
    window: int | None = None,
    segment: int | None = None,
    scale: float | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
    memory_lengths: Tensor | None = None,
) -> Tensor:
    """Relative attention of one query per row, with given position scores: position[t] = (q + position_bias) . r_t.

    Args:
        q: (batch, heads, 1, head_dim).
        k: (batch, kv_heads, memory + 1, head_dim).
        v: like k.
        position: (batch, heads, 1, distances) by distance, before `scale`; its last entry repeats for larger distances.
        content_bias: (heads, head_dim).
        window: see `relative_attention`.
        segment: see `relative_attention`.
        scale: default head_dim ** -0.5.
        lengths: see `visible_keys`.
        start: see `visible_keys`.
        memory_lengths: see `visible_keys`.
    """
    visible = visible_keys(q, k, lengths=lengths, start=start, memory_lengths=memory_lengths)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    distance = torch.arange(k.shape[2] - 1, -1, -1, device=q.device)  # of each key to the query, the newest key's 0
    if window is not None:
        # with segments the query is the first of one, so it sees `window` older keys and itself
        visible = visible & (distance < (window if segment is None else window + 1))
    content = torch.einsum("bhid,bhjd->bhij", q + content_bias[:, None], k)
    scores = scale * (content + position[..., distance.clamp(max=position.shape[-1] - 1)])
    return masked_softmax(scores, visible[:, None]) @ v
