"""Gated delta rule, fast: chunks of tokens by matrix products, and a scan over the states between chunks.

Legend: B batch, K kv heads, G query heads of each, D width of keys, E width of values, n chunks of C tokens.

Inside a chunk that is entered with S, with g_t the sum of the log decays up to token t:

    S_t = e^{g_t} S + sum_{s <= t} e^{g_t - g_s} k_s u_s^T,    (I + A) U = diag(b) (V - diag(e^g) K S),
    A_ts = b_t e^{g_t - g_s} k_t . k_s for s < t

(the WY form, Yang et al. 2024, section 3.3). Decays are exponentials of differences, never above 1. Keys no longer than
1 and strengths in [0, 1] keep the entries of (I + A)^-1 in [-1, 1], so solving for it is stable in fp32.

The backward pass keeps inputs and the state before every block of chunks, and makes the rest again, block by block.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longspan.engine import flash
from longspan.engine.arguments import check_floating, join_tail
from longspan.engine.first_order import FirstOrder
from longspan.errors import ConfigError

CHUNK = 64
BLOCK = 1024
FORGOTTEN = -40.0
"""The least log decay that is told apart: what is multiplied by e^-40 is below the rounding of fp64."""


def gated_delta_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    strength: Tensor,
    *,
    state: Tensor | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T and o_t = q_t S_t, in time and memory linear in the length.

    The query heads of a kv head read its one state. Queries are used as they are, without a factor.

    Args:
        q: (batch, heads, length, key_dim).
        k: (batch, kv_heads, length, key_dim), kv_heads dividing heads; no vector longer than 1.
        v: (batch, kv_heads, length, value_dim).
        log_decay: (batch, kv_heads, length), log a_t, at most 0; -inf forgets everything.
        strength: (batch, kv_heads, length), b_t in [0, 1].
        state: (batch, kv_heads, key_dim, value_dim), S before the call; None = zeros.
        lengths: (batch,) real tokens of each row, at the front; None = all.
        start: (batch, length) the column where each token's document starts, negative where before the call; None = no
            document starts inside.

    Returns:
        (batch, heads, length, value_dim) in v's dtype, arbitrary behind a row's real tokens, and S after the call, in
        fp32 at least.

    Raises:
        ConfigError: shapes that do not fit, or tensors that are not floating point.
    """
    check_floating(q=q, k=k, v=v, log_decay=log_decay, strength=strength)
    if q.shape[1] % max(k.shape[1], 1) or q.shape[2:] != k.shape[2:] or k.shape[:3] != v.shape[:3]:
        raise ConfigError(
            f"gated delta rule: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit: "
            "(batch, heads, length, ...), kv_heads dividing heads"
        )
    if not log_decay.shape == strength.shape == k.shape[:3]:
        raise ConfigError(
            f"gated delta rule: log_decay {tuple(log_decay.shape)}, strength {tuple(strength.shape)}: expected "
            f"{tuple(k.shape[:3])}"
        )
    dtype = flash.working_dtype(q, k, v)
    with flash.full_precision(q.device):
        tensors = [t.to(dtype) for t in (q, k, v, log_decay.clamp(min=FORGOTTEN), strength)]
        if state is None:
            state = v.new_zeros(*k.shape[:2], k.shape[3], v.shape[3], dtype=dtype)
        if lengths is not None:
            real = torch.arange(v.shape[2], device=v.device) < lengths[:, None]
            tensors[3:] = [t.masked_fill(~real[:, None], 0) for t in tensors[3:]]
            start = None if start is None else join_tail(start, lengths, real)
        out, after = _GatedDelta.apply(start, *tensors, state.to(dtype))
    return out.to(v.dtype), after


def short_convolution(x: Tensor, weight: Tensor, *, past: Tensor | None = None, start: Tensor | None = None) -> Tensor:
    """y_t = sum_j w_j x_{t-j}: every channel over its last few tokens, none of which lies before its document.

    Args:
        x: (batch, heads, length, dim).
        weight: (heads, dim, taps), the last tap for the token itself, as `torch.nn.Conv1d` has them.
        past: (batch, heads, taps - 1, dim), the columns before the call, newest last; None = zeros.
        start: as in `gated_delta_attention`.

    Returns:
        Like x, in fp32 at least.

    Raises:
        ConfigError: shapes that do not fit, or tensors that are not floating point.
    """
    check_floating(x=x, weight=weight, past=past)
    before = (x.shape[0], x.shape[1], weight.shape[-1] - 1, x.shape[3])
    if weight.shape[:2] != x.shape[1::2] or not (past is None or past.shape == before):
        shapes = f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, past {None if past is None else tuple(past.shape)}"
        raise ConfigError(f"short convolution: {shapes} do not fit: (batch, heads, length, dim), (heads, dim, taps)")
    dtype = flash.working_dtype(x, weight)
    past = x.new_zeros(before) if past is None else past
    out: Tensor = _ShortConvolution.apply(start, torch.cat([past.to(dtype), x.to(dtype)], 2), weight.to(dtype))
    return out


