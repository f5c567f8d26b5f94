"""The nodes of BP-Transformer's tree from their tokens: inside chunks, beyond them, and on from a state."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longspan import host
from longspan.ops import flash
from longspan.ops.bp_tree import Book, Chunks
from longspan.ops.first_order import FirstOrder
from longspan.ops.tiles import HIDDEN

ENTRIES = 1 << 18
"""Weights of one block of chunks over all its heads: they stay in cache."""


class TreeNodes(NamedTuple):
    """What BP attention carries.

    Attributes:
        k: (batch, kv_heads, slots, head_dim), finished nodes, level by level, in a level the newest last; zeros where a
            row has fewer.
        v: like k.
        open_k: (batch, kv_heads, levels, head_dim), fp32 at least, the open node of each level above the tokens: the
            weighted mean of its keys so far; zeros where nothing is open.
        open_v: like open_k.
        open_mass: (batch, kv_heads, levels), the logarithm of the sum of its weights.
        live: (batch,) int64, tokens since the document began.
    """

    k: Tensor
    v: Tensor
    open_k: Tensor
    open_v: Tensor
    open_mass: Tensor
    live: Tensor


class Pooled(NamedTuple):
    """Nodes in the making: means of keys and values (..., kv_heads, head_dim), log-sums of weights (..., kv_heads)."""

    k: Tensor
    v: Tensor
    mass: Tensor


def pool(
    k: Tensor,
    v: Tensor,
    content: Tensor,
    queries: Tensor,
    scale: float,
    chunks: Chunks,
    state: TreeNodes | None,
) -> Pooled:
    """The nodes inside each chunk and its share of larger ones, (batch, chunks, rows, ...).

    Args:
        k: (batch, columns, kv_heads, head_dim), what nodes hold.
        v: like k.
        content: like k, what the weights are made of.
        queries: (levels, kv_heads, head_dim).
        scale: of the logits.
        chunks: the layout.
        state: what goes on in the first chunk.
    """
    batch, _, kv_heads, dim = k.shape
    dtype = torch.promote_types(torch.promote_types(k.dtype, queries.dtype), torch.float32)
    keys, values = (t.to(dtype).reshape(-1, chunks.tile, kv_heads, dim) for t in (k, v))
    logits = torch.einsum("bngd,lgd->bngl", content.to(dtype), queries.to(dtype)) * scale
    logits = logits.reshape(keys.shape[0], chunks.tile, kv_heads, len(queries))
    level, node = row_nodes(chunks.tile, len(queries), k.device)
    token = torch.arange(chunks.tile, device=k.device)
    mask = torch.zeros(len(level), chunks.tile, dtype=dtype, device=k.device)
    mask.masked_fill_((token >> level[:, None]) != node[:, None], HIDDEN)
    real = None if chunks.real is None else chunks.real.expand(batch, -1, -1).flatten(0, 1)
    parts = _apply(keys, values, logits, _Rows(level - 1, mask, real))
    found = Pooled(*(t.unflatten(0, (batch, chunks.total)) for t in parts))
    return found if state is None else _go_on(found, chunks, level - 1, state)


class _Rows(NamedTuple):
    """Which query each pooled row takes, what is added to its logits (rows, tile), columns that hold a token."""

    query: Tensor
    mask: Tensor
    real: Tensor | None

    def weights(self, logits: Tensor, block: slice) -> tuple[Tensor, Tensor]:
        """(jobs, kv_heads, rows, tile) weights, and (jobs, kv_heads, rows) the logarithm of their sum."""
        rows = logits[block].permute(0, 2, 3, 1).index_select(2, self.query).add_(self.mask)
        if self.real is not None:
            rows.masked_fill_(~self.real[block][:, None, None], HIDDEN)
        weights = rows.softmax(-1)
        # the largest weight is one over the sum
        return weights, rows.amax(-1) - weights.amax(-1).log()


class _Pool(FirstOrder):
    """Keeps inputs and means; the backward pass makes the weights again."""

    what = "bp attention"

    @staticmethod
    def forward(ctx: Any, keys: Tensor, values: Tensor, logits: Tensor, rows: _Rows) -> Any:
        jobs, _, kv_heads, dim = keys.shape
        size = jobs, len(rows.query), kv_heads
        k, v, mass = keys.new_empty(*size, dim), keys.new_empty(*size, dim), keys.new_empty(size)
        for block in _blocks(keys, rows):
            weights, sums = rows.weights(logits, block)
            mass[block] = sums.transpose(1, 2)
            for target, source in ((k, keys), (v, values)):
                target[block] = (weights @ source[block].transpose(1, 2)).transpose(1, 2)
        ctx.save_for_backward(keys, values, logits, k, v)
        ctx.rows = rows
        return k, v, mass

    @staticmethod
    def gradients(ctx: Any, saved: tuple[Any, ...], dk: Tensor, dv: Tensor, dmass: Tensor) -> Any:
        keys, values, logits, k, v = saved
        rows: _Rows = ctx.rows
        dkeys, dvalues, dlogits = (torch.empty_like(t) for t in (keys, values, logits))
        level = torch.arange(logits.shape[3], device=keys.device)
        ones = (rows.query == level[:, None]).to(keys.dtype)
        with flash.full_precision(keys.device):
            for block in _blocks(keys, rows):
                weights, _ = rows.weights(logits, block)
                gk, gv = (t[block].transpose(1, 2) for t in (dk, dv))
                inner = (dk[block] * k[block]).sum(-1) + (dv[block] * v[block]).sum(-1) - dmass[block]
                slope = gk @ keys[block].permute(0, 2, 3, 1) + gv @ values[block].permute(0, 2, 3, 1)
                slope.sub_(inner.transpose(1, 2)[..., None]).mul_(weights)
                dlogits[block] = (ones @ slope).permute(0, 3, 1, 2)
                dkeys[block] = (weights.mT @ gk).transpose(1, 2)
                dvalues[block] = (weights.mT @ gv).transpose(1, 2)
        return dkeys, dvalues, dlogits, None


_apply: Callable[..., tuple[Tensor, Tensor, Tensor]] = _Pool.apply


def _blocks(keys: Tensor, rows: _Rows) -> Iterator[slice]:
    size = max(1, ENTRIES // max(1, rows.mask.numel() * keys.shape[2]))
    for first in range(0, keys.shape[0], size):
        yield slice(first, min(first + size, keys.shape[0]))


@host.table
def row_nodes(tile: int, levels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(rows,) level of each pooled row, and its node within the chunk."""
    rows = [(level, node) for level in range(1, levels + 1) for node in range(max(1, tile >> level))]
    found = torch.tensor(rows, dtype=torch.int64, device=device).view(-1, 2)
    return found[:, 0], found[:, 1]


