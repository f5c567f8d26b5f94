"""What the Compressive Transformer needs beside relative attention (Rae et al. 2019): usage of keys, lost attention."""

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.errors import ConfigError
from longspan.ops import flash
from longspan.ops.relative import FORWARD_TILE, farthest_first
from longspan.ops.relative_tiles import FORWARD_ENTRIES, Shift
from longspan.ops.rows import read_call
from longspan.ops.tiled import default_scale
from longspan.ops.tiles import HIDDEN, make_blocks, make_plan, take


@torch.no_grad()
def attention_usage(
    q: Tensor,
    k: Tensor,
    r: Tensor,
    content_bias: Tensor,
    position_bias: Tensor,
    *,
    scale: float | None = None,
    lengths: Tensor | None = None,
    memory_lengths: Tensor | None = None,
) -> Tensor:
    """How much attention each key gets in `relative_attention` without a window: its weights, summed over the queries.

    Args:
        q: (batch, heads, length, head_dim).
        k: (batch, kv_heads, memory + length, head_dim), kv_heads dividing heads; the first `memory` are older keys.
        r: (heads, distances, head_dim), r[:, t] for distance t.
        content_bias: (heads, head_dim), the paper's u.
        position_bias: (heads, head_dim), the paper's v.
        scale: default head_dim ** -0.5.
        lengths: (batch,) real tokens of each row, at the front; None = all. Later queries are not counted.
        memory_lengths: (batch,) how many of the older keys are real, newest last; None = all.

    Returns:
        (batch, memory + length), the mean over the heads of sums over the real queries, fp32 at least; no gradient.
    """
    call = read_call(q, k, k, causal=True, keep=None, lengths=lengths, start=None, memory_lengths=memory_lengths)
    dtype = flash.working_dtype(q, k)
    total = torch.zeros(q.shape[0], k.shape[2], dtype=dtype, device=q.device)
    if call.empty:
        return total
    scale, heads, kv_heads = default_scale(q, scale), q.shape[1], k.shape[1]
    plan = make_plan(q.shape[2], call.memory, tile=FORWARD_TILE)
    q, k, u, w = (t.to(dtype) for t in (call.q, call.k, content_bias, position_bias))
    r = (farthest_first(r, k.shape[2]).to(dtype) * scale).mT
    with flash.full_precision(q.device):
        for run in plan.runs:
            distances = plan.distances(run)
            most = max(1, FORWARD_ENTRIES // (heads * run.queries * (distances + run.queries)))
            for block in make_blocks(run, q.shape[0], most):
                rows, queries = block.rows, run.queries  # keys grow with every tile, so a run is one tile
                query = take(q, block, run.start, queries, run.step)
                shift = Shift(plan, run, heads * rows * queries, q)
                moved = (query.transpose(0, 1) + w[:, None, None]).reshape(heads, rows * queries, -1)
                torch.bmm(moved, r[:, :, -distances:], out=shift.by_distance(heads, rows * queries))
                bias = shift.by_key(heads, rows)
                seen = None if call.visibility is None else call.visibility.seen(run, block)
                if seen is not None:
                    bias.masked_fill_(~seen.transpose(0, 1), HIDDEN)
                key = take(k, block, run.low, run.keys, run.step)
                content = ((query + u[:, None]) * scale).reshape(rows, kv_heads, -1, q.shape[3])
                scores = (content @ key.mT).view(rows, heads, queries, run.keys).add_(bias.transpose(0, 1))
                weights = scores.softmax(-1)
                here = slice(block.row, block.row + rows)
                if call.dead is not None:
                    dead = call.dead[here, None, run.start : run.start + queries, None]
                    weights.masked_fill_(dead, 0.0)
                total[here, : run.keys] += weights.sum((1, 2)) / heads
    return total


def attention_reconstruction(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots_k: Tensor,
    slots_v: Tensor,
    *,
    groups: Tensor | None = None,
    lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention-reconstruction loss (Rae et al. 2019, algorithm 2): what queries lose when slots stand for vectors.

    mean over queries, heads and dims of (attend(q, k, v) - attend(q, slots_k, slots_v)) ** 2, content only: no
    positions, no order. Gradients are for the slots; the caller cuts those of the others.

    Args:
        q: (batch, heads, length, head_dim).
        k: (batch, kv_heads, slots * ratio, head_dim), kv_heads dividing heads: what the slots stand for.
        v: like k.
        slots_k: (batch, kv_heads, slots, head_dim).
        slots_v: like slots_k.
        groups: (batch,) how many slots are real, the first ones, each with its `ratio` vectors; None = all.
        lengths: (batch,) how many queries are real, the first ones; None = all.
        scale: default head_dim ** -0.5.

    Returns:
        (batch,) sums over a row's real queries of the means over heads and dims; 0 where a row has no real slot.
    """
    slots = slots_k.shape[2]
    if not slots or k.shape[2] % slots:
        raise ConfigError(f"{k.shape[2]} vectors do not make {slots} groups of one size")
    scale, ratio = default_scale(q, scale), k.shape[2] // slots
    # grouped heads become queries of one kv head, so no key is repeated
    folded = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])

    def attend(keys: Tensor, values: Tensor, per_group: int) -> Tensor:
        seen = None
        if groups is not None:
            # a row without groups sees all, so that it is no NaN before it is dropped
            seen = torch.arange(keys.shape[2], device=q.device) // per_group < groups[:, None]
            seen = (seen | (groups == 0)[:, None])[:, None, None]
        return F.scaled_dot_product_attention(folded, keys, values, attn_mask=seen, scale=scale)

    lost = (attend(k, v, ratio) - attend(slots_k, slots_v, 1)).square()
    lost = lost.view(q.shape).mean((1, 3), dtype=torch.promote_types(q.dtype, torch.float32))
    if lengths is not None:
        lost = lost.masked_fill(torch.arange(q.shape[2], device=q.device) >= lengths[:, None], 0.0)
    total = lost.sum(1)
    return total if groups is None else total.masked_fill(groups == 0, 0.0)