class _ShortConvolution(FirstOrder):
    """Shifted products summed up.

    Ordinary autograd takes twice as long forward and backward (2.0 at 4,096 and at 16,384 tokens of 128 channels);
    torch's depthwise convolution takes as long (0.9 to 1.1; forward up to 1.2), but knows no documents.
    """

    what = "the short convolution"

    @staticmethod
    def forward(ctx: Any, start: Tensor | None, padded: Tensor, weight: Tensor) -> Tensor:
        ctx.start = start
        ctx.save_for_backward(padded, weight)
        length = padded.shape[2] - weight.shape[2] + 1
        out = padded.new_zeros(*padded.shape[:2], length, padded.shape[3])
        for tap, columns, cut in _taps(start, length, weight.shape[2]):
            part = padded[:, :, columns]
            out.addcmul_(part if cut is None else part.masked_fill(cut, 0), weight[:, None, :, tap])
        return out

    @staticmethod
    def gradients(ctx: Any, saved: tuple[Any, ...], d_out: Tensor) -> Any:
        padded, weight = saved
        d_padded, d_weight = torch.zeros_like(padded), torch.empty_like(weight)
        for tap, columns, cut in _taps(ctx.start, d_out.shape[2], weight.shape[2]):
            d_part = d_out if cut is None else d_out.masked_fill(cut, 0)
            d_padded[:, :, columns].addcmul_(d_part, weight[:, None, :, tap])
            d_weight[:, :, tap] = (d_part * padded[:, :, columns]).sum((0, 2))
        return None, d_padded, d_weight


def _taps(start: Tensor | None, length: int, taps: int) -> Iterator[tuple[int, slice, Tensor | None]]:
    """Each tap, the columns that it reads, and (B, 1, N, 1) where they lie before the document; None = nowhere."""
    for tap in range(taps):
        cut = None
        if start is not None and tap < taps - 1:
            cut = (torch.arange(length, device=start.device) - (taps - 1 - tap) < start)[:, None, :, None]
        yield tap, slice(tap, tap + length), cut


class Block(NamedTuple):
    """Columns of a call that are worked off together, in chunks of `size`."""

    columns: slice
    size: int


def _blocks(length: int) -> list[Block]:
    """Whole chunks, then the rest as one."""
    whole = length // CHUNK * CHUNK
    blocks = [Block(slice(first, min(first + BLOCK, whole)), CHUNK) for first in range(0, whole, BLOCK)]
    return blocks if whole == length else [*blocks, Block(slice(whole, length), length - whole)]


class Chunks(NamedTuple):
    """Some chunks of a call, laid out for matrix products."""

    q: Tensor  # (B, K, n, G C, D), the heads of a group below each other
    k: Tensor  # (B, K, n, C, D)
    v: Tensor  # (B, K, n, C, E)
    strength: Tensor  # (B, K, n, C, 1)
    inside: Tensor  # (B, K, n, C, C), e^{g_t - g_s} where t sees s, itself included; else 0
    entering: Tensor  # (B, K, n, C, 1), what token t sees of the state before the chunk
    leaving: Tensor  # (B, K, n, C, 1), what the state behind the chunk has of token s
    across: Tensor  # (B, K, n, 1, 1), what the state behind the chunk has of the one before it
    seen: Tensor  # (C, C) or (B, 1, n, C, C) bool, whether t sees s, itself included

    def per_query(self, t: Tensor) -> Tensor:
        """(B, K, n, C, x) for the queries of a group: (B, K, n, G C, x)."""
        group = self.q.shape[3] // self.k.shape[3]
        return t if group == 1 else t.repeat(1, 1, 1, group, 1)

    def over_group(self, t: Tensor) -> Tensor:
        """Sums over the queries of a group: (B, K, n, G C, x) to (B, K, n, C, x)."""
        size = self.k.shape[3]
        return t if t.shape[3] == size else t.unflatten(3, (-1, size)).sum(3)