def _go_on(pooled: Pooled, chunks: Chunks, query: Tensor, state: TreeNodes) -> Pooled:
    """What the state has open goes into the first chunk."""
    level, node = row_nodes(chunks.tile, state.open_k.shape[2], query.device)
    offset = state.live[:, None]
    there = (offset & ((1 << level) - 1)) > 0
    small = level <= chunks.shift
    there &= ~small | ((offset & (chunks.tile - 1)) >> level == node)
    there = there & (chunks.before[:, :1] > 0)
    here = there[:, :, None]
    old = [t.index_select(2, query).transpose(1, 2).to(pooled.mass.dtype) for t in state[2:5]]
    first = pooled.mass[:, 0]
    mass = torch.where(here, torch.logaddexp(first, torch.where(here, old[2], 0)), first)
    share = torch.where(here, (first - mass).exp(), 1)[..., None]
    joined = [share * new[:, 0] + (1 - share) * each for new, each in zip(pooled[:2], old[:2], strict=True)]
    parts = (*joined, mass)
    return Pooled(*(torch.cat([one[:, None], all_[:, 1:]], 1) for one, all_ in zip(parts, pooled, strict=True)))


def join(pooled: Pooled, chunks: Chunks, book: Book) -> Pooled:
    """Nodes larger than a chunk, (batch, chunks, levels, ...): each at the last of its chunks in the call."""
    shares = Pooled(*(t[:, :, book.inside :] for t in pooled))
    higher = shares.mass.shape[2]
    if not higher or chunks.total == 1:
        return shares
    batch = shares.mass.shape[0]
    chunk = torch.arange(chunks.total, device=shares.k.device)[None, :, None]
    size = 1 << torch.arange(1, higher + 1, device=chunk.device)
    number = chunks.begin[..., None] >> chunks.shift
    target = torch.minimum(chunk + size - 1 - number % size, chunks.last[..., None])
    target = target.expand(batch, -1, -1)[..., None].expand(shares.mass.shape)
    top = torch.full_like(shares.mass, HIDDEN).scatter_reduce(1, target, shares.mass.detach(), "amax")
    weight = (shares.mass - top.gather(1, target)).exp()
    total = torch.zeros_like(weight).scatter_add(1, target, weight).clamp(min=1e-30)
    wide = target[..., None].expand(shares.k.shape)
    k, v = (torch.zeros_like(t).scatter_add(1, wide, weight[..., None] * t) / total[..., None] for t in shares[:2])
    return Pooled(k, v, top + total.log())