def _chunks(sequences: Sequence[Tensor], start: Tensor | None, block: Block) -> Chunks:
    """The chunks of a block of q, k, v, log decays and strengths."""
    size, kv_heads = block.size, sequences[1].shape[1]
    q, k, v, log_decay, strength = (t[:, :, block.columns].unflatten(2, (-1, size)) for t in sequences)
    logs = log_decay.cumsum(-1)
    entering = logs.exp()[..., None]
    token = torch.arange(size, device=k.device)
    seen = token[:, None] >= token
    if start is not None:
        first = block.columns.start + size * torch.arange(k.shape[2], device=k.device)
        begin = (start[:, block.columns].unflatten(1, (-1, size)) - first[:, None])[:, None]  # (B, 1, n, C)
        seen = seen & (token >= begin[..., None])
        entering = entering.masked_fill((begin >= 0)[..., None], 0)
    inside = (logs[..., :, None] - logs[..., None, :]).masked_fill_(~seen, -torch.inf).exp_()
    return Chunks(
        q=_by_kv_head(q, kv_heads),
        k=k.contiguous(),
        v=v.contiguous(),
        strength=strength[..., None],
        inside=inside,
        entering=entering,
        leaving=inside[..., -1, :, None],
        across=entering[..., -1:, :],
        seen=seen,
    )


def _by_kv_head(t: Tensor, kv_heads: int) -> Tensor:
    """(B, heads, n, C, x) as (B, K, n, G C, x)."""
    grouped: Tensor = t.unflatten(1, (kv_heads, -1))
    return grouped.transpose(2, 3).flatten(3, 4)


def _by_head(t: Tensor, size: int) -> Tensor:
    """The way back, in columns: (B, K, n, G C, x) to (B, heads, n C, x)."""
    grouped: Tensor = t.unflatten(3, (-1, size))
    return grouped.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _flat(t: Tensor) -> tuple[Tensor, ...]:
    """(B, K, n, x, y) chunk by chunk, (B K, x, y) each."""
    return t.flatten(0, 1).unbind(1)


class Scan(NamedTuple):
    """What comes of going through a block chunk by chunk."""

    inverse: Tensor  # (I + A)^-1, (B, K, n, C, C)
    before: Tensor  # S before each chunk, (B, K, n, D, E)
    written: Tensor  # U of each chunk, (B, K, n, C, E)
    after: Tensor  # S behind the last chunk, (B, K, D, E)


def _scan(chunks: Chunks, state: Tensor) -> Scan:
    """The states and what is written; only this goes from chunk to chunk."""
    k, v, strength = chunks.k, chunks.v, chunks.strength
    a = (k @ k.mT).mul_(chunks.inside).mul_(strength)
    unit = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)
    # of I + A only what lies below the diagonal is read
    inverse = torch.linalg.solve_triangular(a, unit, upper=False, unitriangular=True)
    parts = (inverse, strength * v, strength * chunks.entering * k, (chunks.leaving * k).mT, chunks.across)
    now, before, written = state.flatten(0, 1), [], []
    for turn, values, reading, writing, across in zip(*map(_flat, parts), strict=True):
        before.append(now)
        written.append(turn.bmm(torch.baddbmm(values, reading, now, alpha=-1)))
        now = torch.baddbmm(across * now, writing, written[-1])
    states, updates = (torch.stack(t, 1).unflatten(0, k.shape[:2]) for t in (before, written))
    return Scan(inverse, before=states, written=updates, after=now.unflatten(0, k.shape[:2]))


def _forward(chunks: Chunks, state: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs (B, K, n, G C, E), and the state behind the last chunk."""
    scan = _scan(chunks, state)
    scores = (chunks.q @ chunks.k.mT).mul_(chunks.per_query(chunks.inside))
    out = (scores @ scan.written).add_((chunks.q @ scan.before).mul_(chunks.per_query(chunks.entering)))
    return out, scan.after


def _backward(chunks: Chunks, state: Tensor, d_out: Tensor, d_state: Tensor) -> tuple[list[Tensor], Tensor]:
    """Gradients of q, k, v, log decays and strengths of a block, in columns, and of the state before it.

    From those of the outputs, (B, K, n, G C, E), and of the state behind the last chunk.
    """
    q, k, v, strength, inside, entering, leaving, across, seen = chunks
    scan = _scan(chunks, state)
    states, written = scan.before, scan.written
    entering_q, inside_q = chunks.per_query(entering), chunks.per_query(inside)
    scores = (q @ k.mT).mul_(inside_q)
    parts = (
        scan.inverse.mT,
        scores.mT @ d_out,
        leaving * k,
        (entering_q * q).mT @ d_out,
        (strength * entering * k).mT,
        across,
    )
    now, behind, rights = d_state.flatten(0, 1), [], []
    for inverse, d_written, writing, d_read, reading, fade in reversed(list(zip(*map(_flat, parts), strict=True))):
        behind.append(now)
        rights.append(inverse.bmm(torch.baddbmm(d_written, writing, now)))
        now = torch.baddbmm((fade * now).add_(d_read), reading, rights[-1], alpha=-1)
    d_behind, d_right = (torch.stack(t[::-1], 1).unflatten(0, k.shape[:2]) for t in (behind, rights))
    # below the diagonal only; on it `inside` is not a decay
    d_a = (d_right @ written.mT).mul_(inside).tril_(-1)
    d_scores = (d_out @ written.mT).mul_(inside_q)
    d_q = (d_scores @ k).add_((d_out @ states.mT).mul_(entering_q))
    # keys by what they do: as rows they read (and are multiplied by b), as columns they are read
    d_rows = (d_a @ k).add_((d_right @ states.mT).mul_(entering)).neg_()
    d_written_keys = (written @ d_behind.mT).mul_(leaving)
    d_columns = (d_scores.mT @ q).sub_(d_a.mT @ (strength * k)).add_(d_written_keys)
    d_v = strength * d_right
    d_strength = (v * d_right).sum(-1) + (k * d_rows).sum(-1)
    d_k = torch.addcmul(d_columns, strength, d_rows)
    # every use of a row of q or k comes with e^{g_t}, of a column of k with e^{-g_s}
    d_logs = chunks.over_group((q * d_q).sum(-1, keepdim=True))[..., 0]
    d_logs = d_logs + (k * (strength * d_rows - d_columns)).sum(-1)
    d_logs[..., -1] += (k * d_written_keys).sum((-2, -1)) + (states * d_behind * across).sum((-2, -1))
    d_decay = (d_logs[..., None, :] @ seen.to(d_logs.dtype))[..., 0, :]
    columns = [_by_head(d_q, k.shape[3]), *(t.flatten(2, 3) for t in (d_k, d_v, d_decay, d_strength))]
    return columns, now.unflatten(0, k.shape[:2])


class _GatedDelta(FirstOrder):
    """The whole call, block by block."""

    what = "the gated delta rule"

    @staticmethod
    def forward(ctx: Any, start: Tensor | None, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        *sequences, state = tensors
        out = sequences[2].new_empty(*sequences[0].shape[:3], sequences[2].shape[3])
        now, borders = state, []
        for block in _blocks(out.shape[2]):
            borders.append(now)
            part, now = _forward(_chunks(sequences, start, block), now)
            out[:, :, block.columns] = _by_head(part, block.size)
        ctx.start = start
        ctx.save_for_backward(*sequences, *borders)
        # never a tensor that was given, which autograd would take for an output computed in place
        return out, state.clone() if now is state else now

    @staticmethod
    def gradients(ctx: Any, saved: tuple[Any, ...], d_out: Tensor, d_state: Tensor) -> Any:
        sequences, borders = saved[:5], saved[5:]
        grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in sequences]
        blocks = _blocks(d_out.shape[2])
        for block, state in zip(reversed(blocks), reversed(borders), strict=True):
            chunks = _chunks(sequences, ctx.start, block)
            d_part = _by_kv_head(d_out[:, :, block.columns].unflatten(2, (-1, block.size)), chunks.k.shape[1])
            parts, d_state = _backward(chunks, state, d_part, d_state)
            for grad, part in zip(grads, parts, strict=True):
                grad[:, :, block.columns] = part
        return None, *grads, d_state


def gated_delta_cost(length: int, *, key_dim: int, value_dim: int, group: int = 1) -> int:
    """Multiply-adds of the matrix products of a kv head and its `group` query heads over `length` tokens, forward.

    The triangular systems, about a fifth more, are no matrix products and not counted (torch does not count them).
    """
    inside = length // CHUNK * CHUNK**2 + (length % CHUNK) ** 2
    return inside * (1 + group) * (key_dim + value_dim) + length * (2 + group) * key_dim * value_dim
